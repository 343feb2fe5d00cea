// The panel next to an answer: the mix, the reason, the gate's probabilities and words, and the timings.

import { count, dot, duration, h, paint, percent, scale, sentence } from "./dom.js";

const SHOWN = 5; // bars, in addition to those of the skills that answer
const LEAST = 0.005;

/** Show the mix as chips: “summarize 1 → sentiment 1”. */
export function chips(route) {
  const steps = [route.mix, ...route.then];
  const parts = steps.flatMap((mix, i) => [
    i ? h("span", { class: "then" }, "then") : null,
    ...Object.entries(mix).map(([name, value]) =>
      h("span", { class: "chip" }, dot(name), name, h("span", { class: "number" }, `×${scale(value)}`)),
    ),
    Object.keys(mix).length ? null : h("span", { class: "chip" }, dot("base"), "base"),
  ]);
  return h("p", { class: "chips" }, parts);
}

/** Show the gate's probabilities as bars, or the scales of a fixed mix. */
export function bars(route) {
  const chosen = new Set([route.mix, ...route.then].flatMap((mix) => Object.keys(mix)));
  if (!chosen.size) chosen.add("base");
  const chances = Object.entries(route.probabilities).sort((a, b) => b[1] - a[1]);
  if (!chances.length) {
    const scales = Object.entries(route.mix);
    if (!scales.length) return null;
    const top = Math.max(1, ...scales.map(([, value]) => value));
    return list("Scale of each skill", scales.map(([name, value]) => bar(name, value / top, scale(value), true)));
  }
  const shown = chances.filter(([name, p], i) => chosen.has(name) || (i < SHOWN && p >= LEAST));
  const rest = chances.length - shown.length;
  const rows = shown.map(([name, p]) => bar(name, p, percent(p), chosen.has(name)));
  if (rest) {
    const next = chances.find((chance) => !shown.includes(chance))[1];
    rows.push(h("li", { class: "rest" }, `${rest} more, each ${percent(next)} or less`));
  }
  return list("The gate's probabilities", rows);
}

/** Show the words that the gate looked at, with their share of its attention; null if there are none. */
export function looked(route) {
  const words = route.words ?? [];
  if (!words.length) return null;
  return list("Words the gate looked at", words.map(({ word, weight }) => bar(word, weight, percent(weight), false)));
}

function list(title, rows) {
  return h("div", { class: "bars" }, h("h4", {}, title), h("ul", {}, rows));
}

function bar(name, share, text, chosen) {
  const fill = h("span", { class: "fill" });
  fill.style.setProperty("--share", share.toFixed(4));
  return paint(
    h(
      "li",
      { class: chosen ? "bar chosen" : "bar" },
      h("span", { class: "name" }, name),
      h("span", { class: "track", "aria-hidden": "true" }, fill),
      h("span", { class: "number" }, text, chosen ? h("span", { class: "unseen" }, ", answers") : null),
    ),
    chosen ? name : null,
  );
}

/** Show the probabilities of the labels as bars, for each label skill that answered. */
export function labels(report) {
  const steps = (report.step_labels ?? [report.labels ?? {}]).map((found) => Object.entries(found));
  return steps.filter((found) => found.length).map((found) => {
    const sorted = found.sort((a, b) => b[1] - a[1]);
    const shown = sorted.filter(([, p], i) => i < SHOWN && (i < 2 || p >= LEAST));
    const rows = shown.map(([name, p], i) => bar(name, p, percent(p), !i));
    const next = sorted[shown.length];
    if (next) rows.push(h("li", { class: "rest" }, `${sorted.length - shown.length} more, each ${percent(next[1])} or less`));
    return list("Probability of each label", rows);
  });
}

/** Show the router's reason; the user's own mix has none. */
export function why(route) {
  const own = route.policy === "fixed";
  return h("p", { class: "why" }, own ? "You set this mix; the gate was not used." : sentence(route.reason));
}

/** Show the steps of a plan: which skill works on which part of the message; null without a plan. */
export function steps(route, message) {
  if (!route.steps?.length) return null;
  const characters = Array.from(message);
  const rows = route.steps.map(({ skill, on, text }, i) => {
    const part = text ? characters.slice(...text).join("") : null;
    const what = on === "answer" ? `on answer ${i}` : `on “${part.length > 60 ? `${part.slice(0, 35)} … ${part.slice(-20)}` : part}”`;
    return h("li", {}, dot(skill), skill, " ", h("span", { class: "on" }, what));
  });
  return h("div", { class: "steps" }, h("h4", {}, "Steps"), h("ol", {}, rows));
}

/** Show the times of routing, first token and total, and the speed. */
export function timings({ timings: t, labels }, usage) {
  const routing = (t.features ?? 0) + (t.gate ?? 0);
  const said = usage?.completion_tokens ?? 0;
  const rows = [
    t.queue >= 0.005 ? ["queue", duration(t.queue)] : null,
    routing ? ["route", duration(routing)] : null,
    ["first token", duration(t.first_token)],
    ["total", duration(t.total)],
    said > 1 && !labels ? ["speed", `${((said - 1) / (t.total - t.first_token)).toFixed(0)} tokens/s`] : null,
    usage ? ["prompt", count(usage.prompt_tokens, "token")] : null,
    usage ? ["answer", count(said, "token")] : null,
  ];
  return h(
    "dl",
    { class: "timings" },
    rows.filter(Boolean).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))),
  );
}
