// The part of Markdown that models write, read into a tree and shown as elements made one by one. What
// is no Markdown is text; HTML is text; nothing is loaded, and links are those of the web only. Reading
// takes time in proportion to the text, whatever it is.

import { element } from "./dom.js";
import { readSpans } from "./spans.js";

/** @typedef {import("./spans.js").Span} Span */

/**
 * @typedef {{kind: "paragraph", text: string}
 *   | {kind: "heading", level: number, text: string}
 *   | {kind: "code", language: string, text: string}
 *   | {kind: "list", start: number | null, items: Block[][]}
 *   | {kind: "quote", blocks: Block[]}
 *   | {kind: "table", head: string[], rows: string[][]}
 *   | {kind: "rule"}} Block
 */

/** Quotes and lists inside each other; deeper ones are text. */
const MAX_DEPTH = 8;

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const ITEM = /^( {0,3})([-*+]|(\d{1,9})[.)])(?: +|\t|$)/;
const DIVIDER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/**
 * The blocks of a text, each with the lines that it was made of.
 *
 * @param {string} text
 * @returns {{block: Block, source: string}[]}
 */
export function readBlocks(text) {
  return blocksOf(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

/**
 * @param {string[]} lines
 * @param {number} depth
 */
function blocksOf(lines, depth) {
  /** @type {{block: Block, source: string}[]} */
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (blank(lines[at])) {
      at++;
      continue;
    }
    const [block, end] = blockAt(lines, at, depth);
    blocks.push({ block, source: lines.slice(at, end).join("\n") });
    at = end;
  }
  return blocks;
}

/** @param {string | undefined} line */
const blank = (line) => line === undefined || line.trim() === "";

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 * @returns {[Block, number]} the block and the line behind it
 */
function blockAt(lines, at, depth) {
  const line = lines[at] ?? "";
  const fence = FENCE.exec(line);
  if (fence) return codeAt(lines, at, fence[1] ?? "", fence[2] ?? "");
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1]?.length ?? 1, text: heading[2] ?? "" }, at + 1];
  if (RULE.test(line)) return [{ kind: "rule" }, at + 1];
  if (depth < MAX_DEPTH && line.startsWith(">")) return quoteAt(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return listAt(lines, at, depth);
  if (line.includes("|") && isDivider(lines[at + 1])) return tableAt(lines, at);
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end, depth)) end++;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((text) => text.trim()).join("\n") }, end];
}

/** @param {string | undefined} line */
const isDivider = (line) => line !== undefined && line.includes("|") && DIVIDER.test(line);

/**
 * Whether the line ends a paragraph.
 *
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 */
function interrupts(lines, at, depth) {
  const line = lines[at] ?? "";
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
  if (depth < MAX_DEPTH && (line.startsWith(">") || ITEM.test(line))) return true;
  return line.includes("|") && isDivider(lines[at + 1]);
}

/**
 * A fence that is still open, as in the middle of an answer, takes the rest.
 *
 * @param {string[]} lines
 * @param {number} at
 * @param {string} fence
 * @param {string} language
 * @returns {[Block, number]}
 */
function codeAt(lines, at, fence, language) {
  let end = at + 1;
  while (end < lines.length && !closes(lines[end] ?? "", fence)) end++;
  return [{ kind: "code", language, text: lines.slice(at + 1, end).join("\n") }, Math.min(end + 1, lines.length)];
}

/**
 * @param {string} line
 * @param {string} fence
 */
function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === (fence[0] ?? "`").repeat(text.length);
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 * @returns {[Block, number]}
 */
function quoteAt(lines, at, depth) {
  let end = at;
  while (end < lines.length && lines[end]?.startsWith(">")) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(/^> ?/, ""));
  return [{ kind: "quote", blocks: blocksOf(inner, depth + 1).map(({ block }) => block) }, end];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @param {number} depth
 * @returns {[Block, number]}
 */
function listAt(lines, at, depth) {
  const number = ITEM.exec(lines[at] ?? "")?.[3];
  const isOrdered = number !== undefined;
  /** @type {string[][]} */
  const items = [];
  let end = at;
  while (end < lines.length) {
    const marker = ITEM.exec(lines[end] ?? "");
    if (marker === null || (marker[3] !== undefined) !== isOrdered || RULE.test(lines[end] ?? "")) break;
    const indent = (marker[1]?.length ?? 0) + (marker[2]?.length ?? 1) + 1;
    const item = [(lines[end] ?? "").slice(marker[0].length)];
    end++;
    // What is indented belongs to the item, and so do blank lines in front of it.
    for (;;) {
      let next = end;
      while (next < lines.length && blank(lines[next])) next++;
      const line = lines[next];
      if (line === undefined) break;
      const width = line.length - line.trimStart().length;
      const continues = next === end && !ITEM.test(line) && !interrupts(lines, next, depth);
      if (width < Math.min(indent, 2) && !continues) break;
      while (end < next) {
        item.push("");
        end++;
      }
      item.push(line.slice(Math.min(width, indent)));
      end++;
    }
    items.push(item);
    // A blank line between two items of one list.
    let next = end;
    while (next < lines.length && blank(lines[next])) next++;
    if (next < lines.length && ITEM.test(lines[next] ?? "")) end = next;
  }
  const start = isOrdered ? Number(number) : null;
  const inner = items.map((item) => blocksOf(item, depth + 1).map(({ block }) => block));
  return [{ kind: "list", start, items: inner }, end];
}

