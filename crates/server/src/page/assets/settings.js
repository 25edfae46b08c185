// The controls of a request. Each is one row of a table: what is empty is not sent, so the server's own
// default holds. An error that names a field marks its control.

import { byId, element } from "./dom.js";

const STORED = "locket.settings";

/**
 * @typedef {object} Control
 * @property {string} key path in the request's body
 * @property {string} label
 * @property {"sampling" | "memory" | "visual"} group id of the element that it stands in
 * @property {"number" | "integer" | "choice"} kind
 * @property {number} [min]
 * @property {number} [max]
 * @property {number} [step]
 * @property {readonly string[]} [choices]
 */

/** @type {readonly Control[]} */
const CONTROLS = [
  { key: "temperature", label: "Temperature", group: "sampling", kind: "number", min: 0, max: 2, step: 0.05 },
  { key: "top_p", label: "Top p", group: "sampling", kind: "number", min: 0, max: 1, step: 0.05 },
  { key: "top_k", label: "Top k", group: "sampling", kind: "integer", min: -1 },
  { key: "min_p", label: "Min p", group: "sampling", kind: "number", min: 0, max: 1, step: 0.01 },
  { key: "repetition_penalty", label: "Repetition penalty", group: "sampling", kind: "number", min: 0.01, max: 10, step: 0.05 },
  { key: "frequency_penalty", label: "Frequency penalty", group: "sampling", kind: "number", min: -2, max: 2, step: 0.1 },
  { key: "presence_penalty", label: "Presence penalty", group: "sampling", kind: "number", min: -2, max: 2, step: 0.1 },
  { key: "seed", label: "Seed", group: "sampling", kind: "integer" },
  { key: "max_tokens", label: "Answer tokens", group: "sampling", kind: "integer", min: 1 },
  {
    key: "reasoning_effort",
    label: "Thinking",
    group: "sampling",
    kind: "choice",
    choices: ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
  },
  { key: "locket.kv_cache.method", label: "Cache method", group: "memory", kind: "choice", choices: [] },
  { key: "locket.kv_cache.slots", label: "Slots", group: "memory", kind: "integer", min: 16 },
  { key: "locket.require_exact", label: "Only exact", group: "memory", kind: "choice", choices: ["true", "false"] },
  { key: "locket.visual.method", label: "Dropping method", group: "visual", kind: "choice", choices: [] },
  { key: "locket.visual.budget", label: "Share, or tokens", group: "visual", kind: "number", min: 0.001, step: 0.05 },
];

/** One row of the table, on the page. */
class Field {
  /** @param {Control} control */
  constructor(control) {
    this.control = control;
    const id = `field-${control.key.replaceAll(".", "-")}`;
    this.problem = element("span", { id: `${id}-problem`, class: "problem", hidden: true });
    /** @type {HTMLInputElement | HTMLSelectElement} */
    this.input =
      control.kind === "choice"
        ? element("select", { id, "aria-describedby": this.problem.id })
        : element("input", {
            id,
            type: "number",
            min: control.min,
            max: control.max,
            step: control.kind === "integer" ? 1 : "any",
            inputmode: control.kind === "integer" ? "numeric" : "decimal",
            placeholder: "default",
            "aria-describedby": this.problem.id,
          });
    this.setChoices(control.choices ?? [], null);
    this.row = element("div", { class: "field" }, element("label", { for: id }, control.label), this.input, this.problem);
  }

  /**
   * @param {readonly string[]} choices
   * @param {string | null} preset what the server takes
   */
  setChoices(choices, preset) {
    if (!(this.input instanceof HTMLSelectElement)) return;
    const chosen = this.input.value;
    const word = (/** @type {string} */ choice) => ({ true: "yes", false: "no" })[choice] ?? choice;
    const first = element("option", { value: "" }, preset === null ? "default" : `default (${word(preset)})`);
    this.input.replaceChildren(first, ...choices.map((choice) => element("option", { value: choice }, word(choice))));
    this.input.value = choices.includes(chosen) ? chosen : "";
  }

  /**
   * @param {{min?: number, max?: number, preset?: number | string | null}} limits
   */
  setLimits({ min, max, preset }) {
    if (!(this.input instanceof HTMLInputElement)) return;
    if (min !== undefined) this.input.min = String(min);
    if (max !== undefined) this.input.max = String(max);
    if (preset !== undefined && preset !== null) this.input.placeholder = String(preset);
  }

  /** What is wrong with the value, in words; null if nothing is. */
  fault() {
    const { input } = this;
    if (!(input instanceof HTMLInputElement) || input.validity.valid) return null;
    if (input.validity.badInput) return "must be a number";
    if (input.validity.stepMismatch) return "must be a whole number";
    if (input.validity.rangeUnderflow) return `must be at least ${input.min}`;
    if (input.validity.rangeOverflow) return `must be at most ${input.max}`;
    return input.validationMessage;
  }

