/**
 * The statistics of one text, while it comes and after.
 */

import { make } from "./elements.js";

const number = (value, digits) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });

/** A speed with about three digits. */
export const speed = (value) => number(value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0);

/** Whether a number is what its first two digits behind the point say. */
export const hasTwoDigits = (value) => Number(value.toFixed(2)) === value;

/** A threshold with two digits, or four where it has more. */
export const thresholdText = (value) => value.toFixed(hasTwoDigits(value) ? 2 : 4);

const duration = (seconds) =>
  seconds < 1 ? `${number(1000 * seconds, 0)} ms` : `${number(seconds, 2)} s`;

// Figures are for reading: oftener would only take time from the model, which may run beside.
const UPDATE_MS = 150;

export class Figures {
  #timer = 0;

  /** @param {HTMLElement} element has a child for each figure, named by data-figure */
  constructor(element) {
    this.parts = Object.fromEntries(
      [...element.querySelectorAll("[data-figure]")].map((part) => [part.dataset.figure, part]),
    );
  }

  start(depths) {
    Object.assign(this, { depths, startedAt: performance.now(), count: 0, metrics: null });
    this.layers = new Map(depths.layers.map((layer) => [layer, 0]));
    this.firstAt = this.lastAt = null;
    this.#show();
  }

  /** Counts tokens that have just come. */
  take(tokens) {
    if (tokens.length === 0) return;
    this.lastAt = performance.now();
    if (this.firstAt === null) {
      this.firstAt = this.lastAt;
      // Tokens that come with the first one took none of the time behind it.
      this.inFirst = tokens.length;
    }
    this.count += tokens.length;
    for (const { layer } of tokens) this.layers.set(layer, (this.layers.get(layer) ?? 0) + 1);
    this.#timer ||= setTimeout(() => this.#show(), UPDATE_MS);
  }

  /** Takes the server's own measurements, which know nothing of the way here. */
  finish(metrics) {
    this.metrics = metrics;
    this.#show();
  }

  /** Tokens a second behind the first one: the server's figure once it is known. */
  get tokensPerSecond() {
    if (this.metrics) return this.metrics.tokens_per_second;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return seconds > 0 ? (this.count - this.inFirst) / seconds : null;
  }

  get seconds() {
    return ((this.lastAt ?? this.startedAt) - this.startedAt) / 1000;
  }

  #show() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const rate = this.tokensPerSecond;
    const first = this.firstAt === null ? null : (this.firstAt - this.startedAt) / 1000;
    this.#set("speed", rate ? speed(rate) : null);
    this.#set("first", first === null ? null : duration(first));
    this.#set("depth", this.count > 0 ? number(this.#meanDepth(), 1) : null);
    this.#set("tokens", number(this.count, 0));
    this.parts.layers.textContent = `of ${this.depths.numLayers} layers`;
    this.#showShares();
    this.#showDrafting();
  }

  #set(name, text) {
    this.parts[name].textContent = text ?? "–";
  }

  #meanDepth() {
    let sum = 0;
    for (const [layer, count] of this.layers) sum += layer * count;
    return sum / this.count;
  }

  #showShares() {
    const shares = [...this.layers].filter(([, count]) => count > 0);
    const { bar, shares: list } = this.parts;
    bar.replaceChildren(
      ...shares.map(([layer, count]) => {
        const part = this.depths.paint(make("span"), layer);
        part.style.setProperty("flex-grow", count);
        return part;
      }),
    );
    const percent = (count) => `${number((100 * count) / this.count, 0)} %`;
    list.replaceChildren(
      ...shares.map(([layer, count]) => {
        const swatch = this.depths.paint(make("span", { className: "swatch" }), layer);
        return make("li", {}, swatch, `${this.depths.source(layer)}: ${percent(count)}`);
      }),
    );
  }

  #showDrafting() {
    let remark = "";
    const drafting = this.metrics?.speculative_decoding;
    if (drafting?.num_draft_tokens > 0) {
      const share = number(100 * drafting.draft_acceptance_rate, 0);
      const length = number(drafting.mean_acceptance_length, 2);
      remark = `${share} % of drafts accepted, ${length} tokens a verification.`;
    }
    this.parts.drafting.textContent = remark;
  }
}
