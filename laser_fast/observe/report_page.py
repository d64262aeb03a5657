"""The frame of a report: one HTML file with its style and script inside, and no network at all."""

from __future__ import annotations

from html import escape

# Okabe and Ito's palette as in curves.png, lightened where the ground is dark.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #fff; --text: #1c2128; --soft: #656d76;
  --line: #d8dee4; --grid: #eceff2; --good: #d7f3e3; --bad: #fde1dc;
  --c0: #0072b2; --c1: #d98e04; --c2: #009e73; --c3: #d55e00; --c4: #cc79a7; --c5: #56b4e9;
  --c6: #8a6d3b; --c7: #9aa1a9; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151a; --card: #181d24; --text: #e2e6ea;
  --soft: #98a1ab; --line: #30363d; --grid: #252b33; --good: #173a2a; --bad: #4a2420;
  --c0: #4aa8e0; --c1: #f0b240; --c2: #2cc496; --c3: #f28141; --c4: #e29cc4; --c5: #8fd0f5;
  --c6: #c9a86a; --c7: #6c747d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1480px; padding: 24px 28px 80px; background: var(--ground);
  color: var(--text); font: 14px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 13px; font-weight: 600; margin: 0; }
p { margin: 4px 0; } .note, .none, .facts { color: var(--soft); }
.run { display: inline-block; min-width: 18px; padding: 0 5px; border-radius: 4px; font-size: 11px;
  background: var(--grid); text-align: center; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0 0; }
.tile { flex: 1 1 150px; border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px;
  background: var(--card); }
.tile h3 { color: var(--soft); font-weight: 500; }
.tile p { font-size: 20px; font-variant-numeric: tabular-nums; white-space: nowrap; margin: 0; }
.tile small { font-size: 13px; color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 14px; }
.chart { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px 6px;
  background: var(--card); position: relative; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 12px; color: var(--soft);
  min-height: 20px; }
.key i { display: inline-block; width: 16px; margin-right: 5px; vertical-align: middle;
  border-top: 2.5px solid; }
.key i.marks { width: 9px; height: 9px; border: 0; border-radius: 50%; background: currentColor; }
.key i.area { width: 11px; height: 11px; border: 0; background: currentColor; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
path { fill: none; } .grid { stroke: var(--grid); } .axis { stroke: var(--line); }
.guide { stroke: var(--soft); stroke-dasharray: 2 4; } .cursor { stroke: var(--soft); }
.raw { stroke: currentColor; stroke-width: 0.8; opacity: 0.35; }
.line { stroke: currentColor; stroke-width: 1.9; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 6 4; } .area { fill: currentColor; }
.mark { stroke: currentColor; stroke-width: 1.8; } .mark.solid { fill: currentColor; }
.mark.hollow { fill: var(--card); }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.tip { position: absolute; top: 34px; pointer-events: none; background: var(--card); z-index: 2;
  border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; font-size: 12px;
  box-shadow: 0 2px 8px rgb(0 0 0 / 15%); white-space: nowrap; font-variant-numeric: tabular-nums; }
.tip i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 6px;
  background: currentColor; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { font-size: 12px; color: var(--soft); font-weight: 600; }
.numbers td, .numbers th { text-align: right; padding: 5px 8px; }
.numbers td { white-space: nowrap; } .numbers th { vertical-align: bottom; }
.samples { width: 100%; table-layout: fixed; min-width: 900px; }
.samples th:nth-child(1) { width: 84px; } .samples th:nth-child(2) { width: 26%; }
.samples th:nth-child(4), .samples th:nth-child(5), .samples th:nth-child(6) { width: 88px; }
.samples pre { margin: 0; max-height: 11em; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--c0); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow-y: auto; margin: 8px 0;
  font: 12.5px/1.45 ui-monospace, monospace; }
.agrees { background: var(--good); } .differs { background: var(--bad); }
.search input { font: inherit; padding: 4px 8px; width: 260px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); color: inherit; }
.count { color: var(--soft); margin-left: 8px; }
details { margin: 8px 0; } summary { cursor: pointer; }
code { font: 12.5px ui-monospace, monospace; }
"""

# `#q=text&sort=score` in the address fills the search and sorts, so that a view can be shared.
SCRIPT = """
"use strict";
const SVG = "http://www.w3.org/2000/svg";

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return step - points[low][0] < points[high][0] - step ? points[low] : points[high];
}

for (const figure of document.querySelectorAll(".chart")) {
  const {x: [left, right, first, last], series} = JSON.parse(figure.querySelector("script").text);
  const svg = figure.querySelector("svg");
  const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
  const cursor = svg.appendChild(document.createElementNS(SVG, "path"));
  cursor.setAttribute("class", "cursor");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip"; tip.hidden = true;
  svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.removeAttribute("d"); });
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * width;
    const step = first + (at - left) / (right - left) * (last - first);
    if (step < first || step > last) return;
    const x = Math.min(Math.max(at, left), right);
    cursor.setAttribute("d", `M${x} 8V${height - 24}`);
    tip.replaceChildren(...series.map(one => {
      const [where, value] = nearest(one.points, step);
      const line = document.createElement("div"), swatch = document.createElement("i");
      swatch.className = "c" + one.color;
      line.append(swatch, `${one.label} at ${+where.toPrecision(6)}: ${+value.toPrecision(4)}`);
      return line;
    }));
    tip.hidden = false;
    const shift = x / width > 0.5 ? -tip.offsetWidth - 12 : 12;
    tip.style.left = `${svg.offsetLeft + (x / width) * box.width + shift}px`;
  });
}

const table = document.querySelector("table.samples");
if (table) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const input = document.querySelector(".search input");
  const count = document.querySelector(".count");
  const search = () => {
    const wanted = input.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const text = row.cells[1].textContent + "\\n" + row.cells[2].textContent;
      row.hidden = !text.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  const sort = column => {
    const direction = heads[column].ariaSort === "ascending" ? -1 : 1;
    const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const isNumber = "v" in rows[0].cells[column].dataset;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return direction * (isNumber ? x - y : x.localeCompare(y));
    };
    heads.forEach(head => head.setAttribute("aria-sort", "none"));
    heads[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    body.append(...rows.sort(compare));
  };
  heads.forEach((head, column) => head.addEventListener("click", () => sort(column)));
  input.addEventListener("input", search);
  const asked = new URLSearchParams(location.hash.slice(1));
  input.value = asked.get("q") ?? "";
  const column = heads.findIndex(head => head.textContent === asked.get("sort"));
  if (column >= 0) sort(column);
  search();
}
document.documentElement.dataset.ready = "yes";
"""

# The browser itself then refuses whatever a sample might smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{body}\n<script>{SCRIPT}</script></body></html>\n"
    )
