// Elements, number formats and colours. External data becomes text nodes or properties, never markup.

export const $ = (selector) => document.querySelector(selector);

/** Create an element with properties, listeners (`onclick` …) and children; strings become text nodes. */
export function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export function button(text, onclick, props = {}) {
  return h("button", { type: "button", onclick, ...props }, text);
}

/** Announce a text to screen readers. */
export function announce(text) {
  $("#live").textContent = text;
}

export const percent = (p) => `${(100 * p).toFixed(p > 0 && p < 0.0995 ? 1 : 0)} %`;
export const scale = (value) => String(Math.round(100 * value) / 100);
export const count = (n, one) => `${n} ${one}${n === 1 ? "" : "s"}`;

export function duration(seconds) {
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
}

export function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** Return a token with visible spaces and line ends, for tooltips. */
export function visible(token) {
  return token.replaceAll("\n", "⏎").replaceAll(" ", "␣").replaceAll("\t", "⇥") || "∅";
}

let order = [];

/** Set the order of the skills, which determines their colours. */
export function nameSkills(names) {
  order = names;
}

/** Set the colour of a skill on an element: eight hues, and another shape beyond the eighth. */
export function paint(node, skill) {
  const place = order.indexOf(skill);
  if (place >= 0) {
    node.dataset.hue = place % 8;
    node.dataset.round = Math.min(1, Math.floor(place / 8));
  } else {
    delete node.dataset.hue;
    delete node.dataset.round;
  }
  return node;
}

export const dot = (skill) => paint(h("i", { class: "dot", "aria-hidden": "true" }), skill);
