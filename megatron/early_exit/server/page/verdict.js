/**
 * What came of it, in a line: the comparison with the full model, and advice where exits saved
 * nothing.
 */

import { adviceOn } from "./advice.js";
import { byId, make } from "./elements.js";
import { speed } from "./figures.js";

// Smaller differences are those of two runs of the same.
const NOISE = 0.02;

export class Verdict {
  #action = null;
  #isFirst = true;

  /** @param {(changes: object) => void} askAgain is called with settings to change before */
  constructor(askAgain) {
    this.button = byId("take-advice");
    this.button.addEventListener("click", () => askAgain(this.#action.changes));
    this.clear();
  }

  clear() {
    byId("verdict").replaceChildren();
    this.#advise(null);
  }

  /**
   * Judges an answer.
   *
   * @param {import("./run.js").Run} run
   * @param {import("./run.js").Run|null} full the full model's, if it was asked
   * @param {number|null} difference the first token that differs
   */
  show(run, full, difference) {
    const ratio = full === null ? NaN : run.figures.tokensPerSecond / full.figures.tokensPerSecond;
    const isKnown = Number.isFinite(ratio) && ratio > 0;
    const parts = isKnown ? speeds(ratio, run, full) : [];
    if (full) parts.push(make("span", { className: "sameness" }, sameness(run, full, difference)));
    byId("verdict").replaceChildren(...parts);
    const isSlow = isKnown ? ratio < 1 + NOISE : null;
    this.#advise(adviceOn({ run, isSlow, isFirst: this.#isFirst }));
    this.#isFirst = false;
  }

  #advise(advice) {
    byId("advice").hidden = advice === null;
    byId("advice-text").textContent = advice?.reasons.join(" ") ?? "";
    this.#action = advice?.action ?? null;
    this.button.hidden = this.#action === null;
    this.button.textContent = this.#action?.label ?? "";
  }
}

function speeds(ratio, run, full) {
  const [own, whole] = [run, full].map(({ figures }) => speed(figures.tokensPerSecond));
  const figures = `${own} against ${whole} tokens/s`;
  if (ratio > 1 + NOISE) {
    return [
      make("strong", { className: "speed-up" }, `${ratio.toFixed(2)}×`),
      make("span", {}, `the full model’s speed: ${figures}.`),
    ];
  }
  const words = ratio < 1 - NOISE ? "Slower than the full model" : "About as fast as the full model";
  return [make("span", { className: "slow" }, `${words}: ${figures} (${ratio.toFixed(2)}×).`)];
}

function sameness(run, full, difference) {
  const count = Math.max(run.figures.count, full.figures.count);
  if (difference === null) return `The texts are the same, all ${count} tokens.`;
  const chance = run.body.temperature > 0 ? " Sampled texts also differ by chance." : "";
  return `The texts first differ at token ${difference + 1} of ${count}, marked ≠.${chance}`;
}
