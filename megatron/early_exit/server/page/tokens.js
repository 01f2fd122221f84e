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
  /** The token that is shown on its own, until another one is or nobody looks. */
  #chosen = null;
  /** The token that the Tab key comes to. */
  #stop = 0;
  #isQuiet = false;

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
    for (const kind of ["focusin", "click"]) {
      element.addEventListener(kind, ({ target }) => this.#choose(this.#indexOf(target)));
    }
    element.addEventListener("pointerover", (event) => this.#hover(event));
    element.addEventListener("pointerleave", (event) => {
      if (event.pointerType !== "touch") this.show(this.#chosen);
    });
  }

  /** Starts anew behind a prompt. */
  start(transcript, depths, prompt) {
    clearTimeout(this.#timer);
    Object.assign(this, { transcript, depths, spans: [] });
    this.#dirtyFrom = Infinity;
    this.#timer = 0;
    this.#chosen = null;
    this.#stop = 0;
    this.marked = null;
    this.element.replaceChildren(make("span", { className: "prompt" }, prompt));
    this.element.scrollTop = 0;
  }

  /** Shows the tokens from one on as they are, soon. */
  refresh(from) {
    this.#dirtyFrom = Math.min(this.#dirtyFrom, from);
    this.#timer ||= setTimeout(() => requestAnimationFrame(() => this.paint()), PAINT_MS);
  }

  /** Marks the token where the text leaves its twin, or none. */
  markDifference(index) {
    this.marked?.classList.remove("differs");
    if (index === null) return;
    this.paint();
    this.marked = this.spans[index];
    this.marked?.classList.add("differs");
  }

  /** Goes on to the token so many places behind the one that is shown. */
  step(steps) {
    if (this.#chosen === null) return;
    this.#choose(Math.min(Math.max(0, this.#chosen + steps), this.spans.length - 1));
  }

  /** Shows no token any more; the focus comes back to where it was in the text. */
  release(focuses = true) {
    const chosen = this.spans[this.#chosen];
    chosen?.classList.remove("chosen");
    chosen?.removeAttribute("aria-describedby");
    this.#chosen = null;
    this.show(null);
    if (!focuses) return;
    this.#isQuiet = true;
    this.spans[this.#stop]?.focus({ preventScroll: true });
    this.#isQuiet = false;
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

  #hover({ target, pointerType }) {
    // A finger that comes down may be about to scroll; what it taps is chosen.
    if (pointerType === "touch") return;
    const index = this.#indexOf(target);
    if (index !== null) this.show(index);
  }

  #choose(index) {
    if (index === null || this.#isQuiet) return;
    for (const i of [this.#stop, index]) {
      this.spans[i].tabIndex = i === index ? 0 : -1;
      this.spans[i].classList.toggle("chosen", i === index);
      this.spans[i].removeAttribute("aria-describedby");
    }
    this.spans[index].setAttribute("aria-describedby", "token");
    this.#chosen = this.#stop = index;
    this.show(index);
    // Behind `show`, which may lay the token's own sheet over the foot of the page.
    this.spans[index].scrollIntoView({ block: "nearest" });
  }

  #onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || this.#indexOf(event.target) === null) return;
    const last = this.spans.length - 1;
    const target = {
      ArrowLeft: () => Math.max(0, this.#stop - 1),
      ArrowRight: () => Math.min(last, this.#stop + 1),
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
    const start = this.spans[this.#stop].getClientRects()[0];
    let best = this.#stop;
    let bestDistance = Infinity;
    let line = null;
    for (let i = this.#stop + step; this.spans[i]; i += step) {
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
