/**
 * What the comparison with the full model comes to, in a line.
 */

import { make } from "./elements.js";
import { speed } from "./figures.js";

/**
 * @param {HTMLElement} element
 * @param {object} outcome
 * @param {import("./run.js").Run} outcome.run
 * @param {import("./run.js").Run} outcome.full the full model's
 * @param {number|null} outcome.difference the first token that differs
 */
export function showVerdict(element, { run, full, difference }) {
  const parts = [];
  const [fast, slow] = [run, full].map(({ figures }) => figures.tokensPerSecond);
  if (fast > 0 && slow > 0) {
    parts.push(
      make("strong", { className: "speed-up" }, `${(fast / slow).toFixed(2)}×`),
      make("span", {}, `the full model’s speed: ${speed(fast)} against ${speed(slow)} tokens/s`),
    );
  }
  parts.push(make("span", { className: "sameness" }, sameness(run, full, difference)));
  element.replaceChildren(...parts);
}

function sameness(run, full, difference) {
  const count = Math.max(run.figures.count, full.figures.count);
  if (difference === null) return `The texts are the same, all ${count} tokens.`;
  const chance = run.body.temperature > 0 ? " Sampled texts also differ by chance." : "";
  return `The texts first differ at token ${difference + 1} of ${count}, marked ≠.${chance}`;
}
