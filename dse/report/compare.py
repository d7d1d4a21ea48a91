"""A comparison of methods as tables, stacked bars and the plot of one bandwidth against a network of levels."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dse.audit.compare import OWN, PARTS, Comparison, Entry
from dse.audit.networks import NetworkCurve
from dse.files import atomic_write_all, output_directory
from dse.report.audit import page
from dse.report.figures import GREY, GROUP_COLOURS, PART_COLOURS, SYMBOLS
from dse.report.names import number, plain
from dse.units import MS

MOST_BARS = 12  # charts on one page: cases beyond are in the table
# A part's colour is that of the report's own part where it is the same thing.
COLOURS = {
    "attention": PART_COLOURS["attention"],
    "compute or KV": "#5b7bb8",
    "KV cache": PART_COLOURS["kv"],
    "dense FFN": "#58a89a",
    "static weights": "#7a8fd0",
    "shared expert": "#b3d48e",
    "routed experts": PART_COLOURS["experts"],
    "experts": "#6a9c3f",
    "expert weights": "#c9b458",
    "all-reduce": PART_COLOURS["reduce"],
    "sequence exchange": PART_COLOURS["sequence"],
    "exchange": PART_COLOURS["exchange"],
    "fitted step": "#8a7a1f",
    "elementwise": PART_COLOURS["elementwise"],
    "head": PART_COLOURS["head"],
    "overhead": PART_COLOURS["overhead"],
}
OUTPUTS = ("comparison.csv", "networks.csv", "comparison.html")


def bars_figure(entries: Sequence[Entry]) -> dict[str, Any]:
    """Stacked bars of one case and phase: one bar a method, its parts in milliseconds."""
    priced = [e for e in reversed(entries) if e.parts]
    names = [f"{escape(e.method)}<br>{number(e.total / MS)} ms" for e in priced]
    data = []
    for part in PARTS:
        values = [e.parts.get(part, 0.0) / MS for e in priced]
        if not any(values):
            continue
        texts = [f"{part}: {number(x)} ms" if x else "" for x in values]
        bar = {"type": "bar", "orientation": "h", "name": part, "y": names, "x": values, "hovertext": texts}
        marker = {"color": COLOURS.get(part, GREY), "line": {"width": 0}}
        data.append({**bar, "hoverinfo": "text", "marker": marker})
    layout = {
        "height": 46 * len(priced) + 150,
        "barmode": "stack",
        "bargap": 0.35,
        "margin": {"l": 150, "r": 16, "t": 8, "b": 110},
        "xaxis": {"title": {"text": "ms", "standoff": 6}, "zeroline": False, "rangemode": "tozero"},
        "yaxis": {"automargin": True},
        "legend": {"orientation": "h", "y": -0.35, "yanchor": "top", "x": 0, "traceorder": "normal"},
    }
    return {"data": data, "layout": layout}


def networks_figure(curves: Sequence[NetworkCurve]) -> dict[str, Any]:
    """Seconds against GPUs: solid the network's levels, dotted one bandwidth for all."""
    data = []
    for i, curve in enumerate(curves):
        for name, values, dash in (
            ("levels", curve.hierarchical_exchange, "solid"),
            ("one bandwidth", curve.collapsed_exchange, "dot"),
        ):
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": escape(f"{curve.strategy}, {name}"),
                    "x": list(curve.devices),
                    "y": [v / MS for v in values],
                    "line": {"color": GROUP_COLOURS[i % 8], "dash": dash, "width": 2},
                    "marker": {"symbol": SYMBOLS[i % 8], "size": 8},
                    "hovertext": [f"{n} GPUs: {number(v / MS)} ms" for n, v in zip(curve.devices, values, strict=True)],
                    "hoverinfo": "text",
                }
            )
    devices = list(curves[0].devices) if curves else []
    layout = {
        "height": 420,
        "margin": {"l": 70, "r": 16, "t": 16, "b": 52},
        "xaxis": {"title": {"text": "GPUs"}, "type": "log", "tickvals": devices, "ticktext": [str(n) for n in devices]},
        "yaxis": {"title": {"text": "exchanges of a prefill (ms)"}, "rangemode": "tozero", "zeroline": False},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    return {"data": data, "layout": layout}


class _Printed:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        c = self.comparison
        for case, label in enumerate(c.labels[:MOST_BARS]):
            yield Text(f"{case}: {plain(label)}", style="bold")
            table = Table(box=None, pad_edge=False)
            for head in ("phase", "method", "ms", "of dse", "largest parts"):
                table.add_column(head, header_style="dim", justify="right" if head in ("ms", "of dse") else "left")
            for phase, entries in _phases(c, case):
                base = next((e.total for e in entries if e.method == OWN), 0.0)
                for e in entries:
                    table.add_row(phase, e.method, *_cells(e, base))
            yield table
            yield ""
        for d in c.differences:
            yield Text(f"{d.case}: {plain(d.text)}", style="dim")
        if len(c.labels) > MOST_BARS:
            yield Text(f"and {len(c.labels) - MOST_BARS} more cases in {OUTPUTS[0]}", style="yellow")


def render(comparison: Comparison) -> RenderableType:
    """What the command line prints: a table a case, then the reasons for the largest differences."""
    return _Printed(comparison)


def _cells(e: Entry, base: float) -> tuple[str, str, str]:
    if not e.parts:
        return "–", "", plain(e.reason)
    largest = sorted(e.parts.items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{part} {number(x / MS)}" for part, x in largest if x > 0)
    return number(e.total / MS), number(e.total / base) if base > 0 else "", parts


def _phases(c: Comparison, case: int) -> list[tuple[str, list[Entry]]]:
    found: dict[str, list[Entry]] = {}
    for e in c.entries:
        if e.case == case:
            found.setdefault(e.phase, []).append(e)
    return list(found.items())


def html(comparison: Comparison) -> str:
    """The whole page."""
    figures: dict[str, Any] = {}
    body = [
        "<header><h1>What each method thinks the time is made of</h1>"
        '<p class="lead">The same cases, priced by the published methods and by this project\'s model.</p></header>'
    ]
    for case, label in enumerate(comparison.labels[:MOST_BARS]):
        body.append(f"<section><h2>{escape(label)}</h2>")
        for phase, entries in _phases(comparison, case):
            body.append(f"<h3>{escape(phase.capitalize())}</h3>")
            if any(e.parts for e in entries):
                figures[f"bars-{case}-{phase}"] = bars_figure(entries)
                body.append(f'<figure><div id="bars-{case}-{phase}" class="chart"></div></figure>')
            body.append(_entries_table(entries))
        body.append("</section>")
    if len(comparison.labels) > MOST_BARS:
        body.append(f'<p class="note">{len(comparison.labels) - MOST_BARS} more cases are in {OUTPUTS[0]}.</p>')
    if comparison.differences:
        items = "".join(f"<li>Case {d.case}: {escape(d.text)}</li>" for d in comparison.differences)
        body.append(f"<section><h2>The largest differences, and why</h2><ul>{items}</ul></section>")
    figures["networks"] = networks_figure(comparison.networks)
    body.append(_networks_section(comparison.networks))
    return page("Methods side by side", "".join(body), figures)


def _entries_table(entries: Sequence[Entry]) -> str:
    base = next((e.total for e in entries if e.method == OWN), 0.0)
    rows = []
    for e in entries:
        total, ratio, parts = _cells(e, base)
        cells = f"<td>{escape(e.method)}</td><td class='n'>{total}</td><td class='n'>{ratio}</td>"
        rows.append(f"<tr>{cells}<td class='why'>{escape(parts)}</td></tr>")
    heads = "<th>method</th><th class='n'>ms</th><th class='n'>of dse</th><th>largest parts, ms</th>"
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _networks_section(curves: Sequence[NetworkCurve]) -> str:
    rows = "".join(
        f"<tr><td>{escape(c.strategy)}</td><td class='n'>{n}</td><td class='n'>{number(c.bandwidth_gbs[i])}</td>"
        f"<td class='n'>{number(c.collapsed_exchange[i] / MS)}</td>"
        f"<td class='n'>{number(c.hierarchical_exchange[i] / MS)}</td>"
        f"<td class='n'>{number(c.collapsed[i] / MS)}</td><td class='n'>{number(c.hierarchical[i] / MS)}</td></tr>"
        for c in curves
        for i, n in enumerate(c.devices)
    )
    names = (
        "strategy",
        "GPUs",
        "one bandwidth, GB/s",
        "exchanges, one",
        "exchanges, levels",
        "all, one",
        "all, levels",
    )
    heads = "".join(f"<th{' class=n' if i else ''}>{name}</th>" for i, name in enumerate(names))
    return f"""
<section><h2>One bandwidth against a network of levels</h2>
<p class="muted">ModelMeter's DeepSeek-R1 prefill (4096 tokens a GPU, H200) has one bandwidth for the whole network:
once a plan leaves the node, all its traffic goes at the network's pace. On the levels of the same network copies for
GPUs of the same node stay on NVLink, and a token crosses the network once a node. Milliseconds.</p>
<figure><div id="networks" class="chart"></div></figure>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"""


def write_comparison(comparison: Comparison, out_dir: str | Path) -> tuple[Path, ...]:
    """Write `comparison.csv`, `networks.csv` and `comparison.html`: all of them, or none and an InputError."""
    folder = output_directory(out_dir)
    table = comparison.table().to_csv(index=False, float_format="%.9g", lineterminator="\n")
    kinds = ("collapsed_ms", "hierarchical_ms", "collapsed_exchange_ms", "hierarchical_exchange_ms")
    lines = [",".join(("strategy", "cluster", "gpus", "collapsed_gb_s", *kinds))]
    for c in comparison.networks:
        columns = (c.bandwidth_gbs, c.collapsed, c.hierarchical, c.collapsed_exchange, c.hierarchical_exchange)
        for i, n in enumerate(c.devices):
            numbers = [f"{x[i] / (1.0 if k == 0 else MS):.9g}" for k, x in enumerate(columns)]
            lines.append(",".join([c.strategy, c.cluster, str(n), *numbers]))
    texts = (table, "\n".join(lines) + "\n", html(comparison))
    files = {folder / name: text for name, text in zip(OUTPUTS, texts, strict=True)}
    atomic_write_all(files)
    return tuple(files)


__all__ = ["OUTPUTS", "bars_figure", "html", "networks_figure", "render", "write_comparison"]
