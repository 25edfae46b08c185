// Which patches of an image its budget kept, drawn over the image. A report is one image's entry of
// what the server tells with `"locket": {"visual": {"report": true}}`; docs/api.md describes it.

import { drawing, element } from "./dom.js";

/**
 * @typedef {object} Patches of one grid
 * @property {number} rows
 * @property {number} columns
 * @property {number[][]} boxes x, y, width, height of each patch that was kept, in pixels of the image
 */

/**
 * @typedef {object} Report
 * @property {number} width of the image in pixels
 * @property {number} height
 * @property {string} method
 * @property {number} tokens of the whole image
 * @property {number} kept of these
 * @property {Patches} base patches of the whole image, shrunk to one tile
 * @property {Patches | null} map patches of its parts
 * @property {{layer: number, kept: number}[]} stages layers before which more leave
 */

/**
 * The reports in a chunk of a stream; null if it has none.
 *
 * @param {any} chunk
 * @returns {unknown[] | null}
 */
export function reportsIn(chunk) {
  const reports = chunk.usage?.locket?.visual;
  return Array.isArray(reports) ? reports : null;
}

/** @param {unknown} value */
const isCount = (value) => typeof value === "number" && Number.isFinite(value) && value >= 0;

/**
 * What was kept in the browser; null for what is no report, so that the others stay with their images.
 *
 * @param {any} stored
 * @returns {(Report | null)[]}
 */
export function readReports(stored) {
  return Array.isArray(stored) ? stored.map(readReport) : [];
}

/**
 * @param {any} stored
 * @returns {Report | null}
 */
function readReport(stored) {
  const base = readPatches(stored?.base);
  if (base === null || ![stored.width, stored.height, stored.tokens, stored.kept].every(isCount)) return null;
  const { width, height, tokens, kept } = stored;
  const stages = Array.isArray(stored.stages) ? stored.stages.filter((/** @type {any} */ stage) => isCount(stage?.layer) && isCount(stage?.kept)) : [];
  return { width, height, tokens, kept, method: String(stored.method ?? ""), base, map: readPatches(stored.map), stages };
}

/**
 * @param {any} stored
 * @returns {Patches | null}
 */
function readPatches(stored) {
  if (!isCount(stored?.rows) || !isCount(stored?.columns) || !Array.isArray(stored.boxes)) return null;
  const isBox = (/** @type {unknown} */ box) => Array.isArray(box) && box.length === 4 && box.every(isCount);
  return { rows: stored.rows, columns: stored.columns, boxes: stored.boxes.filter(isBox) };
}

/** @param {number} count */
const number = (count) => count.toLocaleString("en");

/** @param {Report} report */
export function describeReport({ tokens, kept, method, stages }) {
  const share = tokens === 0 ? 0 : Math.round((100 * kept) / tokens);
  const words = [`${number(kept)} of ${number(tokens)} visual tokens (${share} %)`];
  if (method !== "") words.push(method);
  for (const stage of stages) words.push(`${number(stage.kept)} from layer ${stage.layer} on`);
  return words.join(", ");
}

let masks = 0;

/**
 * A veil over what was dropped.
 *
 * @param {Report} report
 * @param {Patches} patches
 * @returns {SVGSVGElement}
 */
function veil({ width, height }, patches) {
  const id = `kept-${++masks}`;
  const kept = patches.boxes.map(([x, y, across, down]) => `M${x} ${y}h${across}v${down}h${-(across ?? 0)}z`).join("");
  const whole = { x: 0, y: 0, width, height };
  return drawing(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "veil", "aria-hidden": "true" },
    drawing("mask", { id }, drawing("rect", { ...whole, fill: "#fff" }), drawing("path", { d: kept, fill: "#000" })),
    drawing("rect", { ...whole, class: "dropped", mask: `url(#${id})` }),
    drawing("path", { d: kept, class: "kept" }),
  );
}

/**
 * An image of a message, with what became of it if that is known.
 *
 * @param {string} url
 * @param {string} name
 * @param {Report | null} report
 * @returns {HTMLElement}
 */
export function showPicture(url, name, report) {
  const image = element("img", { src: url, alt: report ? `${name}; ${describeReport(report)}` : name });
  const frame = element("div", { class: "frame" }, image);
  const figure = element("figure", { class: "picture" }, frame);
  if (report) figure.append(element("figcaption", {}, switches(frame, report), element("span", {}, describeReport(report))));
  return figure;
}

/**
 * One button per grid; the one that is pressed shows its veil.
 *
 * @param {HTMLElement} frame
 * @param {Report} report
 */
function switches(frame, report) {
  /** @type {{button: HTMLButtonElement, shade: SVGSVGElement}[]} */
  const layers = [];
  const show = (/** @type {HTMLButtonElement | null} */ chosen) => {
    for (const { button, shade } of layers) {
      button.setAttribute("aria-pressed", String(button === chosen));
      shade.classList.toggle("off", button !== chosen);
    }
  };
  const add = (/** @type {string} */ name, /** @type {Patches} */ patches) => {
    const title = `Patches kept: ${number(patches.boxes.length)} of ${number(patches.rows * patches.columns)}`;
    const button = element("button", { type: "button", class: "quiet small", title }, name);
    button.addEventListener("click", () => show(button.getAttribute("aria-pressed") === "true" ? null : button));
    const shade = veil(report, patches);
    frame.append(shade);
    layers.push({ button, shade });
  };
  add(report.map ? "Kept of the whole" : "Kept patches", report.base);
  if (report.map) add("Kept of the parts", report.map);
  show(layers.at(-1)?.button ?? null);
  return element("span", { class: "switches" }, layers.map(({ button }) => button));
}
