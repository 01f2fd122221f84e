/**
 * What is known of one token.
 */

import { byId, make } from "./elements.js";
import { thresholdText } from "./figures.js";

// Confidences are from 0 to 1, like the threshold. Rounded down: none may look as if it reached it.
const share = (value) => (Math.floor(1000 * value + 1e-6) / 1000).toFixed(3);
const VISIBLE = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥" };

/** A token's text with its blanks made visible; of a part of a character, its bytes. */
function visible(text) {
  const bytes = /^bytes:((?:\\x[0-9a-f]{2})+)$/i.exec(text)?.[1];
  if (bytes) return `bytes ${bytes.replaceAll("\\x", " ").trim().toUpperCase()}`;
  if (text === "\ufffd") return "part of a character";
  return text.replace(/[ \n\r\t]/g, (blank) => VISIBLE[blank]) || "∅";
}

const isTouched = matchMedia("(pointer: coarse)");
// As in results.css.
const isNarrow = matchMedia("(max-width: 60rem)");

export class Inspector {
  /**
   * @param {HTMLElement} element
   * @param {object} does
   * @param {(steps: number) => void} does.step goes on to another token
   * @param {() => void} does.close puts the token away
   */
  constructor(element, { step, close }) {
    this.element = element;
    this.details = byId("token");
    byId("previous-token").addEventListener("click", () => step(-1));
    byId("next-token").addEventListener("click", () => step(1));
    byId("close-token").addEventListener("click", close);
  }

  /** Whether it lies over the page. */
  get isSheet() {
    return isNarrow.matches && !this.element.classList.contains("empty");
  }

  clear() {
    this.element.classList.add("empty");
    const how = isTouched.matches
      ? "Tap a token to see how sure each exit was of it."
      : "Point at a token, or move through the text with the arrow keys.";
    this.details.replaceChildren(make("h2", {}, "Token"), make("p", {}, how));
  }

  /**
   * @param {import("./transcript.js").Token} token
   * @param {object} place
   * @param {number} place.index of the token in its text
   * @param {import("./depths.js").Depths} place.depths
   * @param {object} place.request what the text was asked for with
   * @param {boolean} place.differs whether this is where the texts part
   */
  show(token, { index, depths, request, differs }) {
    this.element.classList.remove("empty");
    const parts = [
      make(
        "h2",
        {},
        `Token ${index + 1} `,
        make("code", { className: "token-text" }, visible(token.piece || token.token)),
        token.id === undefined ? "" : make("span", { className: "token-id" }, `id ${token.id}`),
      ),
    ];
    if (differs) {
      parts.push(make("p", { className: "differs-note" }, "≠ Here the two texts first differ."));
    }
    parts.push(facts(token, depths, request));
    if (token.heads.length > 0) parts.push(headTable(token, depths, request));
    if (token.candidates.length > 0) parts.push(candidateList(token.candidates));
    this.details.replaceChildren(...parts);
  }
}

function facts(token, depths, request) {
  const rows = [["Came from", origin(token, depths, request)]];
  if (token.confidence !== null) rows.push(["Confidence", share(token.confidence)]);
  if (token.logprob !== null) {
    rows.push(["Probability", share(Math.exp(token.logprob))]);
    rows.push(["Log-probability", token.logprob.toFixed(3)]);
  }
  const entries = rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("dl", { className: "facts" }, ...entries);
}

function origin(token, depths, request) {
  const source = depths.source(token.layer);
  const layer = token.layer > 0 ? `${source} of ${depths.numLayers}` : source;
  if (request.mode !== "self_speculative") return layer;
  return token.layer < depths.numLayers ? `${layer}, verified` : `${layer}, not the draft`;
}

/** How sure an exit has to be. */
function thresholdAt(layer, { exit_layers: layers, exit_thresholds: each, early_exit_threshold: one }) {
  return each ? each[layers.indexOf(layer)] : one;
}

/** Each head on the way, how sure it was, and in mode early exit how sure it had to be. */
function headTable(token, depths, request) {
  const hasThreshold = request.mode === "early_exit";
  const rows = token.heads.map((head) => {
    const bar = depths.paint(make("span", { className: "confidence" }), head.layer);
    bar.style.setProperty("--confidence", `${100 * head.confidence}%`);
    const isExit = head.layer < depths.numLayers;
    if (hasThreshold && isExit) {
      bar.classList.add("has-threshold");
      bar.style.setProperty("--threshold", `${100 * thresholdAt(head.layer, request)}%`);
    }
    return make(
      "tr",
      { className: head.layer === token.layer ? "chosen" : "" },
      make("th", { scope: "row" }, `${head.layer}`),
      make("td", {}, make("code", {}, visible(head.token))),
      make("td", {}, bar),
      make("td", { className: "number" }, share(head.confidence)),
    );
  });
  const scale = make("span", { className: "scale", ariaHidden: "true" }, "0", make("span", {}, "1"));
  const names = ["After layer", "Guess", scale, "Confidence"];
  const table = make(
    "table",
    {},
    make("caption", {}, "The guess after each layer that was asked"),
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows),
  );
  if (!hasThreshold) return table;
  const tick = make("span", { className: "tick-mark", ariaHidden: "true" });
  const { exit_thresholds: each, early_exit_threshold: one } = request;
  const which = each ? `the exit’s threshold (${each.map(thresholdText).join(", ")})` : `the threshold, ${thresholdText(one)}`;
  const says = `The tick is ${which}: an exit that reaches it gives the token.`;
  return make("div", {}, table, make("p", { className: "tick-says" }, tick, says));
}

function candidateList(candidates) {
  const entries = candidates.flatMap(({ token, logprob }) => [
    make("dt", {}, make("code", {}, visible(token))),
    make("dd", {}, share(Math.exp(logprob))),
  ]);
  return make(
    "div",
    {},
    make("h3", {}, "Most probable in this place"),
    make("dl", { className: "candidates" }, ...entries),
  );
}
