// Shows the messages of one conversation. It reads them and changes nothing; what the reader asks for
// goes to the callbacks.

import { byId, element } from "./dom.js";
import { MarkdownView, copyButton } from "./markdown.js";
import { readReports, showPicture } from "./overlay.js";
import { find } from "./vault.js";

/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Message} Message */
/** @typedef {import("./api.js").ApiError} ApiError */

/**
 * @typedef {object} Actions
 * @property {() => void} regenerate another answer in place of the last one, or one where none is
 * @property {() => void} takeBack the last message goes back into the field
 * @property {(path: string) => boolean} goTo focuses the control of a field
 */

/** How far from the end still counts as at the end, in pixels. */
const NEAR_END = 48;

/** An answer on the page. */
class AnswerView {
  #thoughts = element("details", { class: "thoughts", hidden: true });
  #thoughtText = element("div", { class: "thought-text" });
  #summary = element("summary");
  #note = element("p", { class: "note" });
  #body = element("div", { class: "body" });
  #markdown = new MarkdownView(this.#body);
  #actions = element("div", { class: "actions" });

  /** @param {Message} message */
  constructor(message) {
    this.message = message;
    this.#thoughts.append(this.#summary, this.#thoughtText);
    this.element = element("article", { class: "message assistant", "aria-label": "Answer" }, this.#thoughts, this.#body, this.#note, this.#actions);
    this.#actions.append(copyButton(() => message.text, "Copy answer"));
  }

  /** @param {boolean} isRunning */
  update(isRunning) {
    const { text, reasoning, note, stopped } = this.message;
    this.#thoughts.hidden = !reasoning;
    if (reasoning) {
      this.#summary.textContent = isRunning && text === "" ? "Thinking…" : "Thoughts";
      this.#thoughtText.textContent = reasoning;
    }
    this.#markdown.show(text);
    this.element.classList.toggle("running", isRunning);
    this.element.setAttribute("aria-busy", String(isRunning));
    const words = isRunning ? "" : [stopped ? "Stopped" : null, text === "" && !isRunning ? "No text" : null, note].filter(Boolean).join(" · ");
    this.#note.textContent = words;
    this.#actions.hidden = isRunning;
  }

  /** @param {() => void} regenerate */
  offerAnother(regenerate) {
    this.#actions.append(element("button", { type: "button", class: "quiet small", click: regenerate }, "Regenerate"));
  }
}

export class Transcript {
  #view = byId("transcript", HTMLElement);
  /** @type {AnswerView | null} */
  #last = null;
  /** @type {string[]} */
  #urls = [];
  /** Counts what was shown, so that images that come late find out that they are not wanted. */
  #turn = 0;

  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
  }

