"""The report's charts as plain plotly.js figures ({data, layout}): dictionaries, so that no plotting library is needed.

Text that plotly draws is read as markup by it, so every name goes through `escape`.
"""

from __future__ import annotations

import math
import textwrap
from html import escape
from typing import Any

from dse.report.names import label, number, percent
from dse.report.plan import Breakdown, MemoryUse, PlanSummary
from dse.report.summary import Point, Scatter, Summary

Figure = dict[str, Any]

# Told apart by most colour-blind readers, on white and on dark (after Okabe and Ito); symbols differ too.
GROUP_COLOURS = ("#3b82c4", "#e08a00", "#1a9e78", "#c4588f", "#7a6fd0", "#8a7a1f", "#2aa5c7", "#d0553a")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "triangle-down", "x")
GREY = "#8c939c"
MARK = "#d0392b"
# Computing is cool, communication warm, overhead grey.
PART_COLOURS = {
    "projections": "#3b82c4",
    "attention": "#2a4f96",
    "dense": "#2f9484",
    "experts": "#8bbf5a",
    "elementwise": "#9cc3e0",
    "head": "#7a8fd0",
    "reduce": "#e08a00",
    "exchange": "#d0553a",
    "sequence": "#c4588f",
    "overhead": "#a3a9b1",
    "weights": "#2a4f96",
    "kv": "#2f9484",
    "activations": "#e08a00",
    "buffers": "#c4588f",
    "reserve": "#a3a9b1",
}
COMMUNICATION = ("reduce", "exchange", "sequence")  # drawn last: what is hidden is mostly of these
DARK = ("projections", "attention", "dense", "exchange", "sequence", "weights", "kv", "buffers")  # white text on them
HATCH = {"shape": "/", "fgcolor": "#4a5058", "bgcolor": "rgba(255,255,255,0.68)", "size": 6, "solidity": 0.25}
WIDE_RANGE = {"min": 20.0, "max": 1000.0}  # an axis that spans more is logarithmic; what is maximised reads best linear


def front_figure(summary: Summary, scatter: Scatter) -> Figure:
    """The first objective against each other one; the list of best plans in grey behind the front."""
    panels = len(scatter.axes) - 1
    layout: Figure = {
        "height": 460 if panels == 1 else 420,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 52},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 13}},
    }
    data: list[Figure] = []
    gap = 0.09
    width = (1 - gap * (panels - 1)) / panels
    for k in range(panels):
        n = "" if k == 0 else str(k + 1)
        start = k * (width + gap)
        layout[f"xaxis{n}"] = _axis(summary, scatter, 0) | {"domain": [start, start + width], "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = _axis(summary, scatter, k + 1) | {"anchor": f"x{n}"}
        data += _panel(scatter, k + 1, n)
        layout.setdefault("annotations", []).extend(_marks(summary, scatter, k + 1, n, layout))
    return {"data": data, "layout": layout}


def _axis(summary: Summary, scatter: Scatter, k: int) -> Figure:
    values = [p.values[k] for p in scatter.front]
    span = WIDE_RANGE[dict(summary.objectives).get(scatter.axes[k], "min")]
    wide = min(values) > 0 and max(values) > span * min(values)
    axis = {
        "title": {"text": label(scatter.axes[k]).axis, "standoff": 8, "font": {"size": 13}},
        "zeroline": False,
        "automargin": True,
    }
    return axis | ({"type": "log", "dtick": "D2", "tickformat": ",~r"} if wide else {"rangemode": "normal"})


def _panel(scatter: Scatter, k: int, n: str) -> list[Figure]:
    traces = [_points("other good plans", scatter.others, k, n, {"color": GREY, "size": 5, "opacity": 0.45})]
    if len(scatter.axes) == 2 and len(scatter.front) > 1:  # what is attained between two plans of the front
        line: Figure = {"color": GREY, "width": 1, "shape": "hv", "dash": "dot"}
        xy = {"x": [p.values[0] for p in scatter.front], "y": [p.values[k] for p in scatter.front]}
        traces.append({"mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": False, **xy})
    for i, group in enumerate(scatter.groups):
        marker = {"color": GROUP_COLOURS[i % 8], "symbol": SYMBOLS[i % 8], "size": 10, "line": {"width": 0}}
        traces.append(_points(group, [p for p in scatter.front if p.group == group], k, n, marker))
    return [trace for trace in traces if trace["x"]]


def _points(name: str, points: Any, k: int, n: str, marker: Figure) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "legendgroup": escape(name),
        "showlegend": n == "",
        "x": [p.values[0] for p in points],
        "y": [p.values[k] for p in points],
        "hovertext": [_hover(p) for p in points],
        "hoverinfo": "text",
        "marker": marker,
        "xaxis": f"x{n}",
        "yaxis": f"y{n}",
    }


def _hover(point: Point) -> str:
    lines = [*textwrap.wrap(point.plan, 56), *textwrap.wrap(point.delivers, 56)]
    return "<br>".join(escape(line) for line in lines)


