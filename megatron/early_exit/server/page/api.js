/**
 * The server's two paths that this page uses, and its errors in words.
 */

import { eventsOf } from "./stream.js";

const KEY = "early-exit-api-key";

/** What went wrong, in a sentence for the reader; `kind` is what the page can do about it. */
export class ServerError extends Error {
  /** @param {"unreachable"|"key"|"busy"|"request"|"server"|"stream"} kind */
  constructor(kind, message) {
    super(message);
    this.kind = kind;
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
  const { data } = await (await ask("v1/models", { method: "GET" })).json();
  return data.filter((model) => model.id === model.root);
}

/** Gives the parsed events of a streamed completion. */
export async function* completion(body, signal) {
  const response = await ask("v1/completions", {
    method: "POST",
    body: JSON.stringify(body),
    signal,
  });
  const lost = new ServerError("stream", "The connection ended before the text did.");
  try {
    for await (const data of eventsOf(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) {
        throw new ServerError("stream", `The server broke off the text: ${event.error.message}`);
      }
      yield event;
    }
  } catch (error) {
    // What reading throws where the network fails.
    throw error instanceof TypeError ? lost : error;
  }
  throw lost;
}

async function ask(path, options) {
  const headers = { "Content-Type": "application/json" };
  const key = apiKey.get();
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
    .then((answer) => answer.error?.message)
    .catch(() => null);
  const message = said ?? `${response.status} ${response.statusText}`.trim();
  if (response.status === 401) {
    const does = key ? "refuses this" : "asks for an";
    return new ServerError("key", `The server ${does} API key.`);
  }
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After");
    const when = /^\d+$/.test(seconds ?? "") ? `in ${seconds} s` : "in a moment";
    return new ServerError("busy", `The server is busy: ${message} Try again ${when}.`);
  }
  if (response.status < 500) {
    return new ServerError("request", `The server refuses this request: ${message}`);
  }
  return new ServerError("server", `The server failed: ${message}`);
}
