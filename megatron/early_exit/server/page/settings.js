/**
 * The controls beside the prompt.
 */

import { byId, make } from "./elements.js";
import { hasTwoDigits, thresholdText } from "./figures.js";

const MOST_STOPS = 16;
const MODES = {
  early_exit: {
    name: "Early exit",
    says: "A token leaves at the first exit that is sure enough. Faster; the text may differ.",
  },
  self_speculative: {
    name: "Lossless",
    says: "An exit or a look-ahead head drafts tokens, the full model verifies them: its very text, sooner.",
  },
  full: { name: "Full model", says: "Every token runs through all layers." },
};
const MEASURES = {
  max_probability: "the largest probability",
  margin: "the two best tokens’ distance",
  entropy: "entropy",
  similarity: "likeness to the exit before",
  gate: "a learned gate",
};
const KV_POLICIES = {
  exact: {
    name: "Computed later",
    says: "Later tokens see what the full model computes there, which is done when they need it.",
  },
  propagate: {
    name: "Left out",
    says: "Later tokens see what the exit saw. Faster still; the text may differ more.",
  },
};

const DRAFTERS = { mtp: "look-ahead head", auto: "whichever is faster" };

/** The name of a mode for the reader. */
export const modeName = (mode) => MODES[mode].name;

export class Settings {
  constructor(form) {
    this.form = form;
    const threshold = form.elements.threshold;
    threshold.addEventListener("input", () => this.#setThreshold());
    // A prompt may be typed before it is known what the model can do.
    form.addEventListener("change", () => this.model && this.#showChange());
    this.#showThreshold();
    // Where all is in one column, the answer comes right below the prompt.
    const isNarrow = matchMedia("(max-width: 60rem)");
    this.fold = byId("settings-fold");
    this.fold.open = !isNarrow.matches;
    isNarrow.addEventListener("change", () => (this.fold.open = !isNarrow.matches));
  }

  unfold() {
    this.fold.open = true;
  }

  /** Offers what a model can do. */
  showModel(model) {
    this.model = model;
    const hasExits = model.exit_layers.length > 0;
    const methods = model.draft_methods;
    const can = { full: true, early_exit: hasExits, self_speculative: methods.length > 0 };
    const modes = Object.keys(MODES).filter((mode) => can[mode]);
    const first = modes.includes(model.default_mode) ? model.default_mode : modes[0];
    byId("modes").replaceChildren(
      ...modes.map((mode) => choice("radio", "mode", mode, modeName(mode), mode === first)),
    );
    const { exit_layers: layers, default_exit_layers: asked } = model;
    byId("exits").replaceChildren(
      ...layers.map((layer) => choice("checkbox", "exit", layer, `${layer}`, asked.includes(layer))),
    );
    byId("draft-exits").replaceChildren(
      ...drafters(layers, methods).map(([drafter, name]) =>
        choice("radio", "draft-exit", drafter, name, `${drafter}` === model.drafter),
      ),
    );
    byId("exit-measure").replaceChildren(
      ...model.exit_measures.map((name) =>
        option(name, MEASURES[name] ?? name, name === model.exit_measure),
      ),
    );
    byId("kv-policies").replaceChildren(
      ...Object.entries(KV_POLICIES).map(([policy, { name }]) =>
        choice("radio", "kv-policy", policy, name, policy === model.kv_policy),
      ),
    );
    byId("no-exits").hidden = modes.length > 1;
    const { stored_rule: rule } = model;
    const isChosen = Boolean(rule?.is_default);
    byId("stored-rule").hidden = !isChosen;
    byId("stored-rule").textContent = isChosen ? `Chosen for this model: ${rule.says}.` : "";
    // The server's threshold may have more digits than the slider.
    const slider = this.form.elements.threshold;
    slider.step = hasTwoDigits(model.early_exit_threshold) ? "0.01" : "any";
    slider.value = model.early_exit_threshold;
    this.serverThresholds = model.exit_thresholds;
    this.#showThreshold();
    const field = this.form.elements["max-tokens"];
    field.max = model.max_model_len;
    // A short context has to hold the prompt, too.
    if (field.valueAsNumber >= model.max_model_len) field.value = Math.ceil(model.max_model_len / 2);
    this.#showMode();
  }

  /** Brings the reader to the control of a request's field, if there is one. */
  focus(param) {
    const names = { stop: "stop-texts", early_exit_threshold: "threshold" };
    const field = this.form.elements[names[param] ?? param.replaceAll("_", "-")];
    if (!(field instanceof HTMLElement) || !this.fold.contains(field)) return;
    this.unfold();
    field.focus({ preventScroll: true });
  }

  /** Sets what advice says. */
  change({ threshold, exits, draftExit }) {
    if (threshold !== undefined) {
      this.form.elements.threshold.value = threshold;
      this.#setThreshold();
    }
    for (const box of this.form.querySelectorAll("[name=exit]")) {
      if (exits) box.checked = exits.includes(Number(box.value));
    }
    for (const button of this.form.querySelectorAll("[name=draft-exit]")) {
      if (draftExit) button.checked = button.value === `${draftExit}`;
    }
    this.#showThreshold();
  }

  /** What the controls say now. */
  read() {
    const { elements } = this.form;
    return {
      mode: this.mode,
      threshold: elements.threshold.valueAsNumber,
      thresholds: this.#thresholds,
      exits: this.#exits,
      measure: elements["exit-measure"].value,
      kvPolicy: elements["kv-policy"].value,
      drafter: elements["draft-exit"]?.value,
      maxTokens: elements["max-tokens"].valueAsNumber,
      temperature: elements.temperature.valueAsNumber,
      topP: elements["top-p"].valueAsNumber,
      stop: stopTexts(elements["stop-texts"].value),
      seed: elements.seed.value === "" ? null : elements.seed.valueAsNumber,
      details: this.model.exit_layers.length > 0 && elements.details.checked,
      compare: this.mode !== "full" && elements.compare.checked,
    };
  }

  /** Why the settings cannot be sent; empty if they can. */
  problem() {
    const { mode, exits, stop } = this.read();
    if (stop.length > MOST_STOPS) return `Give at most ${MOST_STOPS} texts to stop at.`;
    if (mode !== "early_exit" || exits.length > 0) return "";
    return "Choose at least one exit, or the full model.";
  }

  get mode() {
    return this.form.querySelector("[name=mode]:checked").value;
  }

  /** One threshold for all exits, instead of the server's for each. */
  #setThreshold() {
    this.serverThresholds = null;
    this.#showThreshold();
  }

  get #exits() {
    const boxes = [...this.form.querySelectorAll("[name=exit]:checked")];
    return boxes.map((box) => Number(box.value));
  }

