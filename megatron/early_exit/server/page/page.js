/**
 * The page: a prompt and settings go in, one text or two come out.
 */

import { addressOf, apiKey, pathOf, servedModels } from "./api.js";
import { Chat } from "./chat.js";
import { copy } from "./clipboard.js";
import { Comparison } from "./comparison.js";
import { Depths } from "./depths.js";
import { byId, make } from "./elements.js";
import { showExamples } from "./examples.js";
import { Inspector } from "./inspector.js";
import { Notice } from "./notice.js";
import { curlCommand, fullModelBody, promptProblem, requestBody } from "./request.js";
import { Run } from "./run.js";
import { modeName, Settings } from "./settings.js";
import { Verdict } from "./verdict.js";

const form = byId("request");
const promptField = byId("prompt");
const settings = new Settings(form);
const chat = new Chat(showForm);
const inspector = new Inspector(byId("inspector"), {
  step: (steps) => shown?.text.step(steps),
  close: () => shown?.text.release(),
});
const notice = new Notice(loadModels);
const verdict = new Verdict((changes) => {
  settings.change(changes);
  generate();
});
const onReply = ({ body, answer }) => {
  chat.goOn(body.messages, answer);
  promptField.value = "";
  promptField.focus();
};
const run = new Run(byId("panes"), showToken, onReply);
const twin = new Run(byId("panes"), showToken, onReply);

let models = [];
let model = null;
let depths = null;
let difference = null;
let transfer = null;
/** The run whose token is looked at. */
let shown = null;

/** Asks what is served; `again` is what a retry does. */
async function loadModels(again = loadModels) {
  notice.clear();
  try {
    models = await servedModels();
  } catch (error) {
    notice.showError(error, () => again());
    return;
  }
  const kept = model?.id;
  byId("model").replaceChildren(...models.map(({ id }) => make("option", { value: id }, id)));
  byId("model").disabled = models.length < 2;
  if (models.some(({ id }) => id === kept)) byId("model").value = kept;
  if (models.length > 0) showModel();
  else notice.say("The server serves no model.", () => again());
}

function showModel() {
  const chosen = models.find(({ id }) => id === byId("model").value);
  // A key given on the way must not undo the settings.
  if (chosen.id === model?.id) return;
  model = chosen;
  depths = new Depths(model);
  settings.showModel(model);
  chat.showModel(model);
  byId("models").hidden = byId("settings-fold").hidden = false;
  depths.showLegend(byId("legend"));
  const exits = model.exit_layers.length > 0 ? `exits after ${model.exit_layers.join(", ")}` : "no exits";
  const context = model.max_model_len.toLocaleString("en");
  byId("model-facts").textContent = `${model.num_layers} layers · ${exits} · context ${context}`;
  showForm();
  hideResults();
  showBusy();
}

/** A conversation, a text to go on with, or token ids. */
function showForm() {
  byId("chat").hidden = !chat.isOn;
  const [label, placeholder] = chat.isOn
    ? ["Message", "Ask something"]
    : model.has_text
      ? ["Prompt", "A text that the model goes on with"]
      : ["Prompt, as token ids", "12 7 301"];
  byId("prompt-label").textContent = label;
  promptField.placeholder = placeholder;
  showExamples(model, chat.isOn, (prompt) => {
    if (transfer) return;
    promptField.value = prompt;
    generate();
  });
}

/** The body that the controls ask for, or null after saying why there is none. */
function bodyOfControls() {
  if (!model) return null;
  // A field that is folded away could not say what is wrong with it.
  if (!form.checkValidity()) settings.unfold();
  if (!form.reportValidity()) return null;
  const prompt = promptField.value;
  const problem = promptProblem(model, prompt) || settings.problem();
  if (problem === "") {
    return requestBody(model, settings.read(), prompt, chat.isOn ? chat.messages(prompt) : null);
  }
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
  prepare(body, compares);
  await perform(compares ? [run, twin] : [run]);
}

