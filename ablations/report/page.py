"""The report's page: skeleton, style and script, one file that asks nothing of any network.

Its own policy (Content-Security-Policy) admits the one style and the one script of these hashes and data: images. Everything is
in the page as HTML before the script runs: without it nothing can be sorted, and all tasks stand below one another.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from ablations.plots import COLOURS
from data_pipelines.html_text import safe


@dataclass(frozen=True)
class Section:
    """A part of the page. `anchor`: its id; `body`: HTML."""

    anchor: str
    title: str
    body: str


def page(title: str, head: str, sections: Sequence[Section]) -> str:
    """`head`: HTML under the title."""
    style, script = f"\n{STYLE}{_palette()}", f"\n{SCRIPT}"
    allowed = f"img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    links = "".join(f'<a href="#{s.anchor}">{safe(s.title)}</a>' for s in sections)
    body = "".join(f'<section id="{s.anchor}"><h2>{safe(s.title)}</h2>{s.body}</section>\n' for s in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{safe(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{safe(title)}</h1>
{head}
<nav>{links}</nav></header>
{body}</main>
<script>{script}</script>
</body>
</html>
"""


def tabs(names: Sequence[str], bodies: Sequence[str]) -> str:
    """Bodies of which one is shown at a time; all of them on paper, and without the script."""
    if len(names) == 1:
        return bodies[0]
    buttons = "".join(f'<button type="button" aria-pressed="false">{safe(name)}</button>' for name in names)
    parts = "".join(f'<div class="tab"><h3>{safe(n)}</h3>{b}</div>' for n, b in zip(names, bodies, strict=True))
    return f'<div class="tabs"><div class="segment" hidden>{buttons}</div>{parts}</div>'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _palette() -> str:
    """The plots' colours, lighter in the dark."""
    light = "".join(f".c{i} {{ --c: {value}; }} " for i, value in enumerate(COLOURS))
    dark = "".join(f".c{i} {{ --c: color-mix(in srgb, {value} 78%, white); }} " for i, value in enumerate(COLOURS))
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}\n"


