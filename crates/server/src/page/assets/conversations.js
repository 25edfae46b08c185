// Conversations in this browser's localStorage, one entry each, so that two tabs do not overwrite each other.

import { randomId } from "./dom.js";

const PREFIX = "locket.conversation.";

/**
 * @typedef {object} Message
 * @property {"user" | "assistant"} role
 * @property {string} id
 * @property {string} text
 * @property {string} [reasoning] thoughts
 * @property {string[]} [images] ids in the vault
 * @property {string} [note] how it ended and what it cost, in words
 * @property {string} [visual] id in the vault of what became of the images
 * @property {boolean} [stopped] by the reader
 */

/**
 * @typedef {object} Conversation
 * @property {string} id
 * @property {number} updated milliseconds since 1970
 * @property {string} system
 * @property {Message[]} messages
 */

/** @returns {Conversation} */
export function newConversation() {
  return { id: randomId(), updated: Date.now(), system: "", messages: [] };
}

/** @returns {Message} */
export function newMessage(/** @type {"user" | "assistant"} */ role, /** @type {string} */ text) {
  return { role, id: randomId(), text };
}

/** @param {Conversation} conversation */
export function titleOf(conversation) {
  const first = conversation.messages.find((message) => message.role === "user");
  const line = first?.text.trim().split("\n")[0] ?? "";
  if (line !== "") return line.length > 60 ? `${line.slice(0, 59)}…` : line;
  return first?.images?.length ? "Image" : "New conversation";
}

/** Those that are kept, latest first; entries that are not conversations are left alone. */
export function loadConversations() {
  /** @type {Conversation[]} */
  const found = [];
  try {
    for (let index = 0; index < localStorage.length; index++) {
      const key = localStorage.key(index);
      if (key === null || !key.startsWith(PREFIX)) continue;
      const conversation = read(localStorage.getItem(key));
      if (conversation !== null && PREFIX + conversation.id === key) found.push(conversation);
    }
  } catch {
    // Storage is turned off.
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/**
 * @param {Conversation} conversation
 * @returns {boolean} whether it is kept
 */
export function saveConversation(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

/** @param {Conversation} conversation */
export function removeConversation(conversation) {
  try {
    localStorage.removeItem(PREFIX + conversation.id);
  } catch {
    // It was not kept either.
  }
}

/**
 * Ids in the vault that a conversation needs.
 *
 * @param {Conversation} conversation
 */
export function thingsOf({ messages }) {
  return messages.flatMap((message) => [...(message.images ?? []), ...(message.visual === undefined ? [] : [message.visual])]);
}

/** Those of all that are kept. */
export function thingsInUse() {
  return new Set(loadConversations().flatMap(thingsOf));
}

/** @param {StorageEvent} event of another tab */
export function concernsConversations(event) {
  return event.key === null || event.key.startsWith(PREFIX);
}

/**
 * What was stored, with everything that is not as it should be left out.
 *
 * @param {string | null} json
 * @returns {Conversation | null}
 */
function read(json) {
  let stored;
  try {
    stored = JSON.parse(json ?? "null");
  } catch {
    return null;
  }
  if (typeof stored?.id !== "string" || !Array.isArray(stored.messages)) return null;
  return {
    id: stored.id,
    updated: Number.isFinite(stored.updated) ? stored.updated : 0,
    system: typeof stored.system === "string" ? stored.system : "",
    messages: stored.messages.flatMap(readMessage),
  };
}

/**
 * @param {any} stored
 * @returns {Message[]} one, or none
 */
function readMessage(stored) {
  if (stored?.role !== "user" && stored?.role !== "assistant") return [];
  if (typeof stored.text !== "string") return [];
  const message = newMessage(stored.role, stored.text);
  if (typeof stored.id === "string") message.id = stored.id;
  for (const key of /** @type {const} */ (["reasoning", "note", "visual"])) {
    if (typeof stored[key] === "string") message[key] = stored[key];
  }
  if (stored.stopped === true) message.stopped = true;
  if (Array.isArray(stored.images)) {
    message.images = stored.images.filter((/** @type {unknown} */ id) => typeof id === "string");
  }
  return [message];
}
