// How replies of /v1/search look: hits, timings, facets, orders side by side.

import { element, milliseconds, spoken } from "/web/dom.js";

const STAGES = ["queue", "encode", "retrieve", "fuse", "tokenize", "rank"];
const LONG_LISTS = 3;

const COMMON = new Set(["and", "are", "for", "from", "into", "not", "or", "that", "the", "this", "to", "with"]);

/** "repairing", "repairs" and "repaired" are one word. */
const stem = (word) => word.toLowerCase().replace(/(ing|ed|es|s|e)$/u, "");

/** The query's words that are worth marking, as stems. */
export function stems(query) {
  const words = query.toLowerCase().match(/[\p{L}\p{N}]{2,}/gu) ?? [];
  return new Set(words.filter((word) => !COMMON.has(word)).map(stem));
}

function marked(text, wanted) {
  const parts = [];
  for (const piece of String(text).split(/([\p{L}\p{N}]+)/u)) {
    parts.push(piece && wanted.has(stem(piece)) ? element("mark", {}, piece) : piece);
  }
  return parts;
}

const holds = (value, wanted) =>
  String(value).split(/[^\p{L}\p{N}]+/u).some((word) => word && wanted.has(stem(word)));

const asList = (value) => (Array.isArray(value) ? value : [value]);

const LONGEST_TITLE = 120;

/** The first field of the ranker's view, shortened where it is a whole text; the id where it is empty. */
export function titleOf(result, info) {
  const title = asList(result.fields[info.views[info.default_view][0]] ?? "").join(" ").trim() || result.id;
  return title.length > LONGEST_TITLE ? `${title.slice(0, LONGEST_TITLE).replace(/\s+\S*$/u, "")} …` : title;
}

function scoreBadge(result) {
  if (result.score === null) return element("span", { className: "quiet", title: "below the ranking depth" }, "not ranked");
  const isCalibrated = (result.scores.relevance?.calibrated ?? null) !== null;
  const grade = isCalibrated ? Math.min(4, Math.floor(result.score * 5)) : 0;
  const meaning = isCalibrated ? "calibrated probability of relevance" : "score of this order, not calibrated";
  return element("span", { className: `score grade-${grade}`, title: meaning }, result.score.toFixed(3));
}

function why(result, order) {
  const { sources, signals, fused, tokens } = result.explain;
  const relevance = result.scores.relevance;
  const rows = Object.entries(sources).map(([name, found]) => [name, found.rank, found.score.toFixed(4)]);
  if (fused.order !== order) rows.push([`first stage: ${fused.order}`, fused.rank, fused.score.toFixed(4)]);
  if (signals.ranker !== null) rows.push(["ranker (yes − no)", "", signals.ranker.toFixed(4)]);
  if (relevance) rows.push([`order: ${order}`, result.rank, relevance.raw.toFixed(4)]);
  if ((relevance?.calibrated ?? null) !== null) rows.push(["calibrated", "", relevance.calibrated.toFixed(3)]);
  const cells = rows.map(([name, rank, score]) => element("tr", {}, element("th", { scope: "row" }, name),
    element("td", { className: "number" }, String(rank)), element("td", { className: "number" }, score)));
  const head = element("tr", {}, element("th", { scope: "col" }, "where"), element("th", { scope: "col", className: "number" }, "rank"),
    element("th", { scope: "col", className: "number" }, "score"));
  const moved = fused.rank - result.rank;
  const story = fused.order === order ? `Sorted by ${order}, without the ranker.` : signals.ranker === null ? "The ranker did not look at it."
    : moved === 0 ? "The ranker left it where retrieval put it." : `The ranker moved it ${moved > 0 ? "up" : "down"} by ${Math.abs(moved)}.`;
  const read = tokens === null ? "" : ` It read ${tokens} tokens${result.truncated ? ", the text cut at the limit" : ""}.`;
  return element("details", { className: "why" }, element("summary", {}, "Why this result"),
    element("p", { className: "quiet" }, story + read),
    element("div", { className: "scroll" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...cells))));
}

