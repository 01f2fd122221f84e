/**
 * One text: its request, its place on the page, and how it went.
 */

import { completion } from "./api.js";
import { copy } from "./clipboard.js";
import { byId } from "./elements.js";
import { Figures } from "./figures.js";
import { TokenText } from "./tokens.js";
import { Transcript } from "./transcript.js";

// As much of the prompt as reminds of what the text follows.
const PROMPT_CHARACTERS = 160;

const STATES = {
  waiting: "waiting for its turn",
  running: "running",
  stop: "complete",
  length: "token limit reached",
  stopped: "stopped",
  failed: "failed",
};

export class Run {
  /**
   * @param {HTMLElement} panes gets a pane for the run
   * @param {(run: Run, index: number|null) => void} show is told of the token to look at
   */
  constructor(panes, show) {
    const pane = byId("pane").content.firstElementChild.cloneNode(true);
    panes.append(pane);
    this.pane = pane;
    this.figures = new Figures(pane);
    this.text = new TokenText(pane.querySelector(".text"), (index) => show(this, index));
    this.heading = pane.querySelector("h2");
    this.state = pane.querySelector(".state");
    this.copyButton = pane.querySelector(".copy");
    this.copyButton.addEventListener("click", () => this.#copy());
  }

  /** Clears the pane for a text that is still to come. */
  prepare({ title, model, depths, prompt, body }) {
    Object.assign(this, { title, depths, body });
    this.transcript = new Transcript(model.has_text);
    this.heading.textContent = title;
    this.text.element.setAttribute("aria-label", `${title}: text, arrow keys move between tokens`);
    this.text.start(this.transcript, depths, tailOf(prompt, model.has_text));
    this.figures.start(depths);
    this.copyButton.disabled = true;
    this.#say("waiting");
  }

  /** Runs until the text ends, `signal` aborts it or something goes wrong. */
  async perform(signal, onTokens = () => {}) {
    this.figures.start(this.depths);
    this.#say("running");
    try {
      for await (const event of completion(this.body, signal)) {
        this.#take(event);
        onTokens();
      }
    } catch (error) {
      this.#say(error.name === "AbortError" ? "stopped" : "failed");
      throw error;
    } finally {
      this.text.paint();
      this.copyButton.disabled = this.transcript.tokens.length === 0;
    }
  }

  /** One sentence about a text that has ended. */
  get summary() {
    const { count, seconds } = this.figures;
    return `${this.title}: ${count} tokens in ${seconds.toFixed(1)} s.`;
  }

  #take(event) {
    for (const choice of event.choices) {
      const known = this.transcript.tokens.length;
      const changedFrom = this.transcript.take(choice);
      this.figures.take(this.transcript.tokens.slice(known));
      this.text.refresh(changedFrom);
      if (choice.finish_reason) this.#say(choice.finish_reason);
    }
    if (event.metrics) this.figures.finish(event.metrics);
  }

  #say(state) {
    this.state.textContent = STATES[state];
    this.pane.dataset.state = state;
  }

  async #copy() {
    const done = await copy(this.transcript.text.trimEnd());
    this.copyButton.textContent = done ? "Copied" : "Not allowed";
    setTimeout(() => (this.copyButton.textContent = "Copy text"), 1500);
  }
}

function tailOf(prompt, hasText) {
  const tail = prompt.length > PROMPT_CHARACTERS ? `…${prompt.slice(-PROMPT_CHARACTERS)}` : prompt;
  return hasText ? tail : `${tail.trimEnd()} `;
}
