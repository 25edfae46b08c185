// Tells screen readers of an answer while it comes: whole sentences, not every token. The transcript
// itself is no live region, because it changes with every frame.

/** Longest piece without a sentence's end. */
const MAX_PIECE = 400;

export class Announcer {
  #said = 0;

  /** @param {HTMLElement} region a polite live region */
  constructor(region) {
    this.region = region;
  }

  /** @param {string} text */
  say(text) {
    this.region.textContent = text;
  }

  /** An answer begins. */
  begin() {
    this.#said = 0;
    this.say("Answering");
  }

  /**
   * Says what is new and complete.
   *
   * @param {string} text of the whole answer so far
   * @param {boolean} isDone
   */
  follow(text, isDone) {
    const rest = text.slice(this.#said);
    let end = isDone ? rest.length : lastBreak(rest);
    if (end === 0 && rest.length > MAX_PIECE) end = rest.length;
    if (end === 0) return;
    this.#said += end;
    const piece = rest.slice(0, end).replace(/[`*_#>|~]+/g, " ").trim();
    if (piece !== "") this.say(piece);
  }
}

/** @param {string} text */
function lastBreak(text) {
  for (let at = text.length - 1; at > 0; at--) {
    const char = text[at - 1] ?? "";
    if (char === "\n" || (/[.!?…:]/.test(char) && /\s/.test(text[at] ?? ""))) return at;
    if ("。！？".includes(char)) return at;
  }
  return 0;
}
