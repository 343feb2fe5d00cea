// The page: the prompt box, the conversation and its turns; one task runs at a time.

import { Answer } from "./answer.js";
import { ask } from "./api.js";
import { $, announce, button, count, h, nameSkills } from "./dom.js";
import { mixer } from "./mixer.js";
import { openers, skillList } from "./skills.js";

const prompt = $("#prompt");
const log = $("#log");
const send = $("#send");
const nothing = $("#nothing");
const wide = matchMedia("(min-width: 60rem)");

let pack = null;
let conversation = []; // messages so far, with the routed answers
let running = null; // AbortController of the current task

/** Run a task that can be aborted; ignored while another one runs. */
async function work(task) {
  if (running) return;
  running = new AbortController();
  busy(true);
  try {
    await task(running.signal);
  } finally {
    running = null;
    busy(false);
    health();
  }
}

function busy(now) {
  document.body.classList.toggle("busy", now);
  send.textContent = now ? "Stop" : "Send";
  document.querySelectorAll(".actions button, .note button").forEach((node) => (node.disabled = now));
}

function stop() {
  running?.abort();
}

function submit() {
  const text = prompt.value.trim();
  if (running || !text || !pack) return;
  prompt.value = "";
  nothing.hidden = true;
  turn(text, { policy: $("input[name=policy]:checked").value });
}

/** Add a prompt and its answers to the log. */
function turn(text, options) {
  const before = $("#remember").checked ? conversation : [];
  const messages = [...before, { role: "user", content: text }];
  const answers = h("div", { class: "answers" });
  const below = h("div", { class: "below" });
  const explained = h("div", { class: "explanations" });
  const said = h("p", { class: "prompt" }, h("span", { class: "unseen" }, "You: "), text);
  const article = h("article", { class: "turn" }, said, answers, below, explained);
  log.append(article);

  function routed() {
    const open = button("Change the mix", () => {
      const opened = open.getAttribute("aria-expanded") === "true";
      open.setAttribute("aria-expanded", String(!opened));
      if (opened) return below.replaceChildren();
      below.replaceChildren(mixer(pack.skills.map(({ name }) => name), first.route.mix, own));
      below.querySelector("input").focus();
      below.scrollIntoView({ block: "nearest" });
    });
    open.setAttribute("aria-expanded", "false");
    const again = () => {
      if (wide.matches) prompt.focus(); // the pressed button is removed
      routed();
    };
    const place = { label: `Policy ${options.policy}`, work, again, more: [open] };
    const first = new Answer(pack.name, messages, options, place);
    answers.replaceChildren(first.node);
    below.replaceChildren();
    explained.replaceChildren(first.explained);
    article.scrollIntoView({ block: "nearest" });
    work(async (signal) => {
      await followed(first.run(signal));
      if (first.text.plain && article.isConnected) conversation = [...messages, { role: "assistant", content: first.text.plain }];
    });
  }

  function own(mix) {
    const again = () => own(mix);
    if (running) return;
    const second = new Answer(pack.name, messages, { mix }, { label: "Your mix", work, again });
    answers.replaceChildren(answers.firstChild, second.node);
    explained.replaceChildren(explained.firstChild, second.explained);
    answers.scrollIntoView({ block: "nearest" });
    work((signal) => second.run(signal));
  }

  routed();
}

/** Keep the end of the log visible while an answer grows, unless the user has scrolled away. */
async function followed(answer) {
  const page = document.documentElement;
  const near = () => page.scrollHeight - page.scrollTop - page.clientHeight < 120;
  let follow = true;
  const seen = () => (follow = near());
  addEventListener("scroll", seen, { passive: true });
  const watch = new ResizeObserver(() => follow && page.scrollTo({ top: page.scrollHeight, behavior: "instant" }));
  watch.observe(log);
  try {
    await answer;
  } finally {
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); // wait until the last piece is laid out
    watch.disconnect();
    removeEventListener("scroll", seen);
  }
}

function propose(text) {
  prompt.value = text;
  showSkills(false);
  prompt.focus();
}

function newChat() {
  stop();
  conversation = [];
  log.replaceChildren();
  nothing.hidden = false;
  announce("New chat.");
  prompt.focus();
}

/** Show or hide the list of skills, which covers the chat on narrow screens. */
function showSkills(open) {
  document.body.classList.toggle("skills-open", open);
  $("#show-skills").setAttribute("aria-expanded", String(open));
  if (open) $("#skills h2").focus();
}

let poll = 0; // timer that polls until the server is ready

async function health() {
  const state = $("#state");
  let text = "not reachable";
  try {
    const { status } = await (await fetch("/health")).json();
    text = status === "ok" ? "ready" : "starting";
  } catch {
    // not reachable
  }
  state.textContent = text;
  state.dataset.state = text;
  clearTimeout(poll);
  if (text !== "ready") poll = setTimeout(health, 3000);
}

async function begin() {
  const problem = $("#problem");
  problem.hidden = true;
  health();
  try {
    [pack] = (await (await ask("/v1/packs")).json()).data;
  } catch (error) {
    problem.replaceChildren(error.message, " ", button("Try again", begin));
    problem.hidden = false;
    return;
  }
  nameSkills(pack.skills.map(({ name }) => name));
  $("#pack").textContent = `${pack.name}, ${count(pack.skills.length, "skill")}`;
  $("#title").textContent = `${count(pack.skills.length, "skill")} on one small model`;
  $("#skills").append(skillList(pack, propose));
  $("#openers").replaceChildren(...openers(pack, propose));
  if (!pack.gate) $("input[name=policy][value=base]").checked = true;
  if (wide.matches) prompt.focus();
}

prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
if (!CSS.supports("field-sizing", "content")) {
  prompt.addEventListener("input", () => {
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight}px`;
  });
}
$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit();
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (running) stop();
  else showSkills(false);
});
$("#new").addEventListener("click", newChat);
$("#show-skills").addEventListener("click", () => showSkills(!document.body.classList.contains("skills-open")));
document.querySelectorAll("dialog .close").forEach((node) => node.addEventListener("click", () => node.closest("dialog").close()));
begin();
