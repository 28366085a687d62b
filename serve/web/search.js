// The search page: what is asked, what is shown, and the keyboard. The address holds the question, so that it can be shared.

import { ApiError, getJson, search } from "/web/api.js";
import { element, useTheme } from "/web/dom.js";
import { filterBody, renderFilters } from "/web/filters.js";
import { comparison, hit, timings } from "/web/results.js";

const PAGE = 10;

const byId = (id) => document.getElementById(id);
const results = byId("results");
const state = { query: "", mode: "ranked", order: "", filters: {} };
let info = null;
let running = null;
let retryTimer = null;

const announce = (text) => { byId("announce").textContent = text; };

function notice(title, text, { isBad = false, actions = [] } = {}) {
  return element("div", { className: isBad ? "notice bad" : "notice", role: isBad ? "alert" : null },
    element("h2", {}, title), element("p", {}, text), ...actions);
}

function chips(texts) {
  return element("ul", { className: "chips" }, ...texts.map((text) => element("li", {},
    element("button", { type: "button", className: "chip", onclick: () => ask(text) }, text))));
}

function showStart() {
  byId("filters").hidden = true;
  results.replaceChildren(notice(`Search ${info.num_documents.toLocaleString()} documents`,
    `Ask in your own words; every result says why it is there. ${info.order_reason}`,
    { actions: info.examples.length ? [element("p", { className: "quiet" }, "For example:"), chips(info.examples)] : [] }));
}

function showError(error) {
  const seconds = error.retrySeconds;
  const titles = { 0: "No connection", 400: "This request cannot be answered", 429: "The server is busy", 503: "The server is getting ready" };
  const wait = seconds === null || error.status === 400 ? "" : ` Trying again in ${Math.ceil(seconds)} s.`;
  const again = element("button", { type: "button", className: "primary", onclick: () => run() }, "Try again");
  results.replaceChildren(notice(titles[error.status] ?? "Something went wrong", error.message + wait, { isBad: true, actions: [again] }));
  announce(error.message);
  if (wait) retryTimer = setTimeout(run, 1000 * Math.max(seconds, 1));
}

function showNothing() {
  const hasFilter = filterBody(state.filters) !== null;
  const actions = hasFilter ? [element("button", { type: "button", className: "primary", onclick: clearFilters }, "Remove the filters")] : [];
  results.replaceChildren(notice("Nothing found", hasFilter ? "No document passes these filters." : "No document was found. Try other words.", { actions }));
  announce("Nothing found");
}

function clearFilters() {
  state.filters = {};
  run();
}

function showRanked(reply) {
  renderFilters(byId("filters"), info, reply.facets, state.filters, () => run());
  if (!reply.results.length) return showNothing();
  const list = element("ol", { className: "hits" }, ...reply.results.map((result) => hit(result, state.query, info, reply.order)));
  const more = element("button", { type: "button", className: "chip", onclick: () => showMore(list, more) }, "More results");
  more.dataset.cursor = reply.cursor ?? "";
  const read = reply.depth_used.rank ? `${reply.depth_used.rank} read by the ranker` : "the ranker not asked";
  const text = `${reply.total} candidates in the order ${reply.order}, ${read}`;
  const starved = reply.starved ? element("p", { className: "quiet" }, "The filter leaves fewer documents than were asked for.") : null;
  results.replaceChildren(element("div", { className: "summary" }, element("span", { className: "quiet" }, text)), ...timings(reply),
    ...[starved, list, reply.cursor ? element("p", {}, more) : null].filter(Boolean));
  announce(`${reply.total} results`);
}

async function showMore(list, button) {
  button.disabled = true;
  try {
    const reply = await search({ ...requestBody(), cursor: button.dataset.cursor });
    list.append(...reply.results.map((result) => hit(result, state.query, info, reply.order)));
    button.dataset.cursor = reply.cursor ?? "";
    button.hidden = !reply.cursor;
  } catch (error) {
    if (error.status === 410) return run();
    button.after(element("span", { className: "quiet", role: "alert" }, ` ${error.message}`));
  } finally {
    button.disabled = false;
  }
}

function requestBody() {
  const body = { query: state.query, top_k: PAGE, explain: true, facets: info.columns.filter((column) => column.is_facet).map((column) => column.name) };
  const filter = filterBody(state.filters);
  return { ...body, ...(filter ? { filter } : {}), ...(state.order && state.mode === "ranked" ? { order: state.order } : {}) };
}

/** The columns of the comparison: each source alone, the first stage that joins them, the best order with the ranker. */
function systems() {
  const columns = [["BM25", "bm25"], ["Embedding", "encoder"], [`Fused: ${info.first_stage}`, info.first_stage],
    [info.ranked_order === "ranker" ? "Ranker" : `Ranker: ${info.ranked_order}`, info.ranked_order]];
  return columns.some(([, order]) => order === info.order) ? columns : [...columns, [info.order, info.order]];
}

