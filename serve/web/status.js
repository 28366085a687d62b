// The server's own metrics, read every two seconds: nothing is stored, the lines begin when the page is opened.

import { getJson, getText } from "/web/api.js";
import { element, milliseconds, svg, useTheme } from "/web/dom.js";

const EVERY_MS = 2000;
const KEPT = 60;

const byId = (id) => document.getElementById(id);
const history = {};
let before = null;

/** Prometheus text → [{ name, labels, value }]. */
export function parseMetrics(text) {
  return text.split("\n").filter((line) => line && !line.startsWith("#")).map((line) => {
    const [, name, labels = "", value] = line.match(/^([^{\s]+)(?:\{(.*)\})?\s+(\S+)$/) ?? [];
    const pairs = [...labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, inner]) => [key, inner]);
    return { name, labels: Object.fromEntries(pairs), value: value === "+Inf" ? Infinity : Number(value) };
  });
}

const sum = (samples, name, labels = {}) => samples.filter((sample) => sample.name === name
  && Object.entries(labels).every(([key, value]) => sample.labels[key] === value)).reduce((total, { value }) => total + value, 0);

/** The value below which a share of a histogram's observations lies, linear within its bucket. */
export function quantile(buckets, share) {
  const total = buckets.at(-1)?.count ?? 0;
  if (!total) return null;
  let low = 0, below = 0;
  for (const { upTo, count } of buckets) {
    if (count >= share * total) return upTo === Infinity ? low : low + (upTo - low) * (share * total - below) / (count - below);
    [low, below] = [upTo, count];
  }
  return low;
}

function bucketsOf(samples, name, labels) {
  const found = samples.filter((sample) => sample.name === `${name}_bucket` && Object.entries(labels).every(([key, value]) => sample.labels[key] === value));
  return found.map(({ labels: { le }, value }) => ({ upTo: le === "+Inf" ? Infinity : Number(le), count: value })).sort((a, b) => a.upTo - b.upTo);
}

function line(values) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) => `${(index / (KEPT - 1)) * 100},${30 - (value / most) * 28}`).join(" ");
  return svg("svg", { viewBox: "0 0 100 32", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("polyline", { points }));
}

function tile(title, value, text, { isBad = false, kept = null } = {}) {
  if (kept !== null) history[title] = [...(history[title] ?? []), kept].slice(-KEPT);
  return element("div", { className: isBad ? "tile bad" : "tile" }, element("h2", {}, title), element("strong", {}, value),
    element("span", { className: "quiet" }, text), kept === null ? null : line(history[title]));
}

function table(head, rows) {
  const cell = (value, index) => element("td", { className: index ? "number" : "" }, value);
  return element("table", {}, element("thead", {}, element("tr", {}, ...head.map((name, index) => element("th", { scope: "col", className: index ? "number" : "" }, name)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map(cell)))));
}

const seconds = (value) => (value === null ? "–" : milliseconds(1000 * value));

function showTiles(info, samples, now) {
  const rate = (name, labels) => (before ? (sum(samples, name, labels) - sum(before.samples, name, labels)) / ((now - before.now) / 1000) : 0);
  const real = sum(samples, "tokens_total", { kind: "real" }), padding = sum(samples, "tokens_total", { kind: "padding" });
  const saved = sum(samples, "tokens_total", { kind: "shared_saved" });
  const recompiles = sum(samples, "recompiles_total");
  const requests = rate("requests_total"), tokens = rate("tokens_total", { kind: "real" });
  const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
  byId("tiles").replaceChildren(
    tile("State", info.state, info.failure ?? `ready after ${info.ready_seconds?.toFixed(1) ?? "–"} s, ${info.num_programs} programs`, { isBad: info.state !== "ready" }),
    tile("Requests a second", requests.toFixed(1), `${sum(samples, "requests_total").toLocaleString()} since the start`, { kept: requests }),
    tile("Tokens a second", Math.round(tokens).toLocaleString(), `${real.toLocaleString()} computed`, { kept: tokens }),
    tile("Queue", `${info.queue_tokens.toLocaleString()} tokens`, `429 above ${info.limits.max_queue_tokens.toLocaleString()}`, { kept: info.queue_tokens }),
    tile("Padding", share(padding, real + padding), "of the tokens that the device computes"),
    tile("Saved by the shared prefix", share(saved, real + saved), "of the tokens that items alone would need"),
    tile("Compilations after ready", String(recompiles), "must stay 0", { isBad: recompiles > 0 }),
    tile("Texts cut", sum(samples, "truncated_items_total").toLocaleString(), `of ${sum(samples, "items_scored_total").toLocaleString()} items scored`));
}

/** A histogram's rows, one for each value of its label. */
function showTimes(samples, name, label, place) {
  const names = [...new Set(samples.filter((sample) => sample.name === `${name}_count`).map((sample) => sample.labels[label]))];
  const rows = names.map((value) => {
    const labels = { [label]: value };
    const buckets = bucketsOf(samples, name, labels);
    const count = sum(samples, `${name}_count`, labels);
    return [value, count.toLocaleString(), seconds(sum(samples, `${name}_sum`, labels) / count), ...[0.5, 0.95, 0.99].map((share) => seconds(quantile(buckets, share)))];
  });
  byId(place).replaceChildren(rows.length ? table([label, "requests", "mean", "p50", "p95", "p99"], rows)
    : element("p", { className: "quiet" }, "No request yet. Percentiles are read from histogram buckets."));
}

function showRequests(samples) {
  const rows = samples.filter((sample) => sample.name === "requests_total").map(({ labels, value }) => [labels.path, labels.status, value.toLocaleString()]);
  byId("requests").replaceChildren(rows.length ? table(["path", "status", "requests"], rows) : element("p", { className: "quiet" }, "No request yet."));
}

function showQuality(info) {
  const shown = (value) => (value === null ? "–" : typeof value === "number" ? value.toFixed(3) : value);
  byId("quality").replaceChildren(info.quality.length ? table(Object.keys(info.quality[0]), info.quality.map((row) => Object.values(row).map(shown)))
    : element("p", { className: "quiet" }, "This bundle says nothing about its quality."));
}

async function refresh() {
  try {
    const [info, text] = await Promise.all([getJson("/info"), getText("/metrics")]);
    const samples = parseMetrics(text), now = performance.now();
    byId("served").textContent = `${info.name} · model ${info.model_revision}`;
    showTiles(info, samples, now);
    showTimes(samples, "stage_seconds", "stage", "stages");
    showTimes(samples, "request_seconds", "path", "latency");
    showRequests(samples);
    showQuality(info);
    before = { samples, now };
    byId("problem").hidden = true;
  } catch (error) {
    byId("problem").textContent = `${error.message} Trying again.`;
    byId("problem").hidden = false;
  }
  setTimeout(refresh, EVERY_MS);
}

useTheme(byId("theme"));
refresh();
