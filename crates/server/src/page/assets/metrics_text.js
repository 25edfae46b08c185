// Reads what `/metrics` prints, so that this page shows the figures that dashboards show.

/** @typedef {{labels: Record<string, string>, value: number}} Series */

/**
 * @param {string} text of the Prometheus text format
 * @returns {Map<string, Series[]>}
 */
export function parseMetrics(text) {
  /** @type {Map<string, Series[]>} */
  const families = new Map();
  for (const line of text.split("\n")) {
    if (line === "" || line.startsWith("#")) continue;
    const match = /^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (match === null) continue;
    const [, name = "", labels = "", value = ""] = match;
    const series = families.get(name) ?? [];
    series.push({ labels: parseLabels(labels), value: parseNumber(value) });
    families.set(name, series);
  }
  return families;
}

/** @param {string} text */
function parseNumber(text) {
  if (text === "+Inf") return Infinity;
  if (text === "-Inf") return -Infinity;
  return Number(text);
}

/**
 * @param {string} text
 * @returns {Record<string, string>}
 */
function parseLabels(text) {
  /** @type {Record<string, string>} */
  const labels = Object.create(null);
  for (const [, name = "", value = ""] of text.matchAll(/([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"/g)) {
    labels[name] = value.replace(/\\(.)/g, (_, escaped) => (escaped === "n" ? "\n" : escaped));
  }
  return labels;
}

/**
 * The sum of all series of a name that have these labels; null if there is none.
 *
 * @param {Map<string, Series[]>} families
 * @param {string} name
 * @param {Record<string, string>} [labels]
 * @returns {number | null}
 */
export function sum(families, name, labels = {}) {
  const matching = (families.get(name) ?? []).filter((series) =>
    Object.entries(labels).every(([label, value]) => series.labels[label] === value),
  );
  if (matching.length === 0) return null;
  return matching.reduce((total, series) => total + series.value, 0);
}
