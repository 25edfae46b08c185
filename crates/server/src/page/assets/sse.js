// Server-sent events, as far as answers use them: https://html.spec.whatwg.org/#event-stream-interpretation

/** Longest event; more is not an answer of this server. */
const MAX_EVENT = 64 * 1024 * 1024;

/** Turns pieces of text, cut anywhere, into the data of whole events. */
export class EventParser {
  #line = "";
  /** The last piece ended with a carriage return, whose line feed may follow. */
  #afterReturn = false;
  /** @type {string[]} */
  #data = [];
  #length = 0;

  /**
   * @param {string} text
   * @returns {string[]} the data of the events that this piece ends
   */
  push(text) {
    const events = [];
    let start = 0;
    for (let at = 0; at < text.length; at++) {
      const code = text.charCodeAt(at);
      if (code !== 10 && code !== 13) continue;
      if (code === 10 && this.#afterReturn && at === start && this.#line === "") {
        // The second half of a line end.
        this.#afterReturn = false;
        start = at + 1;
        continue;
      }
      const event = this.#take(this.#line + text.slice(start, at));
      if (event !== null) events.push(event);
      this.#line = "";
      this.#afterReturn = code === 13;
      start = at + 1;
    }
    if (start < text.length) {
      this.#line += text.slice(start);
      this.#afterReturn = false;
    }
    if (this.#line.length + this.#length > MAX_EVENT) throw new Error("an event of the stream is too long");
    return events;
  }

  /**
   * @param {string} line
   * @returns {string | null}
   */
  #take(line) {
    if (line === "") {
      if (this.#data.length === 0) return null;
      const data = this.#data.join("\n");
      this.#data = [];
      this.#length = 0;
      return data;
    }
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    if (field !== "data") return null;
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    this.#data.push(value);
    this.#length += value.length;
    return null;
  }
}

/**
 * The data of each event of a body.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string, void, void>}
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  const parser = new EventParser();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    // Whoever stops listening lets the server know. It may be over already.
    reader.cancel().catch(() => {});
  }
}
