"""A replay as a terminal table, a page with its distributions and its course over time, and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from rich.console import RenderableType
from rich.table import Table

from dse.files import atomic_write_all, output_directory
from dse.report.audit import page
from dse.report.figures import GREY, GROUP_COLOURS
from dse.report.files import csv
from dse.report.names import number, percent, plain
from dse.space.replay import Replay

OUTPUTS = ("replay.csv", "requests.csv", "replay.html")
MOST_PLANS = 6  # drawn; the table has all
MOST_ROWS = 30  # printed
POINTS = 201  # of a distribution's curve
PANELS = {"ttft_ms": "TTFT (ms)", "tpot_ms": "TPOT (ms)", "e2e_ms": "end-to-end (ms)"}
COURSE = ("requests before their first token", "requests in decode", "KV space set aside (%)")
SHOWN = (
    *("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms", "e2e_ms", "e2e_p99_ms", "attainment", "output_tok_s_gpu"),
    *("gpus", "mean_queue", "most_queue", "most_waiting", "mean_decoding", "most_kv_share", "drain_s"),
)
HEADS = {
    "ttft_ms": "TTFT ms",
    "ttft_p99_ms": "p99",
    "tpot_ms": "TPOT ms",
    "tpot_p99_ms": "p99",
    "e2e_ms": "E2E ms",
    "e2e_p99_ms": "p99",
    "attainment": "meet both",
    "output_tok_s_gpu": "out tok/s/GPU",
    "gpus": "GPUs",
    "mean_queue": "queue",
    "most_queue": "longest queue",
    "most_waiting": "most not admitted",
    "mean_decoding": "in decode",
    "most_kv_share": "most KV",
    "drain_s": "s after last arrival",
}
NAMES = ("model", "gpu", "cluster", "engine", "weights")  # say by themselves what they are
SETTINGS = (
    *("model", "gpu", "cluster", "engine", "tp", "pp", "attention_dp", "cp", "moe_ep", "moe_tp", "replicas"),
    *("weights", "kv", "chunk", "speculation", "overlap", "policy"),
)
PRINTED = ("ttft_ms", "ttft_p99_ms", "tpot_ms", "tpot_p99_ms", "attainment", "output_tok_s_gpu", "gpus", "most_queue")


def name_of(done: Replay, row: int) -> str:
    """A plan in a few words: its row, and what it sets that not every plan shown beside it sets alike."""
    beside = done.frame.iloc[done.ranking] if done.simulated[row] >= 0 else done.frame
    words = [f"{row}:"]
    for column in (name for name in SETTINGS if name in beside.columns):
        value = done.frame[column].iloc[row]
        if (
            pd.isna(value)
            or str(value) == ""
            or (len(beside) > 1 and beside[column].fillna("").astype(str).nunique() == 1)
        ):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words.append(text if column in NAMES else f"{column} {text}")
    return " ".join(words)


def latency_figure(done: Replay, rows: Sequence[int]) -> dict[str, Any]:
    """For each latency the share of requests that is at or below it, one line a plan, targets dotted."""
    data, layout = [], _panels(list(PANELS.values()), 400)
    share = np.linspace(0.0, 1.0, POINTS)
    for i, row in enumerate(rows):
        requests = done.requests(row)
        for k, column in enumerate(PANELS):
            values = requests[column].dropna().to_numpy()
            if len(values):
                data.append(_line(done, row, i, k, np.quantile(values, share), 100 * share, "%{x:.4g} ms: %{y:.1f}%"))
    for k, target in enumerate(done.targets):
        if target is not None:
            layout["shapes"].append(_mark(k, target))
    for k in range(len(PANELS)):
        drawn = [x for line in data if line["xaxis"] == f"x{_n(k)}" for x in line["x"]]
        title = {"text": list(PANELS.values())[k], "font": {"size": 13}}
        axis = {"title": title, "type": "log", **_ticks(drawn)}
        layout[f"xaxis{_n(k)}"] |= axis | {"tickformat": ",~r"}
        layout[f"yaxis{_n(k)}"] |= {"range": [0, 101], "ticksuffix": "%"}
    return {"data": data, "layout": layout}


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Of a logarithmic axis: 1, 2, 5 of each decade, or 1, 3, or the decades alone, as there is room."""
    positive = [x for x in values if x > 0]
    span = max(positive) / min(positive) if positive else 1.0
    if span <= 40:
        return {"dtick": "D2"}
    if span > 300:
        return {"dtick": 1}
    decades = range(math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive))) + 1)
    return {"tickvals": [digit * 10.0**n for n in decades for digit in (1, 3)]}