STYLE = """:root { color-scheme: light dark;
  --ink: #1f2430; --dim: #5f6878; --line: #e3e6eb; --page: #f6f7f9; --card: #fff; --soft: #eef0f4; --accent: #2f6db3;
  --good: #1f7d57; --bad: #b5471c; --some: #8a6510; --band: #1f243012; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e2e5ea; --dim: #9aa3b1; --line: #2c323c; --page: #14171c; --card: #1b1f26; --soft: #262b34; --accent: #7fb0e6;
    --good: #68c398; --bad: #eb8d68; --some: #d3ab54; --band: #ffffff12; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 12px; }
body { margin: 0; background: var(--page); color: var(--ink); 
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 80px; }
h1 { font-size: 26px; line-height: 1.25; font-weight: 650; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 650; margin: 0 0 10px; }
h3 { font-size: 15px; font-weight: 650; margin: 18px 0 8px; }
h4 { font-size: 13px; font-weight: 600; margin: 12px 0 4px; }
.about { max-width: 76ch; margin: 0 0 14px; font-size: 15px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px 24px; margin: 0 0 14px; }
.facts div { min-width: 0; }
.facts dt, .note, figcaption, small { color: var(--dim); font-size: 12px; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.banner { margin: 0 0 14px; padding: 8px 14px; border-left: 3px solid var(--some); background: var(--card);
  border-radius: 2px 8px 8px 2px; }
.banner ul { margin: 4px 0; padding-left: 20px; max-height: 260px; overflow: auto; }
pre { margin: 4px 0 12px; padding: 8px 12px; background: var(--soft); border-radius: 8px; overflow-x: auto;
  font: 12px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 6px 0 18px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; margin: 0 0 18px; }
.note { margin: 4px 0 10px; max-width: 100ch; overflow-wrap: anywhere; }
.prose { max-width: 90ch; margin: 0 0 10px; }
.notes { margin: 0; padding-left: 18px; color: var(--dim); font-size: 12px; max-width: 110ch; overflow-wrap: anywhere; }

.segment { display: flex; flex-wrap: wrap; gap: 2px; background: var(--soft); border-radius: 9px; padding: 3px;
  width: fit-content; margin: 0 0 14px; }
.segment[hidden] { display: none; }
button, input { font: inherit; color: inherit; }
.segment button { border: 0; background: none; border-radius: 7px; padding: 4px 12px; cursor: pointer; color: var(--dim); }
.segment button[aria-pressed="true"] { background: var(--card); color: var(--ink); font-weight: 550;
  box-shadow: 0 1px 2px #0003; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
.find { background: var(--card); border: 1px solid var(--line); border-radius: 7px; padding: 4px 10px; margin: 0 0 8px;
  width: min(280px, 100%); }

.scroll { overflow-x: auto; }
.scroll.many { max-height: 72vh; overflow: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: baseline;
  font-weight: 400; }
tbody:last-child tr:last-child > * { border-bottom: 0; }
thead th { color: var(--dim); font-size: 12px; position: sticky; top: 0; background: var(--card); z-index: 1;
  white-space: nowrap; }
tbody th { position: sticky; left: 0; background: var(--card); white-space: nowrap; }
thead th:first-child { left: 0; z-index: 2; }
.sortable thead th:not(:first-child), .cell thead th:not(:first-child) { text-align: right; }
thead button { border: 0; background: none; padding: 0; cursor: pointer; color: inherit; }
thead th[aria-sort] button { color: var(--ink); font-weight: 600; }
thead th[aria-sort="ascending"] button::after { content: " ↑"; }
thead th[aria-sort="descending"] button::after { content: " ↓"; }
.n { text-align: right; white-space: nowrap; }
td i { font-style: normal; color: var(--dim); font-size: 12px; }
td b { font-weight: 600; }
.whisker { opacity: .8; }
.better { color: var(--good); } .worse { color: var(--bad); }
.paper { color: var(--some); }
.control > * { color: var(--dim); }
.control th { padding-left: 16px; }
.tag { font-size: 11px; color: var(--dim); border: 1px solid var(--line); border-radius: 8px; padding: 0 7px; margin-left: 4px; }
th small { display: block; }
abbr { text-decoration: none; color: var(--some); font-weight: 600; }
.scroll.many th, .scroll.many td { padding-left: 10px; }

figure { margin: 18px 0 4px; }
figcaption { margin-top: 4px; max-width: 110ch; }
.panels { display: flex; flex-wrap: wrap; gap: 14px 22px; }
.panels > div { overflow-x: auto; max-width: 100%; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0 0 8px; font-size: 12px; }
.key { display: inline-flex; align-items: center; gap: 6px; }
.key svg { flex: none; }
svg.plot { display: block; font-size: 11px; }
svg.fits { max-width: 100%; height: auto; }
.plot text { fill: var(--dim); }
.plot .title { fill: var(--ink); font-weight: 600; font-size: 12px; } .plot .name { fill: var(--ink); }
.main { --c: var(--accent); } .ink { --c: var(--ink); }
.fill { fill: var(--c); } .stroke { stroke: var(--c); }
.plot path { fill: none; }
.grid { stroke: var(--line); } .whisker { stroke: var(--ink); stroke-width: 1.2; } .zero { stroke: var(--dim); }
.chance { stroke: var(--dim); stroke-dasharray: 4 3; fill: none; } .notch { stroke: var(--ink); stroke-width: 2; }
.soft { opacity: .55; stroke-width: 1.4; } .curve { stroke: var(--c); stroke-width: 2; } .thin { stroke: var(--c); opacity: .35; }
.band { fill: var(--band); }
.interval { stroke-width: 2; } .interval.flat { stroke: var(--dim); opacity: .7; } .interval.better { stroke: var(--good); }
.interval.worse { stroke: var(--bad); }
.point { stroke-width: 1.6; } .point.flat { fill: var(--card); stroke: var(--dim); }
.point.better { fill: var(--good); stroke: var(--good); } .point.worse { fill: var(--bad); stroke: var(--bad); }
.front { stroke: var(--accent); stroke-width: 1.4; opacity: .6; } .dot.best { fill: var(--accent); }
.dot.other { fill: var(--dim); opacity: .55; } .dot.base { stroke: var(--ink); stroke-width: 2; opacity: 1; }
.seed { stroke: var(--c); stroke-width: .9; opacity: .5; } .mean { stroke: var(--c); stroke-width: 1.6; opacity: .75; }
.mean.first { stroke: var(--ink); stroke-width: 2.4; opacity: 1; }
.reference { stroke: var(--dim); stroke-width: 1.2; opacity: .6; }
.ring { fill: none; stroke: var(--c); stroke-width: 2.2; }

summary { cursor: pointer; color: var(--accent); width: fit-content; max-width: 100%; }
details.cell { border-top: 1px solid var(--line); }
details.cell summary, details.task summary { padding: 6px 0; color: var(--ink); }
details.cell summary b, details.task summary { font-weight: 550; }
details.cell summary span { color: var(--dim); font-size: 12px; margin-left: 8px; }
details.cell[open] { padding-bottom: 14px; }
details.task { border-top: 1px solid var(--line); }
.diff { margin: 0 0 10px; padding-left: 18px; overflow-wrap: anywhere;
  font: 12px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); gap: 14px; padding: 6px 0 14px; }
article { display: grid; grid-template-columns: auto 1fr; gap: 8px 14px; border: 1px solid var(--line); border-radius: 10px;
  padding: 12px; min-width: 0; align-content: start; }
article > div { min-width: 0; }
article .scroll { grid-column: 1 / -1; max-height: 420px; overflow: auto; }
article th, article td { padding-top: 2px; padding-bottom: 2px; }
article img { width: 112px; max-height: 112px; object-fit: contain; background: #fff; border-radius: 6px;
  border: 1px solid var(--line); }
article p { margin: 0 0 4px; overflow-wrap: anywhere; }
.id, .question { color: var(--dim); font-size: 12px; }
.truth { font-weight: 550; }
article td { overflow-wrap: anywhere; min-width: 110px; }
.right span { color: var(--good); } .partly span { color: var(--some); } .wrong span { color: var(--bad); }
@media (max-width: 720px) {
  main { padding: 16px 10px 60px; } section { padding: 14px 12px; border-radius: 10px; } h1 { font-size: 21px; }
  tbody th { min-width: 92px; max-width: 46vw; white-space: normal; overflow-wrap: break-word; }
  .panels { gap: 12px; } .panels > .small { width: calc(50% - 6px); }
  .facts { grid-template-columns: repeat(2, 1fr); gap: 8px 16px; } }
@media print {
  body { background: #fff; font-size: 11px; } main { max-width: none; padding: 0; } nav, .find, .segment { display: none; }
  section { border: 0; padding: 0; break-inside: auto; } .tab[hidden] { display: block; }
  .scroll.many, article .scroll, .banner ul { max-height: none; overflow: visible; border: 0; }
  figure > *, article, tr { break-inside: avoid; } th { position: static !important; } table { font-size: 9px; } }
"""

