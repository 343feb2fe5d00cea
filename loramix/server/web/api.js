// Access to the server: requests with the API key, event streams, and readable errors.

import { $, sentence } from "./dom.js";

const KEY = "loramix-key"; // in sessionStorage: this tab only, until it is closed
const ATTEMPTS = 6;

/** An error whose message can be shown to the user. */
export class Failure extends Error {
  constructor(message, status = 0, wait = 0) {
    super(sentence(message));
    Object.assign(this, { status, wait });
  }
}

async function failure(response) {
  let message = `the server answered with status ${response.status}.`;
  try {
    const { error } = await response.json();
    message = error.message ?? error;
  } catch {
    // not JSON, such as a proxy's error page
  }
  return new Failure(message, response.status, Number(response.headers.get("Retry-After")) || 1);
}

async function once(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const init = { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) };
  const response = await reached(() => fetch(path, init));
  if (!response.ok) throw await failure(response);
  return response;
}

/** Turn a network error into a readable one; an abort by the user stays an AbortError. */
async function reached(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server cannot be reached; is 'loramix serve' still running?");
  }
}

/**
 * Send a request; prompt the user for an API key if the server needs one, and retry while the server is busy.
 *
 * @param {(text: string) => void} [busy] shown while waiting for a busy server.
 */
export async function ask(path, { body, signal, busy = () => {} } = {}) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await once(path, body, signal);
    } catch (error) {
      if (error.status === 401) {
        await askForKey(sessionStorage.getItem(KEY) !== null);
      } else if (error.status === 429 && attempt < ATTEMPTS) {
        await countdown(Math.max(error.wait, 2 ** (attempt - 1)), signal, busy);
      } else {
        throw error;
      }
    }
  }
}

async function countdown(seconds, signal, busy) {
  for (let left = Math.ceil(seconds); left > 0; left--) {
    busy(`The server is busy; asking again in ${left} s. Esc stops.`);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    signal?.throwIfAborted();
  }
  busy("");
}

/** Yield the objects of a stream of server-sent events. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(() => reader.read());
    if (done) throw new Failure("the answer was cut off; the server may have been stopped.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // a blank line, or a keep-alive comment
      const data = line.slice(6);
      if (data.trim() === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Failure(event.error.message, event.error.code);
      yield event;
    }
  }
}

function askForKey(wrong) {
  const dialog = $("#key");
  const field = dialog.querySelector("input");
  dialog.querySelector(".why").textContent = wrong
    ? "That key was not accepted. Please try again."
    : "This server needs an API key. It is kept until you close this tab, and sent to this server only.";
  field.value = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, field.value.trim());
      dialog.close("given");
    };
    dialog.onclose = () => {
      if (dialog.returnValue === "given") resolve();
      else reject(new Failure("the server needs an API key; send again to enter one.", 401));
      dialog.returnValue = "";
    };
  });
}
