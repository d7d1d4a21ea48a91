"""The report page's looks and the little that it does by itself: colours by the reader's theme, sorting of a table."""

CSS = """
:root { color-scheme: light dark; --text: #1c2126; --muted: #5c6670; --line: #dfe3e8; --soft: #f4f6f8; --page: #ffffff;
  --accent: #1f5fa8; --bar: #3b82c4; --warn: #fdf4e0; --warn-line: #d99a1c; --bad: #fdeceb; --bad-line: #d0392b; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7ea; --muted: #9aa4ae; --line: #343a41; --soft: #1e2328;
  --page: #15181b; --accent: #79b3ee; --warn: #2e2818; --bad: #331d1b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 1.75rem 0 .25rem; }
p { margin: .4rem 0; max-width: 56rem; }
.lead { font-size: 1.08rem; color: var(--muted); }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.plan { font: .86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; color: var(--muted);
  overflow-wrap: anywhere; max-width: none; }
.note { border-left: 4px solid var(--warn-line); background: var(--warn); padding: .55rem .9rem; margin: .6rem 0;
  max-width: none; }
.note.info { border-color: var(--line); background: var(--soft); }
.note.bad { border-color: var(--bad-line); background: var(--bad); }
dl.headlines { margin: 1.5rem 0 0; display: grid; grid-template-columns: minmax(10rem, 15rem) 1fr; }
dl.headlines dt, dl.headlines dd { padding: .6rem 0; border-top: 1px solid var(--line); margin: 0; }
dl.headlines dt { font-weight: 600; padding-right: 1.5rem; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem; margin: .75rem 0; }
dl.facts dt { color: var(--muted); } dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--soft); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; letter-spacing: -0.02em; }
.tile span { color: var(--muted); font-size: .85rem; }
.chips { display: flex; flex-wrap: wrap; gap: .4rem; margin: .75rem 0; padding: 0; list-style: none; }
.chips li { border: 1px solid var(--line); border-radius: 6px; padding: .1rem .55rem; font-size: .88rem; }
.chips li span { color: var(--muted); }
figure { margin: .75rem 0 0; } .chart { width: 100%; }
.scroll { overflow: auto; max-height: 34rem; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.why { white-space: normal; min-width: 14rem; color: var(--muted); }
th { font-weight: 600; color: var(--muted); position: sticky; top: 0; background: var(--page); }
th.n, td.n { text-align: right; } tr.strong td { font-weight: 600; background: var(--soft); }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--text); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
table.sortable { font-size: .84rem; } table.sortable th, table.sortable td { padding: .28rem .5rem; }
table.wide { width: 100%; } td.bar { width: 30%; min-width: 8rem; }
td.bar i { display: block; height: .85rem; min-width: 2px; background: var(--bar); border-radius: 2px; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 0 3rem; }
@media (max-width: 44rem) { dl.headlines { grid-template-columns: 1fr; } dl.headlines dd { border: 0; padding-top: 0; }
  .columns { grid-template-columns: 1fr; } }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

SCRIPT = """
const look = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function themed(layout) {
  const copy = JSON.parse(JSON.stringify(layout));
  Object.assign(copy, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: look("--text")},
    modebar: {bgcolor: "rgba(0,0,0,0)", color: look("--muted"), activecolor: look("--accent")},
    hoverlabel: {bgcolor: look("--soft"), bordercolor: look("--line"), align: "left",
      font: {color: look("--text"), size: 13}}});
  for (const key of Object.keys(copy).filter(k => /^[xy]axis/.test(k)))
    Object.assign(copy[key], {gridcolor: look("--line"), linecolor: look("--line"), showline: key[0] === "x"});
  return copy;
}
const figures = JSON.parse(document.getElementById("figures").textContent);
// No button that sends the chart anywhere: the report stays on this machine.
const options = id => ({displaylogo: false, responsive: true, plotlyServerURL: "", displayModeBar: id === "front",
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]]});
function draw() {
  for (const [id, figure] of Object.entries(figures))
    Plotly.react(id, figure.data, themed(figure.layout), options(id));
}
draw();
dark.addEventListener("change", draw);

for (const table of document.querySelectorAll("table.sortable"))
  table.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, up = head.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th").forEach(th => th.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const order = (a, b) => (isNaN(a) || isNaN(b) ? String(a).localeCompare(String(b)) : a - b) * (up ? 1 : -1);
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => order(value(a), value(b))).forEach(row => body.append(row));
  }));
"""
