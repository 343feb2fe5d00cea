// One answer: streamed, shown with its route, explained on demand.

import { ask, events, Failure } from "./api.js";
import { announce, button, h } from "./dom.js";
import { figures } from "./heatmap.js";
import { bars, chips, labels, looked, steps, timings, why } from "./route.js";
import { TokenText } from "./text.js";

/** One answer: its request, its streamed text, its route, and the measured contributions. */
export class Answer {
  /**
   * @param {string} model of the server.
   * @param {{role: string, content: string}[]} messages that it answers.
   * @param {{policy?: string, mix?: Object<string, number>}} options how to route.
   * @param {{label: string, work: Function, again: Function, more?: HTMLElement[]}} place `work` runs one task at a
   *   time, with a signal to abort it; `again` retries after an error; `more` are additional buttons.
   */
  constructor(model, messages, options, place) {
    Object.assign(this, { model, messages, options, place });
    this.text = new TokenText();
    this.route = null;
    this.done = false;
    this.note = h("p", { class: "note", hidden: true });
    this.head = h("header", {}, h("h3", {}, place.label));
    this.side = h("aside", { class: "route", "aria-label": "Why this answer" });
    this.actions = h("p", { class: "actions", hidden: true });
    this.explained = h("section", { class: "explained", tabIndex: -1, "aria-label": "Measured contributions" });
    const body = h("div", { class: "body" }, this.text.node, this.note, this.actions);
    this.node = h(
      "section",
      { class: "answer waiting", "aria-label": place.label },
      this.head,
      h("div", { class: "columns" }, body, this.side),
    );
  }

  get body() {
    return { model: this.model, messages: this.messages, loramix: this.options };
  }

  /** Stream the answer; errors are shown here and never thrown. */
  async run(signal) {
    this.node.setAttribute("aria-busy", "true");
    try {
      const extra = { stream: true, stream_options: { include_usage: true }, logprobs: true };
      const body = { ...this.body, ...extra };
      const response = await ask("/v1/chat/completions", { body, signal, busy: (text) => this.say(text) });
      for await (const event of events(response)) this.take(event);
      this.done = true;
      announce(`Answer by ${this.by}: ${this.text.plain}`);
    } catch (error) {
      this.failed(error);
    }
    this.node.classList.remove("waiting");
    this.node.removeAttribute("aria-busy");
    if (this.route) this.finish();
  }

  get by() {
    const steps = [this.route.mix, ...this.route.then];
    return steps.map((mix) => Object.keys(mix).join(" and ") || "base").join(", then ");
  }

  take({ choices, loramix, usage }) {
    const choice = choices[0];
    if (loramix && !this.route) {
      this.route = loramix;
      this.text.begin(loramix);
      this.head.append(chips(loramix));
      this.side.replaceChildren(...[why(loramix), steps(loramix, this.messages.at(-1).content), bars(loramix), looked(loramix)].filter(Boolean));
    } else if (loramix) {
      this.report = loramix;
      if (loramix.mixes) this.text.mixed(loramix.mixes);
    }
    if (usage) this.usage = usage;
    const tokens = choice?.logprobs?.content ?? [];
    if (choice?.delta.content || tokens.length) {
      this.node.classList.remove("waiting");
      this.text.add(choice.delta.content, tokens);
    }
    if (choice?.finish_reason === "length") this.say("The answer reached its length limit.");
  }

  finish() {
    if (this.done && !this.text.plain) this.say("The answer is empty.");
    if (this.report) this.side.append(...labels(this.report), timings(this.report, this.usage));
    if (!this.done) return;
    const mixes = [this.route.mix, ...this.route.then];
    const skilled = this.text.tokens.length && mixes.some((mix) => Object.keys(mix).length);
    const measured = button("Show contributions", () => this.explain(measured));
    this.actions.append(...(skilled ? [measured] : []), ...(this.place.more ?? []));
    this.actions.hidden = false;
  }

  failed(error) {
    if (error.name === "AbortError") {
      this.say("Stopped.");
      announce("Stopped.");
    } else {
      this.say(error instanceof Failure ? error.message : `This page failed: ${error.message}`, true);
    }
    this.note.append(button("Try again", () => this.place.again()));
  }

  say(text, wrong = false) {
    this.note.textContent = text;
    this.note.hidden = !text;
    this.note.classList.toggle("wrong", wrong);
    if (wrong) this.note.setAttribute("role", "alert");
    else this.note.removeAttribute("role");
  }

  /** Request the same answer with the contribution of each skill, and draw the contributions. */
  explain(trigger) {
    return this.place.work(async (signal) => {
      trigger.textContent = "Measuring …";
      try {
        const busy = (text) => this.say(text);
        const found = await (await ask("/v1/explain", { body: this.body, signal, busy })).json();
        const { contributions } = found;
        if (found.text !== this.text.plain) {
          this.say("The answer differs this time; the figures below belong to the new one.");
        }
        this.text.measured(contributions);
        const own = this.text.tokens.map(({ text }) => text);
        if (own.length === contributions.tokens.length) contributions.tokens = own;
        this.explained.replaceChildren(...figures(contributions, this.place.label));
        trigger.remove();
        this.explained.focus({ preventScroll: true });
        this.explained.scrollIntoView({ block: "nearest" });
      } catch (error) {
        if (error.name !== "AbortError") this.say(error.message, true);
        trigger.textContent = "Show contributions";
      }
    });
  }
}