export function hit(result, query, info, order) {
  const wanted = stems(query);
  const [titleField, ...shown] = info.views[info.default_view];
  const names = Object.keys(result.fields);
  const matched = names.filter((name) => holds(asList(result.fields[name]).join(" "), wanted));
  const body = shown.filter((name) => name in result.fields).map((name) => element("p", {}, ...marked(asList(result.fields[name]).join("; "), wanted)));
  const rest = names.filter((name) => name !== titleField && !shown.includes(name));
  const excerpts = rest.filter((name) => matched.includes(name)).flatMap((name) => {
    const found = asList(result.fields[name]).filter((part) => holds(part, wanted)).slice(0, LONG_LISTS);
    return [element("dt", {}, spoken(name)), ...found.map((part) => element("dd", {}, ...marked(part, wanted)))];
  });
  const everything = rest.flatMap((name) => [element("dt", {}, spoken(name)),
    ...asList(result.fields[name]).map((part) => element("dd", {}, ...marked(part, wanted)))]);
  const tags = [...result.matched.map((source) => `found by ${source}`), ...matched.map((name) => `words in ${spoken(name)}`)];
  return element("li", {}, element("article", { className: "hit", tabIndex: -1, "aria-label": `Result ${result.rank}` },
    element("header", {}, element("span", { className: "rank" }, String(result.rank)),
      element("h3", {}, ...marked(titleOf(result, info), wanted)), scoreBadge(result)),
    ...body,
    excerpts.length ? element("dl", {}, ...excerpts) : null,
    element("ul", { className: "tags" }, ...tags.map((tag) => element("li", {}, tag))),
    result.explain ? why(result, order) : null,
    everything.length ? element("details", { className: "more" }, element("summary", {}, "All fields"), element("dl", {}, ...everything)) : null));
}

export function timings(reply) {
  const stated = reply.timings_ms;
  const parts = STAGES.filter((name) => name in stated).map((name) => [name, stated[name]]);
  const known = parts.reduce((sum, [, value]) => sum + value, 0);
  if (stated.total > known) parts.push(["other", stated.total - known]);
  const bar = element("div", { className: "stages", role: "img", "aria-label": `Server time ${milliseconds(stated.total)}` });
  for (const [name, value] of parts) {
    const piece = element("i", { title: `${name} ${milliseconds(value)}` });
    piece.style.flexGrow = value;
    piece.style.background = `var(--stage-${name})`;
    bar.append(piece);
  }
  const legend = parts.map(([name, value]) => {
    const swatch = element("i");
    swatch.style.background = `var(--stage-${name})`;
    return element("li", {}, swatch, `${name} ${milliseconds(value)}`);
  });
  return [bar, element("ul", { className: "legend" }, ...legend,
    element("li", {}, `server ${milliseconds(stated.total)}, with the network ${milliseconds(reply.round_trip_ms)}`))];
}

/** Lists side by side; arrows say how the ranker moved what the first stage found, a label which list is served. */
export function comparison(lists, info, counts) {
  const columns = lists.map(({ name, order, results, error }) => {
    const served = order === info.order ? element("span", { className: "chip served" }, "served") : null;
    const title = element("h2", {}, name, served);
    if (error) return element("section", {}, title, element("p", { className: "quiet" }, error.message));
    const items = results.slice(0, counts).map((result) => {
      const item = element("li", { tabIndex: 0 }, element("span", { className: "rank" }, String(result.rank)), element("span", { className: "title" }, titleOf(result, info)));
      item.dataset.id = result.id;
      if (result.explain.fused.order !== order) {
        const moved = result.explain.fused.rank - result.rank;
        const way = moved > 0 ? "up" : moved < 0 ? "down" : "";
        item.append(element("span", { className: `move ${way}`, title: "against the order of the first stage" },
          moved > 0 ? `▲ ${moved}` : moved < 0 ? `▼ ${-moved}` : "="), scoreBadge(result));
      }
      return item;
    });
    return element("section", {}, title, items.length ? element("ol", {}, ...items) : element("p", { className: "quiet" }, "Nothing found."));
  });
  const grid = element("div", { className: "compare" }, ...columns);
  const light = (id) => { for (const item of grid.querySelectorAll("li")) item.classList.toggle("same", item.dataset.id === id); };
  for (const event of ["pointerover", "focusin"]) grid.addEventListener(event, (found) => light(found.target.closest("li")?.dataset.id ?? null));
  grid.addEventListener("pointerleave", () => light(null));
  return grid;
}