def _marks(summary: Summary, scatter: Scatter, k: int, n: str, layout: Figure) -> list[Figure]:
    """Labels of the plan shown below and of the knee, on the side of better values, where no plan is."""
    directions = dict(summary.objectives)
    right = 1 if directions.get(scatter.axes[0]) == "max" else -1
    up = 1 if directions.get(scatter.axes[k]) == "max" else -1
    found = []
    for position, text, aside in ((scatter.best, "best", 0), (scatter.knee, "knee", 34)):
        if position < 0:
            continue
        at = [scatter.front[position].values[i] for i in (0, k)]
        logs = [layout[f"{axis}axis{n}"].get("type") == "log" for axis in "xy"]
        x, y = (math.log10(v) if log else v for v, log in zip(at, logs, strict=True))
        mark = {"x": x, "y": y, "xref": f"x{n}", "yref": f"y{n}", "text": text, "showarrow": True}
        arrow = {"arrowcolor": MARK, "arrowhead": 0, "arrowwidth": 1.2, "standoff": 7}
        found.append(mark | arrow | {"ax": right * aside, "ay": -up * 36})
    return found


def steps_figure(plan: PlanSummary) -> Figure:
    """One bar a step, in shares of its time. Parts run past 100% by what overlap hides, hatched."""
    steps = list(reversed(plan.steps))
    names = [f"{s.step}<br>{number(s.total_ms)} ms" for s in steps]
    data: list[Figure] = []
    for key in sorted(plan.step_parts, key=lambda part: part in COMMUNICATION):
        found = [s.part(key) for s in steps]
        data.append(
            _bar(names, [100 * p.share if p else 0.0 for p in found], next(p.label for p in found if p), key)
            | {
                "hovertext": [
                    f"{p.label}: {number(p.value)} ms, {percent(p.share)} of the step" if p else "" for p in found
                ]
            }
        )
    if any(s.hidden_ms > 0 for s in steps):
        data.append(_hidden(names, steps))
    most = max(100 * (1 + max(s.hidden_share, 0.0)) for s in steps)
    layout = _bar_layout(58 * len(steps) + 120, 112, "share of the step's time (%)", max(most * 1.02, 102))
    layout["shapes"] = [_line(100.0)]
    return {"data": data, "layout": layout}


def _hidden(names: list[str], steps: list[Breakdown]) -> Figure:
    return {
        "type": "bar",
        "orientation": "h",
        "name": "hidden by overlap",
        "y": names,
        "x": [100 * max(s.hidden_share, 0.0) for s in steps],
        "base": [100.0] * len(steps),
        "marker": {"color": GREY, "line": {"width": 0}, "pattern": HATCH},
        "hovertext": [f"hidden by overlap: {number(s.hidden_ms)} ms" for s in steps],
        "hoverinfo": "text",
    }


def memory_figure(memory: MemoryUse) -> Figure:
    """The fullest GPU's memory, part by part, against what is usable of it."""
    data = [
        _bar([""], [p.value], p.label, p.key, share=p.share)
        | {"hovertext": [f"{p.label}: {number(p.value)} GiB, {percent(p.share)} of usable"]}
        for p in memory.parts
        if p.value > 0
    ]
    layout = _bar_layout(166, 82, "GiB", max(memory.usable, memory.total) * 1.04)
    layout["shapes"] = [_line(memory.usable)]
    text = f"usable {number(memory.usable)} GiB"
    layout["annotations"] = [
        {
            "x": memory.usable,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "xanchor": "right",
            "text": text,
            "showarrow": False,
        }
    ]
    layout["margin"] |= {"l": 16, "t": 28}
    return {"data": data, "layout": layout}


def _bar(names: list[str], values: list[float], name: str, key: str, share: float | None = None) -> Figure:
    def inside(value: float) -> str:
        part = value / 100 if share is None else share
        return percent(part) if part >= 0.06 else ""

    return {
        "type": "bar",
        "orientation": "h",
        "name": escape(name),
        "y": names,
        "x": values,
        "text": [inside(v) for v in values],
        "textposition": "inside",
        "insidetextanchor": "start" if key in COMMUNICATION else "middle",
        "insidetextfont": {"color": "#ffffff" if key in DARK else "#14181c"},
        "textangle": 0,
        "hoverinfo": "text",
        "marker": {"color": PART_COLOURS.get(key, GREY), "line": {"width": 0}},
    }


def _bar_layout(height: int, below: int, title: str, most: float) -> Figure:
    return {
        "height": height,
        "barmode": "stack",
        "bargap": 0.35,
        "margin": {"l": 90, "r": 16, "t": 8, "b": below},
        "xaxis": {"title": {"text": title, "standoff": 6, "font": {"size": 13}}, "range": [0, most], "zeroline": False},
        "yaxis": {"automargin": True, "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"},
        "legend": {
            "orientation": "h",
            "y": -58 / (height - below - 8),
            "yanchor": "top",
            "x": 0,
            "traceorder": "normal",
        },
        "hovermode": "closest",
    }


def _line(x: float) -> Figure:
    line = {"color": MARK, "width": 1.5}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}
