// The server's state, drawn small. Every figure is read from `/metrics`, so that it is the one that
// dashboards show; docs/metrics.md says what each is.

import { ApiError, readMetrics } from "./api.js";
import { byId, drawing, element } from "./dom.js";
import { parseMetrics, sum } from "./metrics_text.js";

/** @typedef {import("./metrics_text.js").Series} Series */

const INTERVAL_MS = 2000;
/** After a failure. */
const RETRY_MS = 5000;
/** Points of the curve: two minutes. */
const HISTORY = 60;
/** More blocks than this are a bar, not boxes. */
const MAX_BOXES = 48;

/** @param {number | null} value */
const count = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));

/** @param {number} bytes */
function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = bytes < 1 ? 0 : Math.min(Math.floor(Math.log2(bytes) / 10), units.length - 1);
  const value = bytes / 1024 ** power;
  return `${value < 10 && power > 0 ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** Reads and draws until the page is left; rests while it is hidden. */
export class Live {
  #state = byId("state", HTMLElement);
  #view = byId("live", HTMLElement);
  /** @type {number[]} */
  #rates = [];
  /** @type {{tokens: number, at: number} | null} */
  #last = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #timer;

  /**
   * @param {() => string} key
   * @param {() => void} onRead the server has answered
   */
  constructor(key, onRead) {
    this.key = key;
    this.onRead = onRead;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.refresh();
    });
    this.refresh();
  }

  /** Reads now, and then again and again. */
  async refresh() {
    clearTimeout(this.#timer);
    const wait = await this.#read();
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.refresh(), wait);
  }

  /** @returns {Promise<number>} milliseconds until the next time */
  async #read() {
    let families;
    try {
      families = parseMetrics(await readMetrics(this.key()));
    } catch (error) {
      const needsKey = error instanceof ApiError && error.status === 401;
      this.#say(needsKey ? "needs a key" : "unreachable", "down");
      this.#view.replaceChildren(element("p", { class: "note" }, needsKey ? "The metrics need an API key." : "No figures."));
      this.#last = null;
      return RETRY_MS;
    }
    this.onRead();
    const running = sum(families, "vllm:num_requests_running");
    const waiting = sum(families, "vllm:num_requests_waiting");
    if ((waiting ?? 0) > 0) this.#say(`${count(running)} running, ${count(waiting)} waiting`, "busy");
    else if ((running ?? 0) > 0) this.#say(`${count(running)} running`, "running");
    else this.#say("idle", "idle");
    this.#measure(sum(families, "vllm:generation_tokens_total") ?? 0);
    this.#draw(families);
    return INTERVAL_MS;
  }

  /**
   * @param {string} text
   * @param {string} state
   */
  #say(text, state) {
    if (this.#state.textContent !== text) this.#state.textContent = text;
    this.#state.dataset.state = state;
  }

  /** @param {number} tokens all that were generated since the server's start */
  #measure(tokens) {
    const at = performance.now();
    if (this.#last !== null && tokens >= this.#last.tokens) {
      this.#rates.push(((tokens - this.#last.tokens) * 1000) / Math.max(at - this.#last.at, 1));
      if (this.#rates.length > HISTORY) this.#rates.shift();
    }
    this.#last = { tokens, at };
  }

  /** @param {Map<string, Series[]>} families */
  #draw(families) {
    const rate = this.#rates.at(-1) ?? 0;
    const figures = element(
      "dl",
      { class: "figures" },
      figure("Running", count(sum(families, "vllm:num_requests_running"))),
      figure("Waiting", count(sum(families, "vllm:num_requests_waiting"))),
      figure("Tokens/s", rate < 10 && rate > 0 ? rate.toFixed(1) : count(rate)),
      figure("Folded tokens", count(sum(families, "locket_folded_tokens_total"))),
    );
    this.#view.replaceChildren(figures, curve(this.#rates), blocks(families), memory(families));
  }
}

/**
 * @param {string} name
 * @param {string} value
 */
function figure(name, value) {
  return element("div", {}, element("dt", {}, name), element("dd", {}, value));
}

/** @param {number[]} rates */
function curve(rates) {
  const top = Math.max(...rates, 1);
  const offset = HISTORY - rates.length;
  const points = rates.map((rate, index) => `${offset + index + 0.5},${(29 - (27 * rate) / top).toFixed(1)}`);
  return drawing(
    "svg",
    { viewBox: `0 0 ${HISTORY} 30`, preserveAspectRatio: "none", class: "curve", "aria-hidden": "true" },
    drawing("line", { x1: 0, y1: 29.5, x2: HISTORY, y2: 29.5, class: "ground" }),
    drawing("polyline", { points: points.join(" ") }),
  );
}

/** @param {Map<string, Series[]>} families */
function blocks(families) {
  const series = families.get("locket_blocks") ?? [];
  const classes = [...new Set(series.map(({ labels }) => labels.class ?? ""))].sort((a, b) => Number(a) - Number(b));
  const rows = classes.map((name) => {
    const used = sum(families, "locket_blocks", { class: name, state: "used" }) ?? 0;
    const free = sum(families, "locket_blocks", { class: name, state: "free" }) ?? 0;
    const title = element("span", {}, `${count(Number(name))} slots`);
    const words = element("span", { class: "amount" }, `${count(used)} / ${count(used + free)}`);
    return element("li", {}, title, boxes(used, used + free), words);
  });
  const title = element("h3", { id: "blocks-title" }, "Blocks in use");
  const view = element("div", {}, title, element("ul", { class: "blocks", "aria-labelledby": "blocks-title" }, rows));
  const reserved = sum(families, "locket_cache_bytes", { state: "reserved" });
  const full = sum(families, "locket_full_cache_bytes");
  if (reserved !== null && full !== null) {
    const amount = (/** @type {number} */ bytes) => element("span", { class: "amount" }, size(bytes));
    view.append(element("p", { class: "compare" }, "They hold ", amount(reserved), "; a full cache would hold ", amount(full), "."));
  }
  return view;
}

/**
 * @param {number} used
 * @param {number} total
 */
function boxes(used, total) {
  const columns = total > MAX_BOXES ? 1 : Math.max(total, 1);
  const width = 96 / columns;
  const gap = columns === 1 ? 0 : Math.min(2, width / 4);
  const cells = [];
  for (let index = 0; index < columns; index++) {
    const share = columns === 1 ? used / Math.max(total, 1) : index < used ? 1 : 0;
    const place = { x: index * width, y: 0, height: 10 };
    cells.push(drawing("rect", { ...place, width: Math.max(width - gap, 0.5), class: "free" }));
    if (share > 0) cells.push(drawing("rect", { ...place, width: Math.max((width - gap) * share, 0.5), class: "used" }));
  }
  return drawing("svg", { viewBox: "0 0 96 10", preserveAspectRatio: "none", class: "boxes", "aria-hidden": "true" }, ...cells);
}

/** @param {Map<string, Series[]>} families */
function memory(families) {
  const pools = (families.get("locket_memory_bytes") ?? []).map(({ labels, value }) => ({ name: labels.pool ?? "", value }));
  const total = pools.reduce((all, pool) => all + pool.value, 0);
  let x = 0;
  const parts = pools.map(({ name, value }) => {
    const width = total === 0 ? 0 : (100 * value) / total;
    const part = drawing("rect", { x, y: 0, width: Math.max(width - 0.6, 0.2), height: 8, class: `pool ${/^[a-z]+$/.test(name) ? name : "other"}` });
    x += width;
    return part;
  });
  const words = pools.map(({ name, value }) => element("li", {}, element("span", { class: `key ${/^[a-z]+$/.test(name) ? name : "other"}` }), `${name} `, element("span", { class: "amount" }, size(value))));
  const resident = sum(families, "process_resident_memory_bytes");
  if (resident !== null) words.push(element("li", {}, element("span", { class: "key" }), "process ", element("span", { class: "amount" }, size(resident))));
  return element(
    "div",
    {},
    element("h3", { id: "memory-title" }, `Memory planned: ${size(total)}`),
    drawing("svg", { viewBox: "0 0 100 8", preserveAspectRatio: "none", class: "pools", "aria-hidden": "true" }, ...parts),
    element("ul", { class: "legend", "aria-labelledby": "memory-title" }, words),
  );
}
