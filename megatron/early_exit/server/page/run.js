/**
 * One text: its request, its place on the page, and how it went.
 */

import { answerTo } from "./api.js";
import { ChatEvents } from "./chat_events.js";
import { copy } from "./clipboard.js";
import { byId } from "./elements.js";
import { Figures } from "./figures.js";
import { TokenText } from "./tokens.js";
import { Transcript } from "./transcript.js";

// As much of the prompt as reminds of what the text follows.
const PROMPT_CHARACTERS = 160;

const STATES = {
  waiting: "waiting for its turn",
  asked: "waiting for the first token",
  running: "running",
  stop: "complete",
  length: "token limit reached",
  stopped: "stopped",
  failed: "failed",
  skipped: "not asked",
};

export class Run {
  /**
   * @param {HTMLElement} panes gets a pane for the run
   * @param {(run: Run, index: number|null) => void} show is told of the token to look at
   * @param {(turn: {body: object, answer: string}) => void} reply is told of the request and the
   *     answer that the reader wants to reply to
   */
  constructor(panes, show, reply) {
    const pane = byId("pane").content.firstElementChild.cloneNode(true);
    panes.append(pane);
    this.pane = pane;
    this.figures = new Figures(pane);
    this.text = new TokenText(pane.querySelector(".text"), (index) => show(this, index));
    this.heading = pane.querySelector("h2");
    this.state = pane.querySelector(".state");
    this.copyButton = pane.querySelector(".copy");
    this.copyButton.addEventListener("click", () => this.#copy());
    this.replyButton = pane.querySelector(".reply");
    this.replyButton.addEventListener("click", () =>
      reply({ body: this.body, answer: this.transcript.text.trim() }),
    );
    this.outcome = pane.querySelector(".outcome");
  }

  /** Clears the pane for a text that is still to come. */
  prepare({ title, model, depths, prompt, body }) {
    Object.assign(this, { title, model, depths, prompt, body });
    this.heading.textContent = title;
    this.text.element.setAttribute("aria-label", `${title}: text, arrow keys move between tokens`);
    this.#clear();
    this.#say("waiting");
  }

  #clear() {
    this.chatEvents = this.body.messages ? new ChatEvents() : null;
    this.transcript = new Transcript(this.model.has_text);
    this.text.start(this.transcript, this.depths, tailOf(this.prompt, this.model.has_text, this.body));
    this.figures.start(this.depths);
    this.copyButton.disabled = true;
    this.replyButton.hidden = true;
    this.outcome.textContent = "";
  }

  /** Runs, from the beginning, until the text ends, `signal` aborts it or something goes wrong. */
  async perform(signal, onTokens = () => {}) {
    this.#clear();
    this.#say("asked");
    try {
      for await (const event of answerTo(this.body, signal)) {
        this.#take(event);
        onTokens();
      }
    } catch (error) {
      const isStopped = error.name === "AbortError";
      this.#say(isStopped ? "stopped" : "failed", isStopped ? "" : error.message);
      throw error;
    } finally {
      this.text.paint();
      this.copyButton.disabled = this.transcript.tokens.length === 0;
      this.replyButton.hidden = !this.body.messages || this.copyButton.disabled;
    }
  }

  /** Does not run, for the reason that a sentence tells. */
  skip(sentence) {
    this.#say("skipped", sentence);
  }

  /** One sentence about a text that has ended. */
  get summary() {
    const { count, seconds } = this.figures;
    return `${this.title}: ${count} tokens in ${seconds.toFixed(1)} s.`;
  }

  #take(event) {
    for (const given of event.choices) {
      const choice = this.chatEvents?.choice(given) ?? given;
      const known = this.transcript.tokens.length;
      const changedFrom = this.transcript.take(choice);
      this.figures.take(this.transcript.tokens.slice(known));
      this.text.refresh(changedFrom);
      if (this.pane.dataset.state === "asked" && this.transcript.tokens.length > 0) this.#say("running");
      if (choice.finish_reason) this.#say(choice.finish_reason);
    }
    if (event.metrics) this.figures.finish(event.metrics);
  }

  #say(state, sentence = "") {
    this.state.textContent = STATES[state];
    this.pane.dataset.state = state;
    this.outcome.textContent = sentence;
  }

  async #copy() {
    const done = await copy(this.transcript.text.trimEnd());
    this.copyButton.textContent = done ? "Copied" : "Not allowed";
    setTimeout(() => (this.copyButton.textContent = "Copy text"), 1500);
  }
}

function tailOf(prompt, hasText, { messages }) {
  const characters = [...prompt];
  const tail =
    characters.length > PROMPT_CHARACTERS ? `…${characters.slice(-PROMPT_CHARACTERS).join("")}` : prompt;
  // An answer stands by itself, a text goes on.
  if (messages) return `${tail.trimEnd()}\n`;
  return hasText ? tail : `${tail.trimEnd()} `;
}
