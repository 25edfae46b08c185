// What stands inside a line of Markdown: emphasis, code, links, line breaks.

/**
 * @typedef {{kind: "text", text: string}
 *   | {kind: "break"}
 *   | {kind: "code", text: string}
 *   | {kind: "strong" | "em" | "del", inner: Span[]}
 *   | {kind: "link", url: string, host: string | null, inner: Span[]}} Span
 */

/** @type {Record<string, "strong" | "em" | "del">} */
const KINDS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };

// Bounded, so that no text makes them slow.
const LINK = /!?\[([^[\]\n]{1,400})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,200}\)[^\s()<>]{0,200})?)>?(?: +"[^"\n]{0,200}")?\)/y;
const BARE = /https?:\/\/[^\s<>"'`\\[\]{}|^]{1,2000}/y;
const WORD = /[\p{L}\p{N}]/u;

/**
 * @param {string} text
 * @returns {Span[]}
 */
export function readSpans(text) {
  return new Reader(text, true).read();
}

class Reader {
  /** Spans of what is open; the outermost has no marker. @type {{marker: string, spans: Span[]}[]} */
  #open = [{ marker: "", spans: [] }];
  #plain = "";
  /** Runs of backticks that nothing closes. */
  #unclosed = new Set();

  /**
   * @param {string} text
   * @param {boolean} links whether links may be here
   */
  constructor(text, links) {
    this.text = text;
    this.links = links;
  }

  /** @returns {Span[]} */
  read() {
    let at = 0;
    while (at < this.text.length) at = this.#step(at);
    while (this.#open.length > 1) this.#giveUp();
    this.#flush();
    return this.#open[0]?.spans ?? [];
  }

  /**
   * Takes what stands at `at`.
   *
   * @param {number} at
   * @returns {number} where to go on
   */
  #step(at) {
    const { text } = this;
    const char = text[at] ?? "";
    switch (char) {
      case "\n":
        this.#push({ kind: "break" });
        return at + 1;
      case "\\":
        if (/[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
          this.#plain += text[at + 1];
          return at + 2;
        }
        break;
      case "`":
        return this.#code(at);
      case "*":
      case "_":
      case "~":
        return this.#emphasis(at, char);
      case "!":
      case "[": {
        LINK.lastIndex = at;
        const link = this.links && (char === "[" || text[at + 1] === "[") ? LINK.exec(text) : null;
        if (link) return this.#link(at, link[0], link[1] ?? "", link[2] ?? "");
        break;
      }
      case "h": {
        BARE.lastIndex = at;
        const bare = this.links && !WORD.test(text[at - 1] ?? "") ? BARE.exec(text) : null;
        if (bare) {
          const url = bare[0].replace(/[.,;:!?)*_~]+$/, "");
          return this.#link(at, url, null, url);
        }
        break;
      }
    }
    this.#plain += char;
    return at + 1;
  }

  /**
   * @param {number} at
   * @returns {number}
   */
  #code(at) {
    let end = at;
    while (this.text[end] === "`") end++;
    const run = this.text.slice(at, end);
    if (!this.#unclosed.has(run.length)) {
      for (let close = this.text.indexOf(run, end); close >= 0; ) {
        let behind = close;
        while (this.text[behind] === "`") behind++;
        if (behind - close === run.length) {
          const inner = this.text.slice(end, close);
          this.#push({ kind: "code", text: inner.length > 2 ? inner.replace(/^ (.*) $/s, "$1") : inner });
          return behind;
        }
        close = this.text.indexOf(run, behind);
      }
      this.#unclosed.add(run.length);
    }
    this.#plain += run;
    return end;
  }

  /**
   * @param {number} at
   * @param {string} char
   * @returns {number}
   */
  #emphasis(at, char) {
    const { text } = this;
    const twice = text[at + 1] === char;
    const inner = this.#open.at(-1)?.marker;
    // Of three that open, the single one is outside; of three that close, the inner one goes first.
    const isSingle = !twice || (text[at + 2] === char && inner !== char + char);
    const marker = isSingle && char !== "~" ? char : twice ? char + char : char;
    const end = at + marker.length;
    const [before, behind] = [text[at - 1] ?? " ", text[end] ?? " "];
    const inWord = char === "_" && WORD.test(before) && WORD.test(behind);
    const kind = KINDS[marker];
    if (kind !== undefined && !inWord) {
      const opened = this.#open.findLastIndex((frame) => frame.marker === marker);
      if (opened > 0 && !/\s/.test(before)) {
        this.#close(opened, kind);
        return end;
      }
      if (opened < 0 && !/\s/.test(behind) && this.#open.length < 8) {
        this.#flush();
        this.#open.push({ marker, spans: [] });
        return end;
      }
    }
    this.#plain += marker;
    return end;
  }

  /**
   * @param {number} opened
   * @param {"strong" | "em" | "del"} kind
   */
  #close(opened, kind) {
    while (this.#open.length > opened + 1) this.#giveUp();
    this.#flush();
    const frame = this.#open.pop();
    if (frame) this.#push({ kind, inner: frame.spans });
  }

  /** The innermost marker was only text. */
  #giveUp() {
    this.#flush();
    const frame = this.#open.pop();
    if (frame === undefined) return;
    const outer = this.#open.at(-1)?.spans ?? [];
    outer.push({ kind: "text", text: frame.marker });
    for (const span of frame.spans) outer.push(span);
  }

  /**
   * @param {number} at
   * @param {string} whole
   * @param {string | null} words null: the address itself
   * @param {string} address
   * @returns {number}
   */
  #link(at, whole, words, address) {
    const url = webAddress(address);
    if (url === null || whole === "") {
      this.#plain += whole === "" ? this.text[at] : whole;
      return at + Math.max(whole.length, 1);
    }
    /** @type {Span[]} */
    const inner = words === null ? [{ kind: "text", text: address }] : new Reader(words, false).read();
    const saysWhere = words === null || words.includes(url.host);
    this.#push({ kind: "link", url: url.href, host: saysWhere ? null : url.host, inner });
    return at + whole.length;
  }

  /** @param {Span} span */
  #push(span) {
    this.#flush();
    this.#open.at(-1)?.spans.push(span);
  }

  #flush() {
    if (this.#plain === "") return;
    const text = this.#plain;
    this.#plain = "";
    this.#open.at(-1)?.spans.push({ kind: "text", text });
  }
}

/**
 * @param {string} address
 * @returns {URL | null} null for what is no page of the web
 */
function webAddress(address) {
  try {
    const url = new URL(address);
    return url.protocol === "http:" || url.protocol === "https:" ? url : null;
  } catch {
    return null;
  }
}