  /** The server's, one for each exit, while they hold: they are of its exits, by its measure. */
  get #thresholds() {
    if (!this.serverThresholds) return null;
    const { default_exit_layers: exits, exit_measure: measure } = this.model;
    const isTheirs =
      `${this.#exits}` === `${exits}` && this.form.elements["exit-measure"].value === measure;
    return isTheirs ? this.serverThresholds : null;
  }

  #showChange() {
    this.#showMode();
    this.#showThreshold();
  }

  #showThreshold() {
    const thresholds = this.#thresholds ?? [this.form.elements.threshold.valueAsNumber];
    byId("threshold-value").textContent = thresholds.map(thresholdText).join(", ");
  }

  #showMode() {
    const mode = this.mode;
    byId("mode-says").textContent = MODES[mode].says;
    byId("kv-policy-says").textContent = KV_POLICIES[this.form.elements["kv-policy"].value].says;
    for (const part of this.form.querySelectorAll("[data-modes]")) {
      part.hidden = !part.dataset.modes.split(" ").includes(mode);
    }
    byId("details-row").hidden = this.model.exit_layers.length === 0;
    byId("details-cost").hidden = mode !== "full";
  }
}

/** A text a line, where `\n` and `\t` stand for what cannot be typed there. */
function stopTexts(lines) {
  const blanks = { n: "\n", t: "\t", "\\": "\\" };
  return lines
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => line.replace(/\\([nt\\])/g, (_, name) => blanks[name]));
}

/** Who may draft: layers with exits, and what the server calls by names. */
function drafters(layers, methods) {
  const exits = methods.includes("exit") ? layers.map((layer) => [layer, `layer ${layer}`]) : [];
  const others = methods.filter((method) => method !== "exit");
  return [...exits, ...others.map((method) => [method, DRAFTERS[method] ?? method])];
}

function option(value, text, selected) {
  // The attribute, so that resetting a form comes back to it.
  return make("option", { value, defaultSelected: selected }, text);
}

function choice(type, name, value, text, checked) {
  const input = make("input", { type, name, value });
  // The attribute, so that resetting a form comes back to it.
  input.defaultChecked = checked;
  return make("label", { className: "choice" }, input, make("span", {}, text));
}
