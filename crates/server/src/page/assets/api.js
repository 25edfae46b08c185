// Talks to the server that this page comes from, and to nobody else.

import { readEvents } from "./sse.js";

/** An error of the contract (docs/api.md, Errors), or the lack of an answer. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string | null, param?: string | null, requestId?: string | null, retryAfter?: string | null}} [facts]
   */
  constructor(message, facts = {}) {
    super(message);
    this.status = facts.status ?? 0;
    this.code = facts.code ?? null;
    this.param = facts.param ?? null;
    this.requestId = facts.requestId ?? null;
    this.retryAfter = facts.retryAfter ?? null;
  }
}

/**
 * @param {any} body
 * @param {Response} response
 */
function errorOf(body, response) {
  const error = body?.error ?? {};
  const text = (/** @type {unknown} */ value) => (typeof value === "string" ? value : null);
  return new ApiError(text(error.message) ?? `The server answered ${response.status}.`, {
    status: response.status,
    code: text(error.code),
    param: text(error.param),
    requestId: response.headers.get("x-request-id"),
    retryAfter: response.headers.get("retry-after"),
  });
}

/**
 * @param {string} path relative to the page, so that it works behind a prefix too
 * @param {string} key empty: none
 * @param {RequestInit} [options]
 */
async function request(path, key, options = {}) {
  const headers = new Headers(options.headers);
  if (key !== "") {
    try {
      headers.set("authorization", `Bearer ${key}`);
    } catch {
      throw new ApiError("The API key has characters that no header can carry.", { status: 401 });
    }
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { cache: "no-store", redirect: "error", ...options, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw errorOf(await response.json().catch(() => null), response);
  return response;
}

/**
 * @param {string} key
 * @returns {Promise<any[]>} the cards of `/v1/models`
 */
export async function listModels(key) {
  const body = await (await request("v1/models", key)).json();
  return Array.isArray(body?.data) ? body.data : [];
}

/**
 * @param {string} key
 * @returns {Promise<string>} the text of `/metrics`
 */
export async function readMetrics(key) {
  return (await request("metrics", key)).text();
}

/**
 * @param {string} key
 * @returns {Promise<string>}
 */
export async function readVersion(key) {
  const body = await (await request("version", key)).json();
  return typeof body?.version === "string" ? body.version : "";
}

/**
 * The chunks of a streamed chat completion.
 *
 * @param {object} body
 * @param {string} key
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any, void, void>}
 */
export async function* streamChat(body, key, signal) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (response.body === null) throw new ApiError("The answer has no body.");
  try {
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk, response);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || (error instanceof DOMException && error.name === "AbortError")) throw error;
    throw new ApiError("The answer broke off.", { requestId: response.headers.get("x-request-id") });
  }
  throw new ApiError("The answer broke off before its end.", { requestId: response.headers.get("x-request-id") });
}
