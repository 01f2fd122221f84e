/**
 * Errors for the reader, with what to do about them.
 */

import { apiKey, ServerError } from "./api.js";
import { byId } from "./elements.js";

export class Notice {
  /** @param {() => void} retry is called when the reader gave a key or asks to try again */
  constructor(retry) {
    this.retryButton = byId("retry");
    this.keyForm = byId("key-form");
    this.keyButton = byId("key-button");
    this.retryButton.addEventListener("click", retry);
    this.keyButton.addEventListener("click", () => this.askForKey(this.keyForm.hidden));
    this.keyForm.addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(byId("key").value.trim());
      this.askForKey(false);
      this.keyButton.focus();
      retry();
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
    byId("notice").hidden = true;
    byId("notice-text").textContent = "";
  }

  say(message, canRetry = false) {
    byId("notice").hidden = false;
    byId("notice-text").textContent = message;
    this.retryButton.hidden = !canRetry;
  }

  /** Shows what went wrong. */
  showError(error, canRetry = false) {
    const isOurs = !(error instanceof ServerError);
    this.say(isOurs ? `This page made a mistake: ${error}` : error.message, canRetry && error.kind !== "key");
    if (isOurs) throw error;
    this.askForKey(error.kind === "key");
  }
}
