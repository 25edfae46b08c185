// Which patches of an image its budget kept, drawn over the image. A plan is one image's entry of the
// answer's `usage.locket.visual.images`, see docs/api.md.

import { drawing, element } from "./dom.js";

/**
 * @typedef {object} Plan
 * @property {number} width of the original image in pixels
 * @property {number} height
 * @property {number} n visual tokens of the whole image
 * @property {number} kept visual tokens that the budget kept
 * @property {[number, number, number, number][]} rectangles x, y, width, height of the kept patches, in pixels
 */

/**
 * @param {any} stored
 * @returns {Plan[]} those that are well-formed
 */
export function readPlans(stored) {
  if (!Array.isArray(stored)) return [];
  const isCount = (/** @type {unknown} */ value) => typeof value === "number" && Number.isFinite(value) && value >= 0;
  return stored.filter(
    (plan) =>
      isCount(plan?.width) && isCount(plan?.height) && isCount(plan?.n) && isCount(plan?.kept) && Array.isArray(plan.rectangles) &&
      plan.rectangles.every((/** @type {unknown} */ corner) => Array.isArray(corner) && corner.length === 4 && corner.every(isCount)),
  );
}

/** @param {Plan} plan */
export function describePlan(plan) {
  const share = plan.n === 0 ? 0 : Math.round((100 * plan.kept) / plan.n);
  return `${plan.kept.toLocaleString("en")} of ${plan.n.toLocaleString("en")} visual tokens kept (${share} %)`;
}

let masks = 0;

/**
 * A veil over what was dropped.
 *
 * @param {Plan} plan
 * @returns {SVGSVGElement}
 */
function veil(plan) {
  const id = `kept-${++masks}`;
  const kept = plan.rectangles.map(([x, y, width, height]) => `M${x} ${y}h${width}v${height}h${-width}z`).join("");
  const whole = { x: 0, y: 0, width: plan.width, height: plan.height };
  return drawing(
    "svg",
    { viewBox: `0 0 ${plan.width} ${plan.height}`, preserveAspectRatio: "none", class: "veil", "aria-hidden": "true" },
    // Patches of the whole image and of its tiles overlap: a mask is their union.
    drawing("mask", { id }, drawing("rect", { ...whole, fill: "#fff" }), drawing("path", { d: kept, fill: "#000" })),
    drawing("rect", { ...whole, class: "dropped", mask: `url(#${id})` }),
    drawing("path", { d: kept, class: "kept" }),
  );
}

/**
 * An image of a message, with its plan if there is one.
 *
 * @param {string} url
 * @param {string} name
 * @param {Plan | null} plan
 * @returns {HTMLElement}
 */
export function showPicture(url, name, plan) {
  const image = element("img", { src: url, alt: plan ? `${name}; ${describePlan(plan)}` : name });
  const frame = element("div", { class: "frame" }, image);
  const figure = element("figure", { class: "picture" }, frame);
  if (plan) {
    const shade = veil(plan);
    frame.append(shade);
    const toggle = element("button", { type: "button", class: "quiet small", "aria-pressed": "true" }, "Kept patches");
    toggle.addEventListener("click", () => {
      const shown = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", String(shown));
      shade.classList.toggle("off", !shown);
    });
    figure.append(element("figcaption", {}, toggle, " ", describePlan(plan)));
  }
  return figure;
}