/** Has texts written one behind the other, so that each has the machine to itself. */
async function perform(runs) {
  transfer = new AbortController();
  const left = [...runs];
  showBusy();
  try {
    for (; left.length > 0; left.shift()) {
      announce(left[0] === run ? `Generating: ${run.title}.` : `${run.summary} Now the full model.`);
      await (left[0] === run ? run.perform(transfer.signal) : compare(transfer.signal));
    }
    const compares = runs.includes(twin);
    verdict.show(run, compares ? twin : null, difference);
    announce(`Finished. ${run.summary}${compares ? ` ${twin.summary}` : ""}`);
  } catch (error) {
    const isStopped = error.name === "AbortError";
    left[1]?.skip(isStopped ? "Not asked, because you stopped before." : "Not asked, because the first text failed. To try again asks for both.");
    announce(isStopped ? `Stopped. ${left[0].summary}` : "");
    if (!isStopped) fail(error, left);
  } finally {
    transfer = null;
    showBusy();
  }
}

function fail(error, left) {
  // What the server refuses has to be changed; what has not begun may be.
  const isAnew = error.kind === "request" || left[0] === run;
  notice.showError(error, () => retry(isAnew ? [] : left));
  if (error.param === "prompt" || error.param === "messages") promptField.focus({ preventScroll: true });
  else if (error.param) settings.focus(error.param);
}

/** Has the texts written that are left, or all anew, if the server still has their model. */
async function retry(runs) {
  if (transfer) return;
  const { id } = model;
  await loadModels(() => retry(runs));
  if (!byId("notice").hidden || model.id !== id) return;
  if (runs.length === 0) {
    await generate();
    return;
  }
  difference = null;
  for (const { text } of [run, twin]) text.markDifference(null);
  await perform(runs);
}

function prepare(body, compares) {
  difference = null;
  shown = null;
  inspector.clear();
  verdict.clear();
  byId("results").hidden = false;
  byId("panes").classList.toggle("two", compares);
  twin.pane.hidden = !compares;
  const common = { model, depths, prompt: promptField.value };
  run.prepare({ ...common, title: modeName(body.mode), body });
  if (compares) twin.prepare({ ...common, title: modeName("full"), body: fullModelBody(body) });
  const isBelow = byId("results").getBoundingClientRect().top > 0.75 * window.innerHeight;
  if (isBelow) byId("results").scrollIntoView();
}

function hideResults() {
  byId("results").hidden = true;
  shown = null;
  inspector.clear();
}

async function compare(signal) {
  const comparison = () => new Comparison(run.transcript, twin.transcript);
  let current = null;
  await twin.perform(signal, () => {
    // Made when the text begins, for a second try begins a new one.
    current ??= comparison();
    markDifference(current.update());
  });
  markDifference((current ?? comparison()).finish());
}

function markDifference(index) {
  if (index === null || difference !== null) return;
  difference = index;
  for (const { text } of [run, twin]) text.markDifference(index);
}

function showToken(owner, index) {
  const other = owner === run ? twin : run;
  if (!twin.pane.hidden) other.text.outline(index);
  shown = index === null ? null : owner;
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
  const command = curlCommand(addressOf(pathOf(body)), body, apiKey.get() !== "");
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
  if (event.key === "Escape") {
    if (transfer) transfer.abort();
    else if (inspector.isSheet) shown?.text.release();
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
// Where the token lies over the foot of the page, whatever else is used puts it away.
for (const kind of ["pointerdown", "focusin"]) {
  document.addEventListener(kind, ({ target }) => {
    const isElsewhere = !target.closest(".text, #inspector");
    if (isElsewhere && inspector.isSheet) shown?.text.release(false);
  });
}

if (navigator.platform.startsWith("Mac")) byId("shortcut").textContent = "⌘ ⏎";
inspector.clear();
showBusy();
loadModels();
