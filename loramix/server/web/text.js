// The text of an answer, token by token, each coloured by its strongest skill.

import { h, paint, percent, scale, visible } from "./dom.js";

const nobody = "base";

/** Return the strongest skill of a mix, or null for the bare base. */
function strongest(mix) {
  return Object.entries(mix).reduce((best, entry) => (best && best[1] >= entry[1] ? best : entry), null)?.[0] ?? null;
}

const named = (mix) =>
  Object.entries(mix)
    .map(([name, value]) => `${name} ${scale(value)}`)
    .join(", ") || nobody;

/** Streamed text whose tokens show their mix. */
export class TokenText {
  constructor() {
    this.node = h("p", { class: "text" });
    this.plain = "";
    this.tokens = [];
    this.steps = [{}];
    this.step = 0;
    this.tail = []; // the last bytes, since a character may span two pieces
  }

  /** Set the mixes that answer one after another. */
  begin(route) {
    this.steps = [route.mix, ...route.then];
  }

  /** Add a piece of the stream: its text, and its tokens with their bytes. */
  add(text, tokens) {
    this.plain += text;
    let pieces = decoded(tokens, this.tail);
    const fresh = decoded(tokens, []);
    if (this.step + 1 < this.steps.length && text === `\n${fresh.join("")}`) {
      this.step += 1; // the next mix answers, on a new line
      this.node.append("\n");
      this.tail = [];
      pieces = fresh;
    } else if (text !== pieces.join("")) {
      this.node.append(text); // text that does not correspond to tokens
      return;
    }
    this.tail = [...this.tail, ...tokens.flatMap(({ bytes }) => bytes)].slice(-3);
    tokens.forEach(({ logprob }, i) => this.push(pieces[i], logprob));
  }

  push(text, logprob) {
    const token = { text, p: Math.exp(logprob), node: h("span", { class: "token" }, text) };
    this.tokens.push(token);
    this.tint(token, this.steps[this.step]);
    this.node.append(token.node);
  }

  tint(token, mix) {
    const skill = strongest(mix);
    paint(token.node, skill);
    token.node.title = `‘${visible(token.text)}’ by ${named(mix)}; probability ${percent(token.p)}`;
  }

  /** Colour each token by its own mix, when the mix changed from token to token. */
  mixed(mixes) {
    this.tokens.forEach((token, i) => mixes[i] && this.tint(token, mixes[i]));
  }

  /** Colour by measured contributions: hue by the strongest skill, saturation by its contribution. */
  measured(found) {
    const totals = totalsByToken(found);
    const top = Math.max(...totals.map((row) => Math.max(...row, 0)), 1e-9);
    this.tokens.forEach((token, i) => {
      const row = totals[i];
      if (!row) return;
      const most = Math.max(...row, 0);
      paint(token.node, found.strongest[i]);
      token.node.style.setProperty("--depth", (most / top).toFixed(3));
      const parts = found.skills.map((name, k) => `${name} ${row[k].toFixed(3)}`).join(", ");
      token.node.title = `‘${visible(token.text)}’ added: ${parts || nobody}; probability ${percent(token.p)}`;
    });
  }
}

/** Decode tokens after some bytes; a character that spans several tokens belongs to the last one. */
function decoded(tokens, before) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  decoder.decode(new Uint8Array(before), { stream: true });
  return tokens.map(({ bytes }) => decoder.decode(new Uint8Array(bytes), { stream: true }));
}

/** Mean over the layers: by token, then by skill. */
export function totalsByToken({ skills, tokens, values }) {
  return tokens.map((_, t) =>
    skills.map((name) => values[name].reduce((sum, layer) => sum + layer[t], 0) / (values[name].length || 1)),
  );
}