/**
 * @param {string[]} lines
 * @param {number} at
 * @returns {[Block, number]}
 */
function tableAt(lines, at) {
  let end = at + 2;
  while (end < lines.length && !blank(lines[end]) && (lines[end] ?? "").includes("|")) end++;
  const head = cells(lines[at] ?? "");
  const rows = lines.slice(at + 2, end).map((line) => cells(line).slice(0, head.length));
  return [{ kind: "table", head, rows }, end];
}

/** @param {string} line */
function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replace(/\\\|/g, "|"));
}

/** Shows a text that grows: blocks that have not changed keep their elements. */
export class MarkdownView {
  /** @type {{source: string, node: HTMLElement}[]} */
  #shown = [];

  /** @param {HTMLElement} container whose content it is */
  constructor(container) {
    this.container = container;
  }

  /** @param {string} text */
  show(text) {
    const blocks = readBlocks(text);
    let same = 0;
    // The last one may still change its kind: "1" becomes "1. ".
    while (same < this.#shown.length && same < blocks.length && this.#shown[same]?.source === blocks[same]?.source) same++;
    for (const { node } of this.#shown.splice(same)) node.remove();
    for (const { block, source } of blocks.slice(same)) {
      const node = showBlock(block);
      this.container.append(node);
      this.#shown.push({ source, node });
    }
  }
}

/**
 * @param {Block} block
 * @returns {HTMLElement}
 */
function showBlock(block) {
  switch (block.kind) {
    case "paragraph":
      return element("p", {}, showText(block.text));
    case "heading":
      // Under the page's own headings.
      return element(block.level < 3 ? "h3" : block.level < 5 ? "h4" : "h5", {}, showText(block.text));
    case "code":
      return showCode(block.language, block.text);
    case "quote":
      return element("blockquote", {}, block.blocks.map(showBlock));
    case "rule":
      return element("hr");
    case "table":
      return showTable(block.head, block.rows);
    case "list": {
      const items = block.items.map((inner) => element("li", {}, showItem(inner)));
      if (block.start === null) return element("ul", {}, items);
      return element("ol", { start: block.start === 1 ? null : block.start }, items);
    }
  }
}

/**
 * An item of one paragraph stands without a paragraph's distance.
 *
 * @param {Block[]} blocks
 * @returns {Node[]}
 */
function showItem(blocks) {
  const [first, ...rest] = blocks;
  if (first?.kind !== "paragraph") return blocks.map(showBlock);
  return showText(first.text).concat(rest.map(showBlock));
}

/**
 * @param {string[]} head
 * @param {string[][]} rows
 */
function showTable(head, rows) {
  const row = (/** @type {"td" | "th"} */ tag, /** @type {string[]} */ texts) =>
    element("tr", {}, texts.map((text) => element(tag, tag === "th" ? { scope: "col" } : {}, showText(text))));
  const table = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, rows.map((texts) => row("td", texts))));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table);
}

/**
 * @param {string} language
 * @param {string} text
 */
function showCode(language, text) {
  const label = language === "" ? "Code" : `Code, ${language}`;
  const code = element("pre", { tabindex: 0, role: "region", "aria-label": label }, element("code", {}, text));
  const head = element("div", { class: "code-head" }, element("span", {}, language), copyButton(() => text, "Copy code"));
  return element("div", { class: "code" }, head, code);
}

/**
 * A button that copies, where the browser lets pages do that.
 *
 * @param {() => string} text
 * @param {string} label
 */
export function copyButton(text, label) {
  const button = element("button", { type: "button", class: "quiet small", "aria-label": label, hidden: !navigator.clipboard }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await navigator.clipboard.writeText(text()).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Not allowed";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

/**
 * @param {string} text
 * @returns {Node[]}
 */
function showText(text) {
  return readSpans(text).map(showSpan);
}

/**
 * @param {Span} span
 * @returns {Node}
 */
function showSpan(span) {
  switch (span.kind) {
    case "text":
      return document.createTextNode(span.text);
    case "break":
      return element("br");
    case "code":
      return element("code", {}, span.text);
    case "strong":
    case "em":
    case "del":
      return element(span.kind, {}, span.inner.map(showSpan));
    case "link": {
      const link = element("a", { href: span.url, rel: "noopener noreferrer nofollow", target: "_blank", title: span.url }, span.inner.map(showSpan));
      // A link whose words do not say where it leads is told apart by its host.
      if (span.host === null) return link;
      return element("span", {}, link, ` (${span.host})`);
    }
  }
}