SCRIPT = """"use strict";
for (const group of document.querySelectorAll(".tabs")) {
  const parts = [...group.querySelectorAll(":scope > .tab")], bar = group.querySelector(".segment");
  const show = chosen => parts.forEach((part, i) => {
    part.hidden = i !== chosen;
    part.querySelector("h3").hidden = true;
    bar.children[i].setAttribute("aria-pressed", i === chosen);
  });
  [...bar.children].forEach((button, i) => button.addEventListener("click", () => show(i)));
  bar.hidden = false;
  show(0);
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], found = [...table.tBodies];
  const value = (body, column) => column ? Number(body.rows[0].cells[column].dataset.v ?? NaN) : 0;
  heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const way = before === "descending" ? "ascending" : before === "ascending" && column ? null
      : before === "ascending" ? "descending" : column ? "descending" : "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    let order = found;
    if (way !== null) {
      head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1, name = body => body.rows[0].cells[0].textContent;
      const keyed = found.map(body => [column ? value(body, column) : name(body), body]);
      keyed.sort(([a], [b]) => column ? Number.isNaN(a) - Number.isNaN(b) || sign * (a - b) || 0 : sign * a.localeCompare(b));
      order = keyed.map(([, body]) => body);
    }
    table.append(...order);
  }));
}
for (const field of document.querySelectorAll(".find")) {
  const bodies = [...field.nextElementSibling.querySelectorAll("tbody")];
  field.addEventListener("input", () => bodies.forEach(body => {
    body.hidden = !body.rows[0].cells[0].textContent.toLowerCase().includes(field.value.toLowerCase());
  }));
}
const open = () => {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") { target.open = true; target.scrollIntoView(); }
};
addEventListener("hashchange", open);
open();
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("figure details:not([open]), details.task:not([open])")];
  closed.forEach(part => { part.open = true; });
});
addEventListener("afterprint", () => closed.forEach(part => { part.open = false; }));
"""
