/**
 * What is sent to the server.
 */

// How many tokens to name in the place of each one.
const CANDIDATES = 4;

/**
 * The body of a completion request.
 *
 * @param {object} model as the server describes it
 * @param {object} settings see settings.js
 * @param {string} prompt as it was typed
 * @param {object[]|null} messages the conversation that the prompt is the last message of
 */
export function requestBody(model, settings, prompt, messages) {
  const { mode } = settings;
  const body = {
    model: model.id,
    ...(messages ? { messages } : { prompt: model.has_text ? prompt : tokenIds(prompt) }),
    max_tokens: settings.maxTokens,
    temperature: settings.temperature,
    mode,
  };
  if (settings.topP < 1) body.top_p = settings.topP;
  if (settings.stop.length > 0) body.stop = settings.stop;
  if (settings.seed !== null) body.seed = settings.seed;
  if (mode === "early_exit") {
    const { exits, thresholds } = settings;
    if (thresholds) body.exit_thresholds = thresholds;
    else body.early_exit_threshold = settings.threshold;
    // Several thresholds are shown beside the exits that they are of.
    if (thresholds || `${exits}` !== `${model.default_exit_layers}`) body.exit_layers = exits;
    if (settings.measure !== model.exit_measure) body.exit_measure = settings.measure;
    if (settings.kvPolicy !== model.kv_policy) body.kv_policy = settings.kvPolicy;
  }
  if (mode === "self_speculative") {
    const layer = Number(settings.drafter);
    if (layer > 0) body.draft_exit_layer = layer;
    // A server may have another default than the exit that is named.
    if (model.draft_methods.some((method) => method !== "exit")) {
      body.draft_method = layer > 0 ? "exit" : settings.drafter;
    }
  }
  return {
    ...body,
    ...(messages ? { logprobs: true, top_logprobs: CANDIDATES } : { logprobs: CANDIDATES }),
    exit_details: settings.details,
    return_token_ids: true,
    stream: true,
    stream_options: { include_usage: true },
  };
}

/** The same request to the full model, which then asks no exit and is as fast as it can be. */
export function fullModelBody(body) {
  const {
    early_exit_threshold,
    exit_thresholds,
    exit_layers,
    exit_measure,
    kv_policy,
    draft_exit_layer,
    draft_method,
    ...rest
  } = body;
  return { ...rest, mode: "full", exit_details: false };
}

/** The request as a command for a POSIX shell; a key is named, not shown. */
export function curlCommand(address, body, hasKey) {
  const lines = [`curl --no-buffer ${address}`, "--header 'Content-Type: application/json'"];
  if (hasKey) lines.push('--header "Authorization: Bearer $API_KEY"');
  lines.push(`--data '${JSON.stringify(body).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}

/** Why a prompt cannot be sent; empty if it can. */
export function promptProblem(model, prompt) {
  if (prompt.trim() === "") return "Type a prompt first.";
  if (model.has_text || /^[\s,]*\d+(?:[\s,]+\d+)*[\s,]*$/.test(prompt)) return "";
  return "This model has no tokenizer: the prompt is token ids, for instance 12 7 301.";
}

const tokenIds = (prompt) => prompt.match(/\d+/g).map(Number);
