/**
 * The tokens of a text on the page: coloured spans that one can walk through.
 *
 * A text is one stop of the Tab key; arrow keys go from token to token (roving tabindex). Spans are
 * made once in a while, however many tokens came in, which keeps texts of thousands smooth.
 */

import { make } from "./elements.js";

// As often as eyes can use: each time costs a layout, and the model may run on the same machine.
const PAINT_MS = 40;

export class TokenText {
  #dirtyFrom = Infinity;
  #timer = 0;
  #chosen = null;

  /**
   * @param {HTMLElement} element holds the spans
   * @param {(index: number|null) => void} show is told of the token at the pointer, else of the
   *     one that was focused last
   */
  constructor(element, show) {
    this.element = element;
    this.show = show;
    this.spans = [];
    element.addEventListener("keydown", (event) => this.#onKey(event));
    element.addEventListener("focusin", ({ target }) => this.#choose(this.#indexOf(target)));
    element.addEventListener("pointerover", ({ target }) => this.#hover(this.#indexOf(target)));
    element.addEventListener("pointerleave", () => this.show(this.#chosen));
  }

  /** Starts anew behind a prompt. */
  start(transcript, depths, prompt) {
    clearTimeout(this.#timer);
    Object.assign(this, { transcript, depths, spans: [] });
    this.#dirtyFrom = Infinity;
    this.#timer = 0;
    this.#chosen = null;
    this.element.replaceChildren(make("span", { className: "prompt" }, prompt));
    this.element.scrollTop = 0;
  }

  /** Shows the tokens from one on as they are, soon. */
  refresh(from) {
    this.#dirtyFrom = Math.min(this.#dirtyFrom, from);
    this.#timer ||= setTimeout(() => requestAnimationFrame(() => this.paint()), PAINT_MS);
  }

  /** Marks the token where the text leaves its twin. */
  markDifference(index) {
    this.paint();
    this.spans[index]?.classList.add("differs");
  }

  /** Outlines the token at a place, and no other. */
  outline(index) {
    this.outlined?.classList.remove("twin");
    this.outlined = this.spans[index];
    this.outlined?.classList.add("twin");
  }

  /** Shows all tokens as they are now. */
  paint() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const { element, spans, transcript } = this;
    const atEnd = element.scrollHeight - element.scrollTop - element.clientHeight < 40;
    const fresh = document.createDocumentFragment();
    for (let i = this.#dirtyFrom; i < transcript.tokens.length; i += 1) {
      if (!spans[i]) {
        spans[i] = make("span", { className: "token" });
        this.depths.paint(spans[i], transcript.tokens[i].layer);
        spans[i].dataset.index = i;
        spans[i].tabIndex = i === 0 ? 0 : -1;
        fresh.append(spans[i]);
      }
      const { piece } = transcript.tokens[i];
      spans[i].textContent = piece;
      spans[i].classList.toggle("silent", piece === "");
      spans[i].classList.toggle("newline", piece.includes("\n"));
    }
    element.append(fresh);
    this.#dirtyFrom = Infinity;
    if (atEnd) element.scrollTop = element.scrollHeight;
  }

  #indexOf(target) {
    const index = target.closest(".token")?.dataset.index;
    return index === undefined ? null : Number(index);
  }

  #hover(index) {
    if (index !== null) this.show(index);
  }

  #choose(index) {
    if (index === null) return;
    for (const i of [this.#chosen ?? 0, index]) {
      this.spans[i].tabIndex = i === index ? 0 : -1;
      this.spans[i].removeAttribute("aria-describedby");
    }
    this.spans[index].setAttribute("aria-describedby", "inspector");
    this.spans[index].scrollIntoView({ block: "nearest" });
    this.#chosen = index;
    this.show(index);
  }

  #onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || this.#chosen === null) return;
    const last = this.spans.length - 1;
    const target = {
      ArrowLeft: () => Math.max(0, this.#chosen - 1),
      ArrowRight: () => Math.min(last, this.#chosen + 1),
      ArrowUp: () => this.#inNextLine(-1),
      ArrowDown: () => this.#inNextLine(1),
      Home: () => 0,
      End: () => last,
    }[event.key]?.();
    if (target === undefined) return;
    event.preventDefault();
    this.spans[target].focus();
  }

  /** The token of the line above or below that is nearest to the chosen one. */
  #inNextLine(step) {
    const start = this.spans[this.#chosen].getClientRects()[0];
    let best = this.#chosen;
    let bestDistance = Infinity;
    let line = null;
    for (let i = this.#chosen + step; this.spans[i]; i += step) {
      const box = this.spans[i].getClientRects()[0];
      if (Math.abs(box.top - start.top) < box.height / 2) continue;
      line ??= box.top;
      if (Math.abs(box.top - line) > box.height / 2) break;
      const distance = Math.abs(box.left - start.left);
      if (distance < bestDistance) [best, bestDistance] = [i, distance];
    }
    return best;
  }
}