  /** @param {string | null} text */
  mark(text) {
    this.problem.textContent = text ?? "";
    this.problem.hidden = text === null;
    if (text === null) this.input.removeAttribute("aria-invalid");
    else this.input.setAttribute("aria-invalid", "true");
  }

  /** What is sent; undefined: nothing. */
  value() {
    const text = this.input.value.trim();
    if (text === "") return undefined;
    if (this.control.kind !== "choice") return Number(text);
    return this.control.key === "locket.require_exact" ? text === "true" : text;
  }
}

/** All controls. */
export class Settings {
  #fields = CONTROLS.map((control) => new Field(control));
  #visualSection = byId("visual-section", HTMLDetailsElement);
  /** By key; those of choices are known before the choices are. @type {Map<string, string>} */
  #stored = load();

  constructor() {
    for (const field of this.#fields) {
      byId(field.control.group, HTMLElement).append(field.row);
      field.input.value = this.#stored.get(field.control.key) ?? "";
      field.input.addEventListener("input", () => {
        field.mark(field.fault());
        this.#stored.set(field.control.key, field.input.value);
        this.#save();
      });
    }
    byId("defaults", HTMLButtonElement).addEventListener("click", () => {
      for (const field of this.#fields) {
        field.input.value = "";
        field.mark(null);
      }
      this.#stored.clear();
      this.#save();
    });
  }

  /**
   * Takes the limits of a model: its card of `/v1/models`.
   *
   * @param {any} card
   */
  configure(card) {
    const cache = card?.locket?.kv_cache ?? {};
    const visual = card?.locket?.visual ?? null;
    this.#field("max_tokens")?.setLimits({ max: card?.max_model_len });
    this.#field("locket.kv_cache.method")?.setChoices(names(cache.methods), cache.method ?? null);
    this.#field("locket.kv_cache.slots")?.setLimits({ min: cache.min_slots, max: cache.max_slots, preset: cache.slots });
    const isExact = card?.locket?.require_exact;
    this.#field("locket.require_exact")?.setChoices(["true", "false"], typeof isExact === "boolean" ? String(isExact) : null);
    this.#visualSection.hidden = visual === null;
    this.#field("locket.visual.method")?.setChoices(names(visual?.methods), visual?.method ?? null);
    this.#field("locket.visual.budget")?.setLimits({ preset: visual?.budget });
    for (const field of this.#fields) {
      if (field.input instanceof HTMLSelectElement) {
        field.input.value = this.#stored.get(field.control.key) ?? "";
        // What this model does not know stays unset.
        if (field.input.selectedIndex < 0) field.input.selectedIndex = 0;
      }
      field.mark(field.fault());
    }
  }

  /** The first control with a wrong value, or null. */
  firstFault() {
    return this.#shownFields().find((field) => field.fault() !== null)?.input ?? null;
  }

  /**
   * What the controls say, as fields of a request.
   *
   * @param {boolean} hasImages then the answer is asked to tell what became of them
   */
  requestFields(hasImages) {
    /** @type {Record<string, any>} */
    const body = hasImages && !this.#visualSection.hidden ? { locket: { visual: { report: true } } } : {};
    for (const field of this.#shownFields()) {
      const value = field.value();
      if (value === undefined) continue;
      const path = field.control.key.split(".");
      const last = path.pop() ?? "";
      let inside = body;
      for (const part of path) inside = inside[part] ??= {};
      inside[last] = value;
    }
    return body;
  }

  /**
   * Marks the control of a field that the server refused.
   *
   * @param {string} path `param` of the error
   * @param {string} message
   */
  markRefused(path, message) {
    this.#field(path)?.mark(message);
  }

  /**
   * @param {string} path of a field
   * @returns {HTMLElement | null}
   */
  control(path) {
    return this.#field(path)?.input ?? null;
  }

  #shownFields() {
    return this.#fields.filter((field) => field.control.group !== "visual" || !this.#visualSection.hidden);
  }

  /** @param {string} key */
  #field(key) {
    return this.#fields.find((field) => field.control.key === key);
  }

  #save() {
    const values = [...this.#stored].filter(([, value]) => value !== "");
    try {
      localStorage.setItem(STORED, JSON.stringify(Object.fromEntries(values)));
    } catch {
      // They hold until the page is left.
    }
  }
}

/**
 * @param {unknown} list
 * @returns {string[]}
 */
function names(list) {
  return Array.isArray(list) ? list.filter((name) => typeof name === "string") : [];
}

/** @returns {Map<string, string>} */
function load() {
  /** @type {Map<string, string>} */
  const values = new Map();
  try {
    const stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    for (const [key, value] of Object.entries(stored ?? {})) if (typeof value === "string") values.set(key, value);
  } catch {
    // Nothing is stored, or nothing of ours.
  }
  return values;
}
