/**
 * A conversation, for models whose tokenizer has a chat template.
 */

import { byId, make } from "./elements.js";

export class Chat {
  #turns = [];

  /** @param {() => void} onChange is called when the form changes between conversation and text */
  constructor(onChange) {
    this.onChange = onChange;
    for (const radio of document.querySelectorAll("[name=form]")) {
      radio.addEventListener("change", onChange);
    }
    byId("new-chat").addEventListener("click", () => {
      this.clear();
      byId("prompt").focus();
    });
  }

  /** Offers conversations where a model can hold them, and then begins with one. */
  showModel(model) {
    this.isOffered = model.has_chat_template;
    byId("forms").hidden = !this.isOffered;
    this.clear();
  }

  get isOn() {
    return this.isOffered && byId("form-chat").checked;
  }

  /** What is sent for a message: the instructions, the turns before it and the message. */
  messages(message) {
    const system = byId("system").value.trim();
    return [
      ...(system ? [{ role: "system", content: system }] : []),
      ...this.#turns,
      { role: "user", content: message },
    ];
  }

  /** Goes on behind the messages of a request and the answer to them. */
  goOn(messages, answer) {
    const turns = messages.filter(({ role }) => role !== "system");
    this.#turns = [...turns, { role: "assistant", content: answer }];
    this.#show();
  }

  clear() {
    this.#turns = [];
    this.#show();
  }

  #show() {
    const names = { user: "You", assistant: "Model" };
    byId("turns").replaceChildren(
      ...this.#turns.map(({ role, content }) =>
        make("li", { className: role }, make("strong", {}, names[role]), make("p", { dir: "auto" }, content)),
      ),
    );
    byId("conversation").hidden = this.#turns.length === 0;
    byId("turns").scrollTop = byId("turns").scrollHeight;
  }
}
