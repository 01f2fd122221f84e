/**
 * What is known of one token.
 */

import { make } from "./elements.js";

const percent = (share) => `${(100 * share).toFixed(1)} %`;
const VISIBLE = { " ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥" };

/** A token's text with its blanks made visible. */
const visible = (text) => text.replace(/[ \n\r\t]/g, (blank) => VISIBLE[blank]) || "∅";

export class Inspector {
  constructor(element) {
    this.element = element;
  }

  clear() {
    this.element.classList.add("empty");
    this.element.replaceChildren(
      make("h2", {}, "Token"),
      make("p", {}, "Point at a token, or move through the text with the arrow keys."),
    );
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
    this.element.replaceChildren(...parts);
  }
}

function facts(token, depths, request) {
  const rows = [["Came from", origin(token, depths, request)]];
  if (token.confidence !== null) rows.push(["Confidence", percent(token.confidence)]);
  if (token.logprob !== null) {
    const probability = percent(Math.exp(token.logprob));
    rows.push(["Log-probability", `${token.logprob.toFixed(3)} (${probability})`]);
  }
  const entries = rows.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
  return make("dl", { className: "facts" }, ...entries);
}

function origin(token, depths, request) {
  const layer = `layer ${token.layer} of ${depths.numLayers}`;
  if (request.mode !== "self_speculative") return layer;
  return token.layer < depths.numLayers ? `${layer}, verified` : `${layer}, not the draft`;
}

/** Each head on the way, how sure it was, and in mode early exit how sure it had to be. */
function headTable(token, depths, request) {
  const rows = token.heads.map((head) => {
    const bar = depths.paint(make("span", { className: "confidence" }), head.layer);
    bar.style.setProperty("--confidence", percent(head.confidence).replace(" ", ""));
    const isExit = head.layer < depths.numLayers;
    if (request.mode === "early_exit" && isExit) {
      bar.classList.add("has-threshold");
      bar.style.setProperty("--threshold", `${100 * request.early_exit_threshold}%`);
    }
    return make(
      "tr",
      { className: head.layer === token.layer ? "chosen" : "" },
      make("th", { scope: "row" }, `${head.layer}`),
      make("td", {}, make("code", {}, visible(head.token))),
      make("td", {}, bar),
      make("td", { className: "number" }, percent(head.confidence)),
    );
  });
  const names = ["Layer", "Best token", "", "Sure"];
  return make(
    "table",
    {},
    make("caption", {}, "What each head found best"),
    make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows),
  );
}

function candidateList(candidates) {
  const entries = candidates.flatMap(({ token, logprob }) => [
    make("dt", {}, make("code", {}, visible(token))),
    make("dd", {}, percent(Math.exp(logprob))),
  ]);
  return make(
    "div",
    {},
    make("h3", {}, "Most probable in this place"),
    make("dl", { className: "candidates" }, ...entries),
  );
}