def course_figure(done: Replay, rows: Sequence[int]) -> dict[str, Any]:
    """Requests waiting, running, and KV space over time."""
    data, layout = [], _panels(COURSE, 380)
    assert done.simulation is not None
    timeline = done.simulation.timeline
    for i, row in enumerate(rows):
        place = int(done.simulated[row])
        there = np.isfinite(timeline.time[place])
        time = timeline.time[place][there]
        series = jax.tree.map(lambda x, i=place, use=there: x[i][use], timeline)
        for k, values in enumerate((series.waiting + series.prefilling, series.decoding, 100 * series.kv_share)):
            data.append(_line(done, row, i, k, time, values, "%{x:.4g} s: %{y:.4g}", width=1.2))
    for k, title in enumerate(COURSE):
        layout[f"xaxis{_n(k)}"] |= {"title": {"text": "time (s)", "font": {"size": 13}}}
        layout[f"yaxis{_n(k)}"] |= {"title": {"text": title, "font": {"size": 13}}, "rangemode": "tozero"}
    return {"data": data, "layout": layout}


def _n(k: int) -> str:
    return "" if k == 0 else str(k + 1)


def _panels(titles: Sequence[str], height: int) -> dict[str, Any]:
    gap, n = 0.075, len(titles)
    width = (1 - gap * (n - 1)) / n
    layout: dict[str, Any] = {
        "height": height,
        "margin": {"l": 60, "r": 16, "t": 16, "b": 52},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.03, "yanchor": "bottom", "x": 0, "font": {"size": 12}},
        "shapes": [],
    }
    for k in range(n):
        start = k * (width + gap)
        layout[f"xaxis{_n(k)}"] = {"domain": [start, start + width], "anchor": f"y{_n(k)}", "zeroline": False}
        layout[f"yaxis{_n(k)}"] = {"anchor": f"x{_n(k)}", "zeroline": False, "automargin": True}
    return layout


def _line(
    done: Replay, row: int, i: int, k: int, x: np.ndarray, y: np.ndarray, hover: str, width: float = 2.0
) -> dict[str, Any]:
    name = escape(name_of(done, row))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "legendgroup": name,
        "showlegend": k == 0,
        "x": [float(f"{v:.5g}") for v in x],
        "y": [float(f"{v:.5g}") for v in y],
        "line": {"color": GROUP_COLOURS[i % len(GROUP_COLOURS)], "width": width},
        "hovertemplate": f"{name}<br>{hover}<extra></extra>",
        "xaxis": f"x{_n(k)}",
        "yaxis": f"y{_n(k)}",
    }


def _mark(k: int, x: float) -> dict[str, Any]:
    line = {"color": GREY, "width": 1.5, "dash": "dot"}
    ends = {"x0": x, "x1": x, "y0": 0, "y1": 1}
    return {"type": "line", "xref": f"x{_n(k)}", "yref": f"y{_n(k)} domain", "line": line, **ends}


def html(done: Replay) -> str:
    """The whole page."""
    rows = [int(row) for row in done.ranking[:MOST_PLANS]]
    figures = {}
    body = [f"<header><h1>Replay of a trace</h1><p class='lead'>{escape(about(done))}</p></header>"]
    if rows:
        figures = {"latencies": latency_figure(done, rows), "course": course_figure(done, rows)}
        shown = f"the best {len(rows)} of {len(done.ranking)} plans" if len(done.ranking) > len(rows) else "every plan"
        dotted = " Dotted: the targets." if any(t is not None for t in done.targets) else ""
        body.append(f"""
<section><h2>What users felt</h2><p class="plan">{escape(name_of(done, rows[0]))}</p>
<div class="tiles">{_tiles(done)}</div>
<p class="muted">Share of requests at or below a latency, {shown}; TTFT starts at arrival.{dotted}</p>
<figure><div id="latencies" class="chart"></div></figure></section>
<section><h2>Queue and memory over time</h2><p class="muted">Of one replica, all its ranks; KV space is what is set
aside at admission, of the fullest rank.</p><figure><div id="course" class="chart"></div></figure></section>""")
    body.append(_table(done))
    return page("Replay of a trace", "".join(body), figures)


