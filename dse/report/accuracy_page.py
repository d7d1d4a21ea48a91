"""An accuracy report as one self-contained page with parity plots, and as Markdown. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import isfinite, log10
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from dse.files import atomic_write_all, output_directory
from dse.report.accuracy import AccuracyReport, Errors, Parity, Split, summarise
from dse.report.audit import page
from dse.report.figures import GREY, GROUP_COLOURS, SYMBOLS, Figure
from dse.report.html import grid_html
from dse.report.names import number, percent
from dse.report.text import Grid, grid_markdown

if TYPE_CHECKING:
    from dse.calibrate.roofline import Beside
    from dse.calibrate.run import Accuracy

OUTPUTS = ("accuracy.html", "accuracy.md", "predictions.csv")
BAND = 1.25  # the dotted lines of a parity plot

# --------------------------------------------------------------------------------------------------- tables


def split_grid(report: AccuracyReport) -> Grid:
    """Errors of every split, a line a measure."""
    rows = [
        (s.name, p.measure.label, f"{p.errors.rows:,}", *_shown(p.errors)) for s in report.splits for p in s.parities
    ]
    return Grid(
        title="Errors on rows that the fit never saw",
        heads=("left out", "", "rows", "mean", "median", "bias"),
        rows=tuple(rows),
        right=(False, False, True, True, True, True),
        caption="Error: |predicted / measured − 1|. Bias: geometric mean of predicted / measured.",
    )


def bucket_grid(split: Split) -> Grid:
    heads = [f"{p.measure.label} {word}" for p in split.parities for word in ("mean", "median", "bias")]
    rows, last = [], ""
    for column, value, found in split.buckets:
        cells = [text for e in found for text in _shown(e)]
        rows.append((column if column != last else "", value.split("/")[-1], f"{found[0].rows:,}", *cells))
        last = column
    return Grid(
        title=f"Errors by bucket: {split.name}",
        heads=("", "", "rows", *heads),
        rows=tuple(rows),
        right=(False, False, True, *(True for _ in heads)),
    )


def worst_grid(split: Split) -> Grid:
    first = split.parities[0].measure
    texts = ("model", "gpu", "engine", "weights", "workload")
    return Grid(
        title=f"Furthest off in {first.label}: {split.name}",
        heads=split.worst_heads,
        rows=split.worst,
        right=tuple(head not in texts for head in split.worst_heads),
    )


def beside_grids(beside: Beside) -> Iterator[Grid]:
    """The corrected roofline's errors against ours, then what its own health checks say."""
    rows = []
    for line in beside.table.to_dict("records"):
        shown = [_percent(float(line[f"{who}_{kind}"])) for who in ("roofline", "ours") for kind in ("mean", "median")]
        rows.append((str(line["metric"]).upper(), f"{line['rows']:,}", *shown))
    yield Grid(
        title="Corrected roofline, fitted to the same rows, held out by the same folds",
        heads=("", "rows", "roofline mean", "median", "ours mean", "median"),
        rows=tuple(rows),
        right=(False, *(True for _ in range(5))),
        caption="Rows of models and plans that the method knows. "
        + (
            "Its own stopping rule (below 10%) is met."
            if beside.done
            else "Its own stopping rule (below 10%) is not met."
        ),
    )
    yield Grid(
        title="Corrected roofline: health of its parameters",
        heads=("", "value", "95% interval", "says"),
        rows=tuple(
            (h.name, f"{h.value:.3g}", f"{h.low:.3g} to {h.high:.3g}", h.complaint or "healthy") for h in beside.health
        ),
        right=(False, True, True, False),
        caption="The betas of prefill, decode, static, moe and reduce multiply times at peak; the others are seconds.",
    )


def refused_grid(report: AccuracyReport) -> Grid:
    rows = tuple((f"{count:,}", reason) for reason, count in report.refused)
    return Grid(title="Rows that could not serve", heads=("rows", "why"), rows=rows, right=(True, False))


def _shown(e: Errors) -> tuple[str, str, str]:
    return _percent(e.mean), _percent(e.median), f"{e.bias:.2f}" if isfinite(e.bias) else "–"


def _percent(share: float) -> str:
    return percent(share) if isfinite(share) else "–"


# -------------------------------------------------------------------------------------------------- figures