function fillOrders() {
  const options = info.orders.map((order) => {
    const value = order["validation_ndcg@10"]?.value;
    const label = `${order.name}${value === undefined ? "" : `, NDCG@10 ${value.toFixed(3)}`}`;
    return element("option", { value: order.name === info.order ? "" : order.name }, order.name === info.order ? `${label} (served)` : label);
  });
  byId("order").replaceChildren(...options);
  if (!info.orders.some((order) => order.name === state.order && order.name !== info.order)) state.order = "";
  byId("order").value = state.order;
}

async function compare(signal) {
  const lists = await Promise.all(systems().map(async ([name, order]) => {
    try {
      return { name, ...(await search({ ...requestBody(), order }, signal)) };
    } catch (error) {
      if (error.name === "AbortError" || order === info.order) throw error;
      return { name, order, results: [], error };
    }
  }));
  const ranked = lists.findLast((list) => !list.error);
  if (!ranked) throw lists[0].error;
  renderFilters(byId("filters"), info, ranked.facets, state.filters, () => run());
  if (lists.every((list) => !list.results.length)) return showNothing();
  results.replaceChildren(...timings(ranked), comparison(lists, info, PAGE));
  announce(`${lists.length} orders side by side`);
}

async function run() {
  clearTimeout(retryTimer);
  running?.abort();
  writeAddress();
  for (const button of document.querySelectorAll("[data-mode]")) button.ariaPressed = String(button.dataset.mode === state.mode);
  try {
    if (!info) {
      info = await load();
      fillOrders();
    }
    if (!state.query.trim()) return showStart();
    const controller = new AbortController();
    running = controller;
    results.ariaBusy = "true";
    const waiting = setTimeout(() => results.replaceChildren(...[1, 2, 3].map(() => element("div", { className: "skeleton" }))), 150);
    try {
      if (state.mode === "compare") await compare(controller.signal);
      else showRanked(await search(requestBody(), controller.signal));
    } finally {
      clearTimeout(waiting);
      if (running === controller) results.ariaBusy = "false";
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    showError(error);
  }
}

async function load() {
  const found = await getJson("/info");
  byId("served").textContent = `${found.name} · ${found.num_documents.toLocaleString()} documents · model ${found.model_revision}`;
  byId("query").placeholder = found.examples[0] ?? "Search";
  document.title = `${found.name} · jaxsearch`;
  byId("order").title = found.order_reason;
  return found;
}

function ask(text) {
  byId("query").value = text;
  state.query = text;
  state.filters = {};
  run();
}

function writeAddress() {
  const address = new URLSearchParams();
  if (state.query) address.set("q", state.query);
  if (state.mode !== "ranked") address.set("mode", state.mode);
  if (state.order) address.set("order", state.order);
  if (Object.keys(state.filters).length) address.set("filters", JSON.stringify(state.filters));
  const wanted = address.size ? `?${address}` : location.pathname;
  if (wanted !== (location.search || location.pathname)) history.pushState(null, "", wanted);
}

function readAddress() {
  const address = new URLSearchParams(location.search);
  state.query = address.get("q") ?? "";
  state.mode = address.get("mode") === "compare" ? "compare" : "ranked";
  state.order = address.get("order") ?? "";
  try {
    const given = Object.entries(JSON.parse(address.get("filters") ?? "{}") ?? {});
    state.filters = Object.fromEntries(given.filter(([, wanted]) => wanted && typeof wanted === "object"
      && (Array.isArray(wanted.in) || typeof wanted.gte === "number" || typeof wanted.lte === "number")));
  } catch {
    state.filters = {};
  }
  byId("query").value = state.query;
}

function setMode(mode) {
  state.mode = mode;
  run();
}

const flipTheme = useTheme(byId("theme"));
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (byId("query").value !== state.query) state.filters = {};
  state.query = byId("query").value;
  run();
});
for (const button of document.querySelectorAll("[data-mode]")) button.addEventListener("click", () => setMode(button.dataset.mode));
byId("help").addEventListener("click", () => byId("keys").showModal());
byId("order").addEventListener("change", () => { state.order = byId("order").value; setMode("ranked"); });
addEventListener("popstate", () => { readAddress(); if (info) fillOrders(); run(); });
addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea, select");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (event.key === "Escape" && isTyping) return event.target.blur();
  if (isTyping) return;
  const hits = [...results.querySelectorAll(".hit")];
  const at = hits.indexOf(document.activeElement.closest(".hit"));
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  if (event.key === "/") { event.preventDefault(); byId("query").select(); }
  else if (event.key === "?") byId("keys").showModal();
  else if (event.key === "c") setMode(state.mode === "compare" ? "ranked" : "compare");
  else if (event.key === "d") flipTheme();
  else if (step && hits.length) { event.preventDefault(); hits[Math.max(0, Math.min(hits.length - 1, at + step))].focus(); }
  else if (event.key === "Enter" && document.activeElement.matches(".hit")) {
    const details = document.activeElement.querySelector(".why");
    if (details) details.open = !details.open;
  }
});

readAddress();
run();
