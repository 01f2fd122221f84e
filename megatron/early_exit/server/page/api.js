/**
 * The server's two paths that this page uses, and its errors in words.
 */

import { eventsOf } from "./stream.js";

const KEY = "early-exit-api-key";
const STRANGE = "Something else than the expected server answers here: is there a proxy on the way?";

/** What went wrong, in a sentence for the reader; `kind` is what the page can do about it. */
export class ServerError extends Error {
  /**
   * @param {"unreachable"|"key"|"busy"|"request"|"server"|"stream"} kind
   * @param {string|null} param the field of the request that the server names
   */
  constructor(kind, message, param = null) {
    super(message);
    this.kind = kind;
    this.param = param;
  }
}

/** The key lasts as long as the tab and is sent to this server alone. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) =>
    value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY),
};

/** The address of a path of the server, which may live below a prefix. */
export const addressOf = (path) => new URL(path, document.baseURI).href;

/** The models that are served, without their aliases. */
export async function servedModels() {
  const response = await ask("v1/models", { method: "GET" });
  const { data } = await response.json().catch(() => ({}));
  if (!Array.isArray(data)) throw new ServerError("server", STRANGE);
  return data.filter((model) => model.id === model.root);
}

/** The path that takes a request: that of conversations, or that of texts to continue. */
export const pathOf = (body) => (body.messages ? "v1/chat/completions" : "v1/completions");

/** Gives the parsed events of a streamed answer. */
export async function* answerTo(body, signal) {
  const response = await ask(pathOf(body), {
    method: "POST",
    body: JSON.stringify(body),
    signal,
  });
  const lost = new ServerError(
    "stream",
    "The connection ended before the text did. What had come by then stays here.",
  );
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const event = parsed(data);
      if (event.error) {
        throw new ServerError("stream", `The server broke off the text: ${sentence(event.error.message)}`);
      }
      yield event;
    }
  } catch (error) {
    // What reading throws where the network fails.
    throw error instanceof TypeError ? lost : error;
  }
  throw lost;
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("stream", STRANGE);
  }
}

async function ask(path, options) {
  const headers = { "Content-Type": "application/json" };
  const key = apiKey.get();
  // Headers hold nothing else, and `fetch` would call the server unreachable.
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new ServerError("key", "An API key is of ASCII characters without blanks.");
  }
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(addressOf(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(
      "unreachable",
      `The server at ${location.host} cannot be reached. Is it still running?`,
    );
  }
  if (!response.ok) throw await refusal(response, key);
  return response;
}

async function refusal(response, key) {
  const said = await response
    .json()
    .then((answer) => answer.error)
    .catch(() => null);
  const message = said?.message ?? `${response.status} ${response.statusText}`.trim();
  if (response.status === 401) {
    const does = key ? "refuses this" : "asks for an";
    return new ServerError("key", `The server ${does} API key.`);
  }
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After");
    const when = /^\d+$/.test(seconds ?? "") ? `in ${seconds} s` : "in a moment";
    return new ServerError("busy", `The server is busy: ${sentence(message)} Try again ${when}.`);
  }
  if (response.status < 500) {
    const says = `The server refuses this request: ${sentence(message)}`;
    return new ServerError("request", says, said?.param ?? null);
  }
  return new ServerError("server", `The server failed: ${sentence(message)}`);
}

const sentence = (message) => (/[.!?]$/.test(message) ? message : `${message}.`);
