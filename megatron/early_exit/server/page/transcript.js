/**
 * A text as its tokens: what the stream told of each of them.
 */

/**
 * @typedef {object} Token
 * @property {string} piece what the token adds to the text
 * @property {string} token the token as the tokenizer writes it
 * @property {number|undefined} id
 * @property {number|null} layer the layer that the token left at
 * @property {number|null} confidence
 * @property {number|null} logprob
 * @property {{token: string, logprob: number}[]} candidates the most probable tokens in its place
 * @property {{layer: number, token: string, confidence: number}[]} heads
 */

export class Transcript {
  // The server's offsets count code points, which those of JavaScript strings do not.
  #codePoints = [];
  #offsets = [];
  #shown = 0;

  /** @param {boolean} hasText false for a model whose tokens are numbers alone */
  constructor(hasText) {
    this.hasText = hasText;
    /** @type {Token[]} */
    this.tokens = [];
  }

  get text() {
    return this.tokens.map((token) => token.piece).join("");
  }

  /** Takes what an event tells of the text, and gives the index of the first token it changed. */
  take({ text, logprobs, token_ids: ids }) {
    let first = this.tokens.length;
    for (const codePoint of text ?? "") this.#codePoints.push(codePoint);
    logprobs?.tokens.forEach((token, i) => {
      this.#offsets.push(logprobs.text_offset[i]);
      this.tokens.push(this.#record(logprobs, i, ids?.[i]));
    });
    if (!this.hasText) return first;
    // Text may come behind its tokens: it is held back while it may be part of a stop string.
    first = Math.max(0, first - 1);
    while (first > 0 && this.#end(first - 1) > this.#shown) first -= 1;
    for (let i = first; i < this.tokens.length; i += 1) {
      this.tokens[i].piece = this.#codePoints.slice(this.#start(i), this.#end(i)).join("");
    }
    this.#shown = this.#codePoints.length;
    return first;
  }

  #start(i) {
    return this.#offsets[i] - this.#offsets[0];
  }

  #end(i) {
    return i + 1 < this.#offsets.length ? this.#start(i + 1) : this.#codePoints.length;
  }

  #record(logprobs, i, id) {
    const token = logprobs.tokens[i];
    return {
      piece: this.hasText ? "" : `${id ?? token} `,
      token: this.hasText ? token : String(id ?? token),
      id,
      layer: logprobs.exit_layers[i],
      confidence: logprobs.confidences[i],
      logprob: logprobs.token_logprobs[i],
      candidates: candidatesOf(logprobs.top_logprobs[i] ?? []),
      heads: logprobs.heads?.[i] ?? [],
    };
  }
}

/** The most probable first: objects of JavaScript put keys that look like numbers first. */
function candidatesOf(best) {
  const pairs = Array.isArray(best) ? best.map((one) => [one.token, one.logprob]) : Object.entries(best);
  return pairs
    .map(([token, logprob]) => ({ token, logprob }))
    .sort((a, b) => b.logprob - a.logprob);
}
