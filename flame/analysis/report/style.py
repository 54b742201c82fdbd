"""The style sheet of a report: legible from 390 px on, light and dark, in colours that colour-blind readers tell apart."""

from flame.analysis.report.maps import LEVELS
from flame.analysis.report.palette import COLORS

_RULES = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --rule: #d8dee4; --panel: #f6f8fa; --hot: #08306b;
  --link: #0067a5; LIGHT
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e6e9ec; --soft: #9aa4ae; --rule: #2c343d; --panel: #171c22; --hot: #d6e9ff;
    --link: #58a9e8; DARK
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 16px; max-width: 1240px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: 8px 0 4px; }
h2 { font-size: 1.2rem; margin: 40px 0 4px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 20px 0 6px; }
p { margin: 4px 0 12px; max-width: 75ch; color: var(--soft); }
p.lead { margin: 0 0 8px; font-size: 0.9rem; }
ul.answers { margin: 0 0 12px; padding: 0; list-style: none; max-width: 90ch; }
ul.answers li { margin: 6px 0; line-height: 1.35; }
p.note { font-size: 0.8rem; margin: -4px 0 8px; }
abbr { text-decoration: underline dotted var(--soft); text-underline-offset: 3px; cursor: help; }
dl { font-size: 0.875rem; margin: 4px 0 12px; max-width: 90ch; }
dt { font-weight: 600; } dd { margin: 0 0 6px 16px; color: var(--soft); }
ul.facts { margin: 8px 0 12px; padding-left: 18px; color: var(--soft); font-size: 0.9rem; max-width: 90ch; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 0.9rem; margin: 12px 0; }
a { color: var(--link); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0; padding: 0; font-size: 0.875rem; }
.legend li { display: flex; align-items: center; gap: 6px; }
.grid-of { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 20px 24px; align-items: start; }
.grid-of.maps { align-items: start; grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 0.875rem; font-weight: 600; line-height: 1.3; margin-bottom: 6px; overflow-wrap: anywhere; }
figcaption span { font-weight: 400; color: var(--soft); }
svg { display: block; width: 100%; max-width: 100%; height: auto; overflow: visible; }
.legend svg { width: 34px; flex: none; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; margin-bottom: 12px; max-width: 100%; width: fit-content; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
td, tbody th { white-space: nowrap; }
@media (max-width: 600px) {
  body { padding: 10px 12px; }
  h1 { font-size: 1.25rem; margin: 0 0 2px; }
  ul.answers li { font-size: 0.9rem; margin: 5px 0; }
  th, td { padding: 4px 5px; }
  table { font-size: 0.8rem; }
  tbody th { white-space: normal; min-width: 84px; }
  #answers td small { white-space: normal; font-size: 0.65rem; line-height: 1.25; }
}
td small { display: block; color: var(--soft); }
td small span { white-space: nowrap; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--panel); vertical-align: bottom; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--panel); font-weight: 600; border-right: 1px solid var(--rule); }
details { margin-bottom: 8px; }
summary { cursor: pointer; font-size: 0.9rem; padding: 4px 0; }
pre { overflow-x: auto; background: var(--panel); padding: 10px; border-radius: 6px; font-size: 0.8rem; }
text { font-size: 12px; fill: var(--soft); }
text.label { fill: var(--ink); }
.end { text-anchor: end; } .middle { text-anchor: middle; } .start { text-anchor: start; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.axis, .frame { stroke: var(--soft); stroke-width: 1; fill: none; }
.axis { opacity: 0.7; }
.bound { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 3 3; fill: none; }
.s .block { fill: var(--c); } .s.hollow .block { fill-opacity: 0.35; stroke: var(--c); }
text.value { fill: var(--ink); }
.s polyline { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; }
.s .mark { fill: var(--c); stroke: var(--paper); stroke-width: 0.8; }
.s.hollow .mark { fill: var(--paper); stroke: var(--c); stroke-width: 1.5; }
.s .bar { stroke: var(--c); stroke-width: 1.4; fill: none; }
.s .band { fill: var(--c); opacity: 0.18; }
.l0 { fill: var(--paper); }
@media print { nav { display: none; } details { display: block; } }
"""


def style_sheet() -> str:
    """The rules, with those of the shades of heat maps and of the colours of lines."""
    hues = "".join(f".s{n} {{ --c: var(--c{n}); }}\n" for n in range(len(COLORS)))
    light = " ".join(f"--c{n}: {color.light};" for n, color in enumerate(COLORS))
    dark = " ".join(f"--c{n}: {color.dark};" for n, color in enumerate(COLORS))
    shades = "".join(
        f".l{n} {{ fill: color-mix(in srgb, var(--hot) {6 + 94 * n / LEVELS:.1f}%, var(--paper)); }}\n"
        for n in range(1, LEVELS + 1)
    )
    return _RULES.replace("LIGHT", light).replace("DARK", dark) + hues + shades
