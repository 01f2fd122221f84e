/**
 * Prompts to begin with: the operator's own, else some that suit the kind of the model.
 */

import { byId, make } from "./elements.js";

const QUESTIONS = [
  "Why is the sky blue?",
  "What is a language model? Explain it to a child.",
  "Write a Python function that reverses a string.",
];
const TEXTS = ["The capital of France is", "Once upon a time, there was", "In Python, a generator is"];
const CODE = ["def main():", "import os\n\n\ndef find_files(", "class Stack:\n    def __init__(self"];

/** @param {(prompt: string) => void} choose is called with the one that the reader wants */
export function showExamples(model, isChat, choose) {
  const prompts = examplesFor(model, isChat);
  byId("examples").hidden = prompts.length === 0;
  byId("example-list").replaceChildren(
    ...prompts.map((prompt) => {
      const button = make("button", { type: "button" }, prompt.replace(/\s+/g, " ").trim());
      button.addEventListener("click", () => choose(prompt));
      return make("li", {}, button);
    }),
  );
}

function examplesFor(model, isChat) {
  if (!model.has_text) return [];
  if (model.example_prompts?.length > 0) return model.example_prompts;
  if (isChat) return QUESTIONS;
  // Nothing else tells of code here but the name.
  return /code|python/i.test(model.id) ? CODE : TEXTS;
}
