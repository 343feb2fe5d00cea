// An answer's text, token by token, each tinted by the skill that weighs most in it.

import { h, paint, percent, scale, visible } from "./dom.js";

const nobody = "base";

/** The strongest skill of a mix, or null for the bare base. */
function strongest(mix) {
  return Object.entries(mix).reduce((best, entry) => (best && best[1] >= entry[1] ? best : entry), null)?.[0] ?? null;
}

const named = (mix) =>
  Object.entries(mix)
    .map(([name, value]) => `${name} ${scale(value)}`)
    .join(", ") || nobody;

/** Text that grows; its tokens know their mix. */
export class TokenText {
  constructor() {
    this.node = h("p", { class: "text" });
    this.plain = "";
    this.tokens = [];
    this.steps = [{}];
    this.step = 0;
    this.tail = []; // the last bytes: a character may begin in one piece and end in the next
  }

  /** The mixes that answer in turn. */
  begin(route) {
    this.steps = [route.mix, ...route.then];
  }

  /** Add a piece of the stream: its text, and its tokens with their bytes. */
  add(text, tokens) {
    this.plain += text;
    let pieces = decoded(tokens, this.tail);
    const fresh = decoded(tokens, []);
    if (this.step + 1 < this.steps.length && text === `\n${fresh.join("")}`) {
      this.step += 1; // the next mix answers, on a line of its own
      this.node.append("\n");
      this.tail = [];
      pieces = fresh;
    } else if (text !== pieces.join("")) {
      this.node.append(text); // a text that no token stands for as it is
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

  /** The mix of each token, where it changed from token to token. */
  mixed(mixes) {
    this.tokens.forEach((token, i) => mixes[i] && this.tint(token, mixes[i]));
  }

  /** Tint by what was measured: hue by the strongest skill, depth by how much it added. */
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

/** Tokens as text, behind some bytes; a character that several share stands at the last of them. */
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
