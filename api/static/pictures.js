// Pictures of numbers, as SVG. Their colours are the style sheet's.

import { shape } from "./elements.js";
import { SPAN } from "./rates.js";

const HEIGHT = 30;
const CELLS = 384; // of the picture of pages, at most
const WIDE = 600; // pixels, from which on more cells stand in a row
const CELL = 10;
const GAP = 2;

// Values over time, the newest at the right: a line and the area below it.
export function drawLine(svg, values) {
  const top = Math.max(1, ...values);
  const end = SPAN - 1;
  const start = SPAN - values.length;
  const height = (value) => (HEIGHT * (1 - value / top)).toFixed(2);
  const points = values.map((value, index) => `${start + index},${height(value)}`);
  svg.setAttribute("viewBox", `0 0 ${end} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren(
    shape("path", { class: "area", d: `M${start},${HEIGHT} L${points.join(" ")} L${end},${HEIGHT} Z` }),
    shape("path", { class: "stroke", d: `M${points.join(" L")}` }),
  );
}

// Each cell is one page, or as many as fit the picture: in use first, then cached, then free.
export function drawPages(svg, { total, leased, cached }) {
  const cells = Math.min(total, CELLS);
  const columns = svg.clientWidth < WIDE ? 32 : 64;
  const { children } = svg;
  if (children.length !== cells || svg.dataset.columns !== `${columns}`) layCells(svg, cells, columns);
  const share = cells / Math.max(1, total);
  const used = atLeastOne(leased * share, leased);
  const kept = Math.min(cells, used + atLeastOne(cached * share, cached));
  for (let index = 0; index < cells; index += 1) {
    const kind = index < used ? "used" : index < kept ? "cached" : "free";
    if (children[index].getAttribute("class") !== kind) children[index].setAttribute("class", kind);
  }
}

const atLeastOne = (cells, pages) => (pages ? Math.max(1, Math.round(cells)) : 0);

function layCells(svg, cells, columns) {
  const rows = Math.max(1, Math.ceil(cells / columns));
  const step = CELL + GAP;
  svg.dataset.columns = columns;
  svg.setAttribute("viewBox", `0 0 ${columns * step - GAP} ${rows * step - GAP}`);
  const place = (index) => ({
    x: (index % columns) * step, y: Math.floor(index / columns) * step,
    width: CELL, height: CELL, rx: 2,
  });
  svg.replaceChildren(...Array.from({ length: cells }, (_, index) => shape("rect", place(index))));
}

// How much of something is taken; `share` from 0 to 1. The words stand beside it.
export function bar(share) {
  return shape(
    "svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    shape("rect", { width: 100 * share, height: 10 }),
  );
}
