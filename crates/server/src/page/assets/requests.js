// What is asked of the server, and what its answer cost in words.

import { find } from "./vault.js";
import { ApiError } from "./api.js";

/** @typedef {import("./conversations.js").Message} Message */

/**
 * The body of a chat completion.
 *
 * @param {string} model
 * @param {string} system
 * @param {Message[]} messages
 * @param {object} fields
 */
export async function chatBody(model, system, messages, fields) {
  const sent = [];
  if (system.trim() !== "") sent.push({ role: "system", content: system });
  for (const message of messages) {
    if (message.role === "user") sent.push({ role: "user", content: await contentOf(message) });
    else if (message.reasoning) sent.push({ role: "assistant", content: message.text, reasoning_content: message.reasoning });
    else sent.push({ role: "assistant", content: message.text });
  }
  return { ...(model === "" ? {} : { model }), messages: sent, ...fields };
}

/** @param {Message[]} messages */
export function hasImages(messages) {
  return messages.some((message) => message.images?.length);
}

/** @param {Message} message */
async function contentOf(message) {
  if (!message.images?.length) return message.text;
  const parts = [];
  for (const id of message.images) {
    const blob = await find(id);
    if (!(blob instanceof Blob)) throw new ApiError("An image of this conversation is no longer kept in this browser; take the message back and add it again.");
    parts.push({ type: "image_url", image_url: { url: await dataUrl(blob) } });
  }
  if (message.text !== "") parts.push({ type: "text", text: message.text });
  return parts;
}

/**
 * @param {Blob} blob
 * @returns {Promise<string>}
 */
function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(new ApiError("An image could not be read."));
    reader.readAsDataURL(blob);
  });
}

/**
 * One line under an answer.
 *
 * @param {{finish: string | null, usage: any, first: number, last: number}} facts times in milliseconds
 */
export function noteOf({ finish, usage, first, last }) {
  const words = [];
  if (finish === "length") words.push("cut at the token limit");
  if (usage) {
    const tokens = usage.completion_tokens ?? 0;
    words.push(`${usage.prompt_tokens ?? 0} + ${tokens} tokens`);
    if (tokens > 1 && last > first) words.push(`${Math.round(((tokens - 1) * 1000) / (last - first))} tokens/s`);
    const { image_tokens: images = 0, image_tokens_kept: kept = images } = usage.prompt_tokens_details ?? {};
    if (images > 0) words.push(`${kept} of ${images} visual tokens`);
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    if (cached > 0) words.push(`${cached} from a snapshot`);
    const { locket } = usage;
    if (locket?.exact === true) words.push("exact");
    else if (locket) words.push(`${locket.folded_tokens} folded by ${locket.method}${locket.slots ? `, ${locket.slots} slots` : ""}`);
  }
  return words.join(" · ");
}
