// The list of skills: description, example and card.

import { ask } from "./api.js";
import { $, button, dot, h } from "./dom.js";

/**
 * @param {{name: string, skills: object[]}} pack as the server describes it.
 * @param {(text: string) => void} propose puts an example into the prompt box.
 */
export function skillList(pack, propose) {
  return h(
    "ul",
    { class: "skills" },
    pack.skills.map(({ name, description, example }) =>
      h(
        "li",
        {},
        h(
          "div",
          { class: "head" },
          h("h3", {}, dot(name), name),
          example ? button("Example", () => propose(example), { "aria-label": `Example of ${name}` }) : null,
          button("Card", () => showCard(pack.name, name), { "aria-label": `Card of ${name}` }),
        ),
        h("p", {}, description),
      ),
    ),
  );
}

/** A few examples for an empty chat. */
export function openers(pack, propose) {
  const wanted = pack.skills.filter(({ example }) => example && example.length < 200);
  return wanted.slice(0, 4).map(({ name, example }) =>
    h(
      "button",
      { type: "button", class: "opener", onclick: () => propose(example) },
      h("b", {}, dot(name), name),
      h("span", {}, example),
    ),
  );
}

async function showCard(pack, skill) {
  const dialog = $("#card");
  const body = dialog.querySelector(".body");
  body.replaceChildren(h("p", {}, "…"));
  dialog.querySelector("h2").replaceChildren(dot(skill), skill);
  dialog.showModal();
  const path = `/v1/packs/${encodeURIComponent(pack)}/skills/${encodeURIComponent(skill)}`;
  try {
    const { card } = await (await ask(path)).json();
    body.replaceChildren(...markdown(card));
  } catch (error) {
    body.replaceChildren(h("p", { class: "wrong" }, error.message));
  }
}

/** Render the Markdown subset of cards: headings, lists, paragraphs, bold, code. */
export function markdown(text) {
  const nodes = [];
  let list = null;
  for (const line of text.split("\n")) {
    const heading = /^#{1,6} (.*)/.exec(line);
    const item = /^[-*] (.*)/.exec(line);
    if (item) {
      if (!list) nodes.push((list = h("ul")));
      list.append(h("li", {}, inline(item[1])));
    } else if (line.trim()) {
      list = null;
      if (heading && nodes.length) nodes.push(h("h3", {}, inline(heading[1])));
      else if (!heading) nodes.push(h("p", {}, inline(line))); // the first heading is the dialog's title
    }
  }
  return nodes;
}

function inline(text) {
  return text
    .split(/(`[^`]+`|\*\*[^*]+\*\*)/)
    .filter(Boolean)
    .map((part) => {
      if (/^`.+`$/.test(part)) return h("code", {}, part.slice(1, -1));
      if (/^\*\*.+\*\*$/.test(part)) return h("b", {}, part.slice(2, -2));
      return part;
    });
}