  /**
   * @param {Conversation} conversation
   * @param {{running: Message | null, error: ApiError | null, isBusy: boolean}} state `running` comes in right now
   */
  show(conversation, { running, error, isBusy }) {
    this.#turn++;
    for (const url of this.#urls) URL.revokeObjectURL(url);
    this.#urls = [];
    this.#last = null;
    const nodes = [];
    let images = 0;
    for (const message of conversation.messages) {
      if (message.role === "user") {
        nodes.push(userMessage(message, images));
        images += message.images?.length ?? 0;
        continue;
      }
      this.#last = new AnswerView(message);
      this.#last.update(message === running);
      nodes.push(this.#last.element);
    }
    this.#view.replaceChildren(...nodes);
    const last = conversation.messages.at(-1);
    if (last === undefined) this.#view.append(element("div", { class: "empty" }, element("p", {}, "Ask something.")));
    else if (error) this.#view.append(this.#errorCard(error, last.role === "user"));
    else if (last.role === "user" && !isBusy) this.#view.append(this.#unanswered());
    if (last?.role === "assistant" && !isBusy) this.#last?.offerAnother(this.actions.regenerate);
    this.#view.scrollTop = this.#view.scrollHeight;
    this.#showImages(conversation, this.#turn);
  }

  /** The running answer has grown. */
  update(/** @type {boolean} */ isRunning) {
    const isAtEnd = this.#view.scrollHeight - this.#view.scrollTop - this.#view.clientHeight < NEAR_END;
    this.#last?.update(isRunning);
    if (isAtEnd) this.#view.scrollTop = this.#view.scrollHeight;
  }

  /**
   * Images come from the vault; reports of the latest answer that has some belong to the images in the
   * order of the conversation.
   *
   * @param {Conversation} conversation
   * @param {number} turn
   */
  async #showImages(conversation, turn) {
    const ids = conversation.messages.flatMap((message) => message.images ?? []);
    if (ids.length === 0) return;
    const reported = conversation.messages.findLast((message) => message.visual !== undefined);
    const reports = reported?.visual ? readReports(await find(reported.visual)) : [];
    for (const [index, id] of ids.entries()) {
      const blob = await find(id);
      if (turn !== this.#turn) return;
      const place = this.#view.querySelector(`[data-image="${index}"]`);
      if (!(blob instanceof Blob)) {
        place?.replaceChildren(element("p", { class: "note" }, "This image is no longer kept."));
        continue;
      }
      const url = URL.createObjectURL(blob);
      this.#urls.push(url);
      place?.replaceChildren(showPicture(url, `Image ${index + 1}`, reports[index] ?? null));
    }
    this.#view.scrollTop = this.#view.scrollHeight;
  }

  /**
   * @param {ApiError} error
   * @param {boolean} isUnanswered
   */
  #errorCard(error, isUnanswered) {
    const card = element("div", { class: "error", role: "alert" }, element("p", {}, withCode(error.message)));
    const facts = element("dl", { class: "facts" });
    const fact = (/** @type {string} */ name, /** @type {string | null} */ value) => {
      if (value) facts.append(element("div", {}, element("dt", {}, name), element("dd", {}, element("code", {}, value))));
    };
    fact("Field", error.param);
    fact("Code", error.code);
    fact("Status", error.status ? String(error.status) : null);
    fact("Try again after, seconds", error.retryAfter);
    fact("Request", error.requestId);
    if (facts.hasChildNodes()) card.append(facts);
    const buttons = element("div", { class: "actions" });
    const button = (/** @type {string} */ name, /** @type {() => void} */ click) =>
      buttons.append(element("button", { type: "button", class: "quiet small", click }, name));
    button("Try again", this.actions.regenerate);
    if (isUnanswered) button("Take back", this.actions.takeBack);
    const { param } = error;
    if (error.status === 401) button("Enter a key", () => this.actions.goTo("key"));
    else if (param && /^[a-z]/.test(param) && !param.startsWith("messages")) button("Go to the setting", () => this.actions.goTo(param));
    card.append(buttons);
    return card;
  }

  #unanswered() {
    return element(
      "div",
      { class: "actions unanswered" },
      element("button", { type: "button", class: "quiet small", click: this.actions.regenerate }, "Get an answer"),
      element("button", { type: "button", class: "quiet small", click: this.actions.takeBack }, "Take back"),
    );
  }
}

/**
 * The server puts names of fields and values between backticks.
 *
 * @param {string} text
 * @returns {Node[]}
 */
function withCode(text) {
  const pieces = text.split(/`([^`\n]+)`/);
  return pieces.map((piece, index) => (index % 2 === 1 ? element("code", {}, piece) : document.createTextNode(piece)));
}

/**
 * @param {Message} message
 * @param {number} before images of earlier messages
 */
function userMessage(message, before) {
  const article = element("article", { class: "message user", "aria-label": "You" });
  article.append(...(message.images ?? []).map((_, index) => element("div", { class: "image", "data-image": before + index })));
  if (message.text !== "") article.append(element("p", { class: "said" }, message.text));
  return article;
}