def parity_figure(split: Split) -> Figure:
    """Predicted against measured, a panel a measure, on logarithmic axes: on the line is right, dotted is 25% off."""
    count, gap = len(split.parities), 0.1
    width = (1.0 - gap * (count - 1)) / count
    groups = list(dict.fromkeys(sorted(g for p in split.parities for g in p.group)))
    data: list[Figure] = []
    layout: Figure = {
        "height": 480,
        "margin": {"l": 64, "r": 16, "t": 16, "b": 52},
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    }
    for k, p in enumerate(split.parities):
        n = "" if k == 0 else str(k + 1)
        start = k * (width + gap)
        low, high = min(*p.measured, *p.predicted) / 1.15, max(*p.measured, *p.predicted) * 1.15
        ticks = "D2" if high < 200 * low else 1  # 1, 2, 5 of each decade, or decades alone
        axis = {"type": "log", "range": [log10(low), log10(high)], "zeroline": False, "dtick": ticks}
        title = f"{p.measure.label} ({p.measure.unit})"
        layout[f"xaxis{n}"] = axis | _title(f"measured {title}") | {"domain": [start, start + width], "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = axis | _title(f"predicted {title}") | {"anchor": f"x{n}"}
        data += [_line(low, high, factor, n) for factor in (1.0, BAND, 1.0 / BAND)]
        data += [_points(p, group, i, n) for i, group in enumerate(groups)]
    return {"data": data, "layout": layout}


def _title(text: str) -> Figure:
    return {"title": {"text": text, "standoff": 8, "font": {"size": 13}}, "automargin": True, "tickformat": ",~r"}


def _line(low: float, high: float, factor: float, n: str) -> Figure:
    style: Figure = {"color": GREY, "width": 1.5 if factor == 1.0 else 1, "dash": "solid" if factor == 1.0 else "dot"}
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [low, high],
        "y": [low * factor, high * factor],
        "line": style,
        "hoverinfo": "skip",
        "showlegend": False,
        "xaxis": f"x{n}",
        "yaxis": f"y{n}",
    }


def _points(p: Parity, group: str, i: int, n: str) -> Figure:
    some = [k for k, name in enumerate(p.group) if name == group]
    unit = p.measure.unit
    times = [f"measured {number(p.measured[k])} {unit}, predicted {number(p.predicted[k])} {unit}" for k in some]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(group),
        "legendgroup": escape(group),
        "showlegend": n == "",
        "x": [p.measured[k] for k in some],
        "y": [p.predicted[k] for k in some],
        "hovertext": [f"{escape(p.about[k])}<br>{escape(time)}" for k, time in zip(some, times, strict=True)],
        "hoverinfo": "text",
        "marker": {"color": GROUP_COLOURS[i % 8], "symbol": SYMBOLS[i % 8], "size": 6, "opacity": 0.7},
        "xaxis": f"x{n}",
        "yaxis": f"y{n}",
    }


# ---------------------------------------------------------------------------------------------------- pages


def html(report: AccuracyReport) -> str:
    """The whole page, self-contained."""
    figures = {f"parity{i}": parity_figure(s) for i, s in enumerate(report.splits) if s.parities}
    main = split_grid(report)
    body = [
        f"<header><h1>Accuracy</h1><p class='lead'>Against {escape(report.source or 'measurements')}: every row is "
        "predicted by a fit that never saw it, nor its series, model or GPU.</p></header>",
        f"<section>{grid_html(main)}<p class='muted'>{escape(main.caption)}</p></section>",
    ]
    for i, split in enumerate(report.splits):
        body.append(f"<section><h2>{escape(split.name[:1].upper() + split.name[1:])}</h2>")
        body.append(f"<figure><div id='parity{i}' class='chart'></div></figure>")
        body.append("<h3>By bucket</h3>" + grid_html(bucket_grid(split)))
        body.append(f"<h3>Furthest off in {escape(split.parities[0].measure.label)}</h3>{grid_html(worst_grid(split))}")
        body.append("</section>")
    for beside in report.beside:
        for grid in beside_grids(beside):
            body.append(f"<section><h2>{escape(grid.title)}</h2>{grid_html(grid)}")
            body.append(f"<p class='muted'>{escape(grid.caption)}</p></section>")
    if report.refused:
        grid = refused_grid(report)
        body.append(f"<section><h2>{escape(grid.title)}</h2>{grid_html(grid)}</section>")
    return page("Accuracy", "".join(body), figures)


def markdown(report: AccuracyReport) -> str:
    """The same tables as a Markdown document."""
    lines = ["# Accuracy", "", f"Against {report.source or 'measurements'}.", "", *grid_markdown(split_grid(report))]
    for split in report.splits:
        lines += [*grid_markdown(bucket_grid(split)), *grid_markdown(worst_grid(split))]
    for beside in report.beside:
        for grid in beside_grids(beside):
            lines += grid_markdown(grid)
    if report.refused:
        lines += grid_markdown(refused_grid(report))
    return "\n".join(lines)


def write_accuracy(
    result: Accuracy, out_dir: str | Path, source: str = "", beside: Sequence[Beside] = ()
) -> tuple[Path, ...]:
    """Write `accuracy.html`, `accuracy.md` and `predictions.csv` (every held-out prediction): all, or none."""
    folder = output_directory(out_dir)
    report = summarise(result, source, beside)
    rows = [frame.assign(split=name) for name, frame in result.rows.items()]
    table = pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()
    contents: dict[Path, str | bytes] = {
        folder / OUTPUTS[0]: html(report),
        folder / OUTPUTS[1]: markdown(report),
        folder / OUTPUTS[2]: str(table.to_csv(index=False, float_format="%.9g")),
    }
    atomic_write_all(contents)
    return tuple(contents)


__all__ = ["OUTPUTS", "html", "markdown", "parity_figure", "write_accuracy"]
