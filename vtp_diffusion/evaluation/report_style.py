"""How a report looks: on a phone each line of a table becomes a card, on paper nothing is hidden or cut in two."""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1d21; --soft: #5b6470; --line: #d9dee4; --paper: #fff; --mark: #0b62c4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #a3abb5; --line: #3a4048; --paper: #16191d; --mark: #6fb1ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; overflow-wrap: anywhere; }
small, figcaption, summary, p { color: var(--soft); }
small { font-weight: normal; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th { text-align: left; font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); }
th, td { padding: .4rem .7rem .4rem 0; vertical-align: top; }
td { border-bottom: 1px solid var(--line); }
td:nth-child(2) { font-weight: 650; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:nth-child(3) { font-variant-numeric: tabular-nums; min-width: 7rem; }
td:last-child { color: var(--soft); font-size: .85rem; }
details { margin-top: .5rem; font-size: .85rem; }
pre { overflow-x: auto; font-size: .75rem; line-height: 1.35; border: 1px solid var(--line); padding: .7rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0 0 1.5rem; }
figcaption { font-size: .9rem; margin-bottom: .3rem; }
figcaption b { color: var(--ink); }
svg { width: 100%; max-width: 40rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); }
svg .value { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--line); }
svg .line { fill: none; stroke: var(--mark); stroke-width: 2.5; }
svg .floor { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg circle { fill: var(--mark); }
img { max-width: 100%; height: auto; background: #fff; }
@media screen and (max-width: 40rem) {
  thead { display: none; }
  tr { display: block; border-bottom: 1px solid var(--line); padding: .6rem 0; }
  td { display: flex; gap: .8rem; border: 0; padding: .1rem 0; }
  td:nth-child(2) { white-space: normal; }
  td.none { display: none; }
  td::before { content: attr(data-label); flex: 0 0 4.5rem; color: var(--soft); font: .85rem system-ui, sans-serif; }
  td:first-child { font-weight: 650; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --mark: #000; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  details { display: none; }
  h2, figcaption { break-after: avoid; }
  tr, figure { break-inside: avoid; }
  .figures { grid-template-columns: 1fr 1fr; }
  .picture img { max-height: 22cm; }
}
@page { margin: 1.6cm; }
"""
