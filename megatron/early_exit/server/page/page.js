/**
 * The page: a prompt and settings go in, one text or two come out.
 */

import { addressOf, apiKey, servedModels } from "./api.js";
import { copy } from "./clipboard.js";
import { Comparison } from "./comparison.js";
import { Depths } from "./depths.js";
import { byId, make } from "./elements.js";
import { Inspector } from "./inspector.js";
import { Notice } from "./notice.js";
import { curlCommand, fullModelBody, promptProblem, requestBody } from "./request.js";
import { Run } from "./run.js";
import { modeName, Settings } from "./settings.js";
import { showVerdict } from "./verdict.js";

const form = byId("request");
const promptField = byId("prompt");
const settings = new Settings(form);
const inspector = new Inspector(byId("inspector"));
const notice = new Notice(loadModels);
const run = new Run(byId("panes"), showToken);
const twin = new Run(byId("panes"), showToken);

let models = [];
let model = null;
let depths = null;
let difference = null;
let transfer = null;

async function loadModels() {
  notice.clear();
  try {
    models = await servedModels();
  } catch (error) {
    notice.showError(error, true);
    return;
  }
  const kept = model?.id;
  byId("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  byId("model").disabled = models.length < 2;
  if (models.some(({ id }) => id === kept)) byId("model").value = kept;
  if (models.length > 0) showModel();
  else notice.say("The server serves no model.", true);
}

function showModel() {
  const chosen = models.find(({ id }) => id === byId("model").value);
  // A key given on the way must not undo the settings.
  if (chosen.id === model?.id) return;
  model = chosen;
  depths = new Depths(model.exit_layers, model.num_layers);
  settings.showModel(model);
  byId("models").hidden = byId("settings").hidden = false;
  depths.showLegend(byId("legend"));
  const exits = model.exit_layers.length > 0 ? `exits after ${model.exit_layers.join(", ")}` : "no exits";
  const context = model.max_model_len.toLocaleString("en");
  byId("model-facts").textContent = `${model.num_layers} layers · ${exits} · context ${context}`;
  byId("prompt-label").textContent = model.has_text ? "Prompt" : "Prompt, as token ids";
  promptField.placeholder = model.has_text ? "The three laws of robotics are" : "12 7 301";
  byId("results").hidden = true;
  inspector.clear();
  showBusy();
}

/** The body that the controls ask for, or null after saying why there is none. */
function bodyOfControls() {
  if (!model || !form.reportValidity()) return null;
  const prompt = promptField.value;
  const problem = promptProblem(model, prompt) || settings.problem();
  if (problem === "") return requestBody(model, settings.read(), prompt);
  notice.say(problem);
  if (promptProblem(model, prompt)) promptField.focus();
  return null;
}

async function generate() {
  if (transfer) return;
  notice.clear();
  const body = bodyOfControls();
  if (!body) return;
  const compares = settings.read().compare;
  // Only with the same seed can sampled texts be compared at all.
  if (compares && body.temperature > 0) body.seed ??= Math.floor(Math.random() * 2 ** 31);
  transfer = new AbortController();
  prepare(body, compares);
  showBusy();
  try {
    announce(`Generating: ${run.title}.`);
    await run.perform(transfer.signal);
    if (compares) await compare(transfer.signal);
    announce(`Finished. ${run.summary}${compares ? ` ${twin.summary}` : ""}`);
  } catch (error) {
    const isStopped = error.name === "AbortError";
    announce(isStopped ? `Stopped. ${run.summary}` : "");
    if (!isStopped) notice.showError(error);
  } finally {
    transfer = null;
    showBusy();
  }
}

function prepare(body, compares) {
  difference = null;
  inspector.clear();
  byId("results").hidden = false;
  byId("verdict").replaceChildren();
  byId("panes").classList.toggle("two", compares);
  twin.pane.hidden = !compares;
  const common = { model, depths, prompt: promptField.value };
  run.prepare({ ...common, title: modeName(body.mode), body });
  if (compares) twin.prepare({ ...common, title: modeName("full"), body: fullModelBody(body) });
  const isBelow = byId("results").getBoundingClientRect().top > 0.75 * window.innerHeight;
  if (isBelow) byId("results").scrollIntoView();
}

/** Runs the full model behind the other run, so that each has the machine to itself. */
async function compare(signal) {
  announce(`${run.summary} Now the full model.`);
  const comparison = new Comparison(run.transcript, twin.transcript);
  await twin.perform(signal, () => markDifference(comparison.update()));
  markDifference(comparison.finish());
  showVerdict(byId("verdict"), { run, full: twin, difference });
}

function markDifference(index) {
  if (index === null || difference !== null) return;
  difference = index;
  for (const { text } of [run, twin]) text.markDifference(index);
}

function showToken(owner, index) {
  const other = owner === run ? twin : run;
  if (!twin.pane.hidden) other.text.outline(index);
  if (index === null) inspector.clear();
  else {
    inspector.show(owner.transcript.tokens[index], {
      index,
      depths,
      request: owner.body,
      differs: index === difference,
    });
  }
}

function showBusy() {
  // Not `disabled`, which would take the focus away from under the reader's fingers.
  byId("generate").setAttribute("aria-disabled", transfer !== null || model === null);
  byId("stop").setAttribute("aria-disabled", transfer === null);
  byId("model").inert = transfer !== null;
}

/** Tells screen readers, and everybody below the buttons. */
function announce(text) {
  byId("status").textContent = text;
}

async function copyCommand() {
  const body = bodyOfControls();
  if (!body) return;
  const command = curlCommand(addressOf("v1/completions"), body, apiKey.get() !== "");
  announce((await copy(command)) ? "Copied the command." : "The browser does not allow copying.");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
byId("stop").addEventListener("click", () => transfer?.abort());
byId("curl").addEventListener("click", copyCommand);
byId("model").addEventListener("change", showModel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") transfer?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});

if (navigator.platform.startsWith("Mac")) byId("shortcut").textContent = "⌘ ⏎";
inspector.clear();
showBusy();
loadModels();
