// Facets and ranges beside the results, and the filter that they make.

import { element, spoken } from "/web/dom.js";

const SHOWN = 12;

/** {field: {in: [...]} | {gte, lte}} → the server's filter, or null. */
export function filterBody(filters) {
  const parts = [];
  for (const [field, wanted] of Object.entries(filters)) {
    if (wanted.in?.length) parts.push({ field, in: wanted.in });
    for (const operator of ["gte", "lte"]) {
      if (typeof wanted[operator] === "number") parts.push({ field, [operator]: wanted[operator] });
    }
  }
  return parts.length ? { and: parts } : null;
}

function choices(column, counted, chosen, onChange) {
  const counts = new Map(counted.map(({ value, count }) => [value, count]));
  for (const value of chosen) if (!counts.has(value)) counts.set(value, 0);
  const rows = [...counts].sort((a, b) => chosen.includes(b[0]) - chosen.includes(a[0])).slice(0, Math.max(SHOWN, chosen.length));
  return rows.map(([value, count]) => element("label", {},
    element("input", { type: "checkbox", checked: chosen.includes(value), onchange: (event) => {
      const rest = chosen.filter((other) => other !== value);
      onChange(event.target.checked ? [...rest, value] : rest);
    } }),
    element("span", {}, String(value)), element("output", {}, String(count))));
}

function range(column, wanted, onChange) {
  const box = (operator, text) => element("input", { type: "number", step: "any", "aria-label": `${spoken(column.name)} ${text}`,
    placeholder: String(operator === "gte" ? column.least : column.most), value: wanted[operator] ?? "",
    onchange: (event) => onChange({ ...wanted, [operator]: event.target.value === "" ? undefined : Number(event.target.value) }) });
  return element("div", { className: "range" }, box("gte", "at least"), "–", box("lte", "at most"));
}

export function renderFilters(aside, info, facets, filters, onChange) {
  const change = (name, value) => {
    const isEmpty = value.in ? !value.in.length : value.gte === undefined && value.lte === undefined;
    if (isEmpty) delete filters[name];
    else filters[name] = value;
    onChange();
  };
  const groups = info.columns.flatMap((column) => {
    const wanted = filters[column.name] ?? {};
    let inside = [];
    if (column.kind === "number") inside = [range(column, wanted, (value) => change(column.name, value))];
    else if (column.is_facet) inside = choices(column, facets[column.name] ?? [], wanted.in ?? [], (chosen) => change(column.name, { in: chosen }));
    return inside.length ? [element("fieldset", {}, element("legend", {}, spoken(column.name)), ...inside)] : [];
  });
  const count = Object.keys(filters).length;
  const clear = count ? [element("button", { type: "button", className: "link", onclick: () => {
    for (const name of Object.keys(filters)) delete filters[name];
    onChange();
  } }, "Remove all filters")] : [];
  const isOpen = aside.querySelector("details")?.open ?? matchMedia("(min-width: 721px)").matches;
  aside.hidden = !groups.length;
  aside.replaceChildren(element("details", { open: isOpen }, element("summary", {}, count ? `Filters (${count})` : "Filters"), ...groups, ...clear));
}
