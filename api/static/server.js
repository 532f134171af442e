// What the page asks of the server, and what went wrong in words. Addresses are relative to the page.

import { apiKey } from "./key.js";

export class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status; // of HTTP; 0: there was no answer
  }
}

export const address = (path) => new URL(path, document.baseURI).href;

export async function readJson(path, signal) {
  const response = await ask(path, { signal });
  return response.json();
}

export async function openStream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask(path, { method: "POST", body: JSON.stringify(body), headers, signal });
  return response.body;
}

async function ask(path, options) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw new Refusal(await inWords(response), response.status);
  return response;
}

const unreachable = () => new Refusal("The connection to the server is lost. Is it still running?", 0);

// A connection that breaks while its answer is read is one more way not to be reached.
export const asRefusal = (error) => (error instanceof Refusal ? error : unreachable());

async function inWords(response) {
  if (response.status === 401) return "This server needs an API key. Enter it in the settings.";
  const said = await response.json().then((body) => body.error?.message, () => null);
  const words = said ?? `The server answered with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  return response.status === 429 && wait ? `${words} (in about ${wait} s)` : words;
}
