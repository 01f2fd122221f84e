/**
 * Errors for the reader, with what to do about them.
 */

import { apiKey, ServerError } from "./api.js";
import { byId } from "./elements.js";

export class Notice {
  #retry;

  /** @param {() => void} reload what a key is for that nothing had asked for */
  constructor(reload) {
    this.reload = this.#retry = reload;
    this.box = byId("notice");
    this.retryButton = byId("retry");
    this.keyForm = byId("key-form");
    this.keyButton = byId("key-button");
    this.retryButton.addEventListener("click", () => this.#retry());
    this.keyButton.addEventListener("click", () => this.askForKey(this.keyForm.hidden));
    this.keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(byId("key").value.trim());
      this.askForKey(false);
      this.keyButton.focus();
      this.#retry();
    });
  }

  /** Shows or hides the field for the key. */
  askForKey(asks) {
    this.keyForm.hidden = !asks;
    this.keyButton.setAttribute("aria-expanded", asks);
    if (!asks) return;
    byId("key").value = apiKey.get();
    byId("key").focus();
  }

  clear() {
    this.#retry = this.reload;
    this.box.hidden = true;
    byId("notice-text").textContent = "";
  }

  /** @param {(() => void)|null} retry what a button offers to do again */
  say(message, retry = null) {
    if (retry) this.#retry = retry;
    this.retryButton.hidden = !retry;
    this.box.hidden = false;
    byId("notice-text").textContent = message;
    this.box.scrollIntoView({ block: "nearest" });
  }

  /** Shows what went wrong. */
  showError(error, retry) {
    const isOurs = !(error instanceof ServerError);
    this.say(isOurs ? `This page made a mistake: ${error}. Reload it to go on.` : error.message, retry);
    // The form for the key is the way on then.
    this.retryButton.hidden ||= error.kind === "key";
    this.askForKey(error.kind === "key");
    if (isOurs) throw error;
  }
}
