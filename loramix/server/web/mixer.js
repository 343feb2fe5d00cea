// One slider per skill: the user's own mix instead of the gate's.

import { button, dot, h, paint, scale } from "./dom.js";

const MAX_ACTIVE = 8; // skills in one mix

let count = 0;

/**
 * @param {string[]} skills of the pack.
 * @param {Object<string, number>} routed the gate's mix, with which the sliders start.
 * @param {(mix: Object<string, number>) => void} answer called with the chosen mix.
 */
export function mixer(skills, routed, answer) {
  const id = `mixer-${++count}`;
  const status = h("p", { class: "chosen", role: "status" });
  const rows = skills.map((name) => {
    const output = h("output", { htmlFor: `${id}-${name}` });
    const slider = h("input", { type: "range", id: `${id}-${name}`, name, min: 0, max: 2, step: 0.05 });
    slider.addEventListener("input", show);
    return { name, slider, output };
  });

  function mix() {
    const chosen = rows.map(({ name, slider }) => [name, Number(slider.value)]);
    return Object.fromEntries(chosen.filter(([, value]) => value > 0));
  }

  function show() {
    for (const { slider, output } of rows) {
      output.value = scale(Number(slider.value));
      slider.style.setProperty("--share", Number(slider.value) / slider.max);
      slider.parentNode.classList.toggle("on", Number(slider.value) > 0);
    }
    const chosen = Object.entries(mix());
    const tooMany = chosen.length > MAX_ACTIVE;
    status.textContent = tooMany
      ? `${chosen.length} skills are on; at most ${MAX_ACTIVE} can act at once.`
      : chosen.map(([name, value]) => `${name} ×${scale(value)}`).join(" + ") || "No skill: the bare base answers.";
    submit.disabled = tooMany;
  }

  function reset() {
    for (const { name, slider } of rows) slider.value = routed[name] ?? 0;
    show();
  }

  const submit = h("button", { type: "submit", class: "primary" }, "Answer with this mix");
  const form = h(
    "form",
    { class: "mixer", "aria-label": "Your own mix" },
    h("h4", {}, "Your own mix"),
    h("p", { class: "hint" }, "How strongly each skill acts: 0 is off, 1 is the trained strength."),
    h(
      "div",
      { class: "sliders" },
      rows.map(({ name, slider, output }) =>
        paint(h("div", { class: "slider" }, h("label", { htmlFor: slider.id }, dot(name), name), slider, output), name),
      ),
    ),
    h("div", { class: "row" }, submit, button("Back to the gate's mix", reset), status),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    answer(mix());
  });
  reset();
  return form;
}
