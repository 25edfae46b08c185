// Making and finding elements. Text becomes text nodes: nothing in this page parses HTML, and the
// content-security policy (trusted types) would refuse it.

/** @typedef {string | number | boolean | null | undefined | ((event: any) => void)} Attribute */

/**
 * A new element. Attributes that are `false`, null or undefined are left out, functions are
 * listeners of the event that they are named after. Children may come in arrays of any length.
 *
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, Attribute>} [attributes]
 * @param {...(Node | string | Node[])} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  apply(made, attributes);
  for (const child of children) {
    if (!Array.isArray(child)) made.append(child);
    else for (const inner of child) made.append(inner);
  }
  return made;
}

/**
 * As `element`, in SVG.
 *
 * @template {keyof SVGElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, Attribute>} [attributes]
 * @param {...Node} children
 * @returns {SVGElementTagNameMap[K]}
 */
export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  apply(made, attributes);
  made.append(...children);
  return made;
}

/**
 * @param {Element} made
 * @param {Record<string, Attribute>} attributes
 */
function apply(made, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, String(value));
  }
}

/**
 * The element of `index.html` with this id.
 *
 * @template {Element} T
 * @param {string} id
 * @param {new () => T} kind
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof kind)) throw new Error(`index.html has no ${kind.name} #${id}`);
  return found;
}

/** 16 random hexadecimal digits. `crypto.randomUUID` is not there over plain HTTP. */
export function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