def about(done: Replay) -> str:
    """The trace and the targets in a sentence."""
    t, rate = done.trace, done.trace.rate
    parts = [f"{len(t):,} requests"]
    if rate is not None:
        parts.append(f"{number(rate)} a second (gaps vary by {number(done.trace.cv or 0.0)} of their mean)")
    parts.append(f"{number(float(t.input_tokens.mean()))} tokens in and {number(float(t.output_tokens.mean()))} out")
    for name, target in zip(("TTFT", "TPOT"), done.targets, strict=True):
        if target is not None:
            parts.append(f"{name} of at most {number(target)} ms")
    return ", ".join(parts) + "."


def _tiles(done: Replay) -> str:
    best = done.frame.iloc[done.best]
    names = [("ttft_p99_ms", "TTFT p99, ms"), ("tpot_p99_ms", "TPOT p99, ms"), ("e2e_p99_ms", "end-to-end p99, ms")]
    names += [("output_tok_s_gpu", "output tokens/s/GPU"), ("gpus", "GPUs")]
    tiles = [f"<div class='tile'><b>{number(float(best[n]))}</b><span>{text}</span></div>" for n, text in names]
    if pd.notna(best["attainment"]):
        met = percent(float(best["attainment"]))
        tiles.append(f"<div class='tile'><b>{met}</b><span>of requests meet the targets</span></div>")
    return "".join(tiles)


def _cells(done: Replay, row: int) -> list[str]:
    line = done.frame.iloc[row]
    shares = ("attainment", "most_kv_share")
    return [
        "" if pd.isna(line[n]) else percent(float(line[n])) if n in shares else number(float(line[n])) for n in SHOWN
    ]


def _table(done: Replay) -> str:
    heads = "".join(f"<th class='n'><button type='button'>{escape(HEADS[name])}</button></th>" for name in SHOWN)
    body = "".join(
        f"<tr{' class=strong' if row == done.best else ''}><td>{escape(name_of(done, int(row)))}</td>"
        + "".join(f"<td class='n'>{escape(cell)}</td>" for cell in _cells(done, int(row)))
        + "</tr>"
        for row in done.ranking
    )
    reasons = done.frame["reason"]
    refused = [row for row in range(len(done.frame)) if done.simulated[row] < 0]
    why = "".join(
        f"<tr><td>{escape(name_of(done, row))}</td><td class='why'>{escape(str(reasons.iloc[row]))}</td></tr>"
        for row in refused
    )
    plans = f"""
<section><h2>Plans, best first</h2><div class="scroll"><table class="sortable"><thead>
<tr><th><button type='button'>plan</button></th>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"""
    left = f"""
<section><h2>Plans that were not run</h2><div class="scroll"><table><thead><tr><th>plan</th><th>why</th></tr></thead>
<tbody>{why}</tbody></table></div></section>"""
    return (plans if len(done.ranking) else "") + (left if refused else "")


def render(done: Replay) -> RenderableType:
    """What the command line prints: the best plans, then why others were not run."""
    names = [n for n in PRINTED if n != "attainment" or any(t is not None for t in done.targets)]
    table = Table(title=plain(about(done)), title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("plan", overflow="fold", min_width=36)
    for name in names:
        table.add_column(HEADS[name], justify="right", no_wrap=True)
    for row in done.ranking[:MOST_ROWS]:
        cells = dict(zip(SHOWN, _cells(done, int(row)), strict=True))
        table.add_row(plain(name_of(done, int(row))), *(cells[name] for name in names))
    return table


def write_replay(done: Replay, out_dir: str | Path, requests: int | None = None) -> tuple[Path, ...]:
    """Write `replay.csv`, `requests.csv` (of the best plan, or of row `requests`) and `replay.html`."""
    folder = output_directory(out_dir)
    files = {folder / "replay.csv": csv(done.frame), folder / "replay.html": html(done)}
    if requests is not None or len(done.ranking):
        files[folder / "requests.csv"] = csv(done.requests(requests))
    atomic_write_all(files)
    return tuple(files)


__all__ = ["OUTPUTS", "about", "course_figure", "html", "latency_figure", "name_of", "render", "write_replay"]
