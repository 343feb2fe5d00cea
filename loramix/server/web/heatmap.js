// Heat maps of the contributions, ‖s·BAx‖ / ‖Wx‖, by layer and token, with pointer, keyboard and table access.

import { dot, h, paint, visible } from "./dom.js";
import { totalsByToken } from "./text.js";

const CELL = { width: [13, 44], height: 7 };
const GUTTER = 30; // left margin for the layer numbers
const EDGE = 8; // top and right margin for half a number and the end of a label
const CONTRAST = 0.75; // exponent that keeps small values visible; the legend in answer.css uses the same curve
const LABELS = 74; // bottom margin for the tokens
const MAX_PIXELS = 16_000; // browsers limit the width of a canvas

/** Build the heat maps and tables of an answer, with an introduction; `label` names the answer. */
export function figures(found, label) {
  const title = h("h4", {}, `Measured contributions: ${label.toLowerCase()}`);
  const top = Math.max(...found.skills.map((name) => most(found.values[name]).value), 1e-9);
  const intro = h(
    "p",
    { class: "hint" },
    "How much each adapter added to the output of the base, ‖s·BAx‖ / ‖Wx‖, at the position of each token. ",
    "The answer above is now coloured by it. Point at a cell, or move with the arrow keys.",
  );
  return [
    title,
    intro,
    h("div", { class: "maps" }, found.skills.map((name) => figure(name, found, top))),
    table(found),
  ];
}

function most(layers) {
  let best = { value: 0, layer: 0, token: 0 };
  layers.forEach((row, layer) =>
    row.forEach((value, token) => {
      if (value > best.value) best = { value, layer, token };
    }),
  );
  return best;
}

function figure(name, { tokens, values }, top) {
  const layers = values[name];
  const peak = most(layers);
  const where = `layer ${peak.layer} at ‘${visible(tokens[peak.token])}’`;
  const label = `Contribution of ${name} in ${layers.length} layers to ${tokens.length} tokens; the maximum, ${peak.value.toFixed(3)}, is in ${where}.`;
  const canvas = h("canvas", { tabIndex: 0, role: "img", "aria-label": `${label} Arrow keys read single cells.` });
  const readout = h("output", { class: "readout" }, `maximum ${peak.value.toFixed(3)}: ${where}`);
  const legend = h("span", { class: "legend", "aria-hidden": "true" }, "0", h("i"), top.toFixed(2));
  const caption = h("figcaption", {}, dot(name), h("b", {}, name), legend, readout);
  const scroller = h("div", { class: "scroller" }, canvas);
  const node = paint(h("figure", { class: "map" }, caption, scroller), name);
  const map = new HeatMap(canvas, tokens, layers, top);

  const tell = (cell) => {
    map.cell = cell;
    map.draw();
    if (!cell) return;
    readout.value = `${layers[cell.layer][cell.token].toFixed(3)}: layer ${cell.layer} at ‘${visible(tokens[cell.token])}’`;
    canvas.title = readout.value;
  };
  const point = (event) => tell(map.at(event.offsetX, event.offsetY) ?? map.cell);
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", () => document.activeElement === canvas || tell(null));
  canvas.addEventListener("focus", () => {
    readout.setAttribute("aria-live", "polite");
    if (!map.cell) tell(peak);
  });
  canvas.addEventListener("blur", () => {
    readout.removeAttribute("aria-live");
    tell(null);
  });
  canvas.addEventListener("keydown", (event) => {
    const cell = map.moved(event.key);
    if (!cell) return;
    event.preventDefault();
    tell(cell);
    map.reveal(scroller);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map.draw());
  requestAnimationFrame(() => map.fit(scroller.clientWidth)); // after layout, when the width is known
  return node;
}

class HeatMap {
  constructor(canvas, tokens, layers, top) {
    Object.assign(this, { canvas, tokens, layers, top, cell: null, width: CELL.width[0] });
  }

  fit(room) {
    const [least, widest] = CELL.width;
    this.width = Math.min(widest, Math.max(least, Math.floor((room - GUTTER - EDGE) / this.tokens.length)));
    const size = [GUTTER + this.width * this.tokens.length + EDGE, EDGE + CELL.height * this.layers.length + LABELS];
    const ratio = Math.min(devicePixelRatio || 1, MAX_PIXELS / size[0]);
    [this.canvas.width, this.canvas.height] = size.map((value) => Math.round(value * ratio));
    [this.canvas.style.width, this.canvas.style.height] = size.map((value) => `${value}px`);
    this.context = this.canvas.getContext("2d");
    this.context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.draw();
  }

  /** Return the top left corner of a cell. */
  place(layer, token) {
    return [GUTTER + this.width * token, EDGE + CELL.height * (this.layers.length - 1 - layer)];
  }

  at(x, y) {
    const token = Math.floor((x - GUTTER) / this.width);
    const layer = this.layers.length - 1 - Math.floor((y - EDGE) / CELL.height);
    const inside = token >= 0 && token < this.tokens.length && layer >= 0 && layer < this.layers.length;
    return inside ? { layer, token } : null;
  }

  moved(key) {
    const step = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
    if (!step || !this.cell) return null;
    const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));
    return {
      layer: clamp(this.cell.layer + step[0], this.layers.length),
      token: clamp(this.cell.token + step[1], this.tokens.length),
    };
  }

  /** Scroll sideways until the cell is visible. */
  reveal(scroller) {
    const [x] = this.place(this.cell.layer, this.cell.token);
    if (x < scroller.scrollLeft + GUTTER) scroller.scrollLeft = x - GUTTER;
    const right = x + this.width - scroller.clientWidth;
    if (right > scroller.scrollLeft) scroller.scrollLeft = right;
  }

  draw() {
    const { context: c, width, layers, tokens } = this;
    if (!c) return;
    const style = getComputedStyle(this.canvas);
    const colour = (name) => style.getPropertyValue(name);
    const bottom = EDGE + CELL.height * layers.length;
    c.clearRect(0, 0, this.canvas.width, this.canvas.height);
    c.fillStyle = colour("--field");
    c.fillRect(GUTTER, EDGE, width * tokens.length, bottom - EDGE);
    c.fillStyle = colour("--c");
    layers.forEach((row, layer) =>
      row.forEach((value, token) => {
        c.globalAlpha = Math.min(1, value / this.top) ** CONTRAST;
        c.fillRect(...this.place(layer, token), width - 1, CELL.height - 1);
      }),
    );
    c.globalAlpha = 1;
    c.fillStyle = colour("--muted");
    c.font = `11px ${style.fontFamily}`;
    this.numbers(c);
    this.names(c, bottom);
    if (this.cell) {
      c.strokeStyle = colour("--ink");
      c.lineWidth = 1.5;
      const [x, y] = this.place(this.cell.layer, this.cell.token);
      c.strokeRect(x - 0.5, y - 0.5, width, CELL.height);
    }
  }

  numbers(c) {
    c.textAlign = "right";
    c.textBaseline = "middle";
    const last = this.layers.length - 1;
    for (let layer = 0; layer <= last; layer += 1) {
      const seen = layer === last || (layer % 5 === 0 && last - layer >= 2);
      if (seen) c.fillText(layer, GUTTER - 6, this.place(layer, 0)[1] + CELL.height / 2);
    }
  }

  names(c, bottom) {
    c.textAlign = "right";
    this.tokens.forEach((token, i) => {
      c.save();
      c.translate(GUTTER + this.width * (i + 0.5) + 2, bottom + 6);
      c.rotate(-Math.PI / 3);
      const text = visible(token.trim() || token);
      c.fillText(text.length > 10 ? `${text.slice(0, 9)}…` : text, 0, 0);
      c.restore();
    });
  }
}

function table(found) {
  const n = found.values[found.skills[0]].length;
  const mean = (row) => (row.length ? row.reduce((sum, value) => sum + value, 0) / row.length : 0);
  const cells = (numbers) => numbers.map((value) => h("td", {}, value.toFixed(3)));
  const names = found.skills.map((name) => h("th", { scope: "col" }, name));
  const head = (first) => h("thead", {}, h("tr", {}, h("th", { scope: "col" }, first), names.map((th) => th.cloneNode(true))));
  const totals = totalsByToken(found);
  const byToken = found.tokens.map((token, i) =>
    h("tr", {}, h("th", { scope: "row" }, visible(token)), cells(totals[i])),
  );
  const byLayer = Array.from({ length: n }, (_, layer) =>
    h("tr", {}, h("th", { scope: "row" }, layer), cells(found.skills.map((name) => mean(found.values[name][layer])))),
  );
  return h(
    "details",
    { class: "tables" },
    h("summary", {}, "The same as tables"),
    h(
      "div",
      { class: "pair" },
      h("table", {}, h("caption", {}, "By token, mean over the layers"), head("token"), h("tbody", {}, byToken)),
      h("table", {}, h("caption", {}, "By layer, mean over the tokens"), head("layer"), h("tbody", {}, byLayer)),
    ),
  );
}
