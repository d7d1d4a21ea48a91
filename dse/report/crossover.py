"""Tensor parallelism against pipeline stages as a page: the load at which the one with the lower TTFT changes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from dse.report.audit import page
from dse.report.figures import GROUP_COLOURS, SYMBOLS
from dse.report.names import number
from dse.space.goodput import Crossing, crossover_curve
from dse.units import MS


def crossover_figure(crossings: Sequence[Crossing]) -> dict[str, Any]:
    """R D at the crossover against K/n: a line a number of GPUs, a mark a model and machine."""
    data: list[dict[str, Any]] = []
    gpus = sorted({n for c in crossings for n in c.gpus})
    for i, n in enumerate(gpus):
        curve = crossover_curve(n)
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"{n} GPUs",
                "x": [x for x, _ in curve],
                "y": [y for _, y in curve],
                "line": {"color": GROUP_COLOURS[i % 8], "width": 2},
                "hoverinfo": "skip",
            }
        )
    for j, c in enumerate(crossings):
        colours = [GROUP_COLOURS[gpus.index(n) % 8] for n in c.gpus]
        texts = [
            f"{escape(c.name)}<br>{n} GPUs: K {number(k)}, crossover at {number(rate)} requests/s"
            for n, k, rate in zip(c.gpus, c.speedups, c.rates, strict=True)
        ]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(c.name),
                "x": [k / n for k, n in zip(c.speedups, c.gpus, strict=True)],
                "y": [load / n for load, n in zip(c.loads, c.gpus, strict=True)],
                "marker": {"symbol": SYMBOLS[j % 8], "size": 11, "color": colours},
                "hovertext": texts,
                "hoverinfo": "text",
            }
        )
    layout = {
        "height": 460,
        "margin": {"l": 70, "r": 16, "t": 16, "b": 52},
        "xaxis": {"title": {"text": "speed-up of tensor parallelism over GPUs (K/n)"}, "range": [0, 1.02]},
        "yaxis": {"title": {"text": "utilisation of the pipeline, R D/n"}, "range": [0, 1.02], "zeroline": False},
        "legend": {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0},
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def html(crossings: Sequence[Crossing]) -> str:
    """The whole page."""
    rows = "".join(
        f"<tr><td>{escape(c.name)}</td><td class='n'>{n}</td><td class='n'>{number(c.service / MS)}</td>"
        f"<td class='n'>{number(k)}</td><td class='n'>{number(load)}</td><td class='n'>{number(rate)}</td></tr>"
        for c in crossings
        for n, k, load, rate in zip(c.gpus, c.speedups, c.loads, c.rates, strict=True)
    )
    heads = "".join(
        f"<th{' class=n' if i else ''}>{name}</th>"
        for i, name in enumerate(("case", "GPUs n", "D, ms", "K", "R D there", "requests/s"))
    )
    body = f"""
<header><h1>Tensor parallelism or pipeline stages?</h1>
<p class="lead">Mean TTFT of prefill under Poisson arrivals. Below its line tensor parallelism is faster, above it
pipeline stages are.</p></header>
<figure><div id="crossover" class="chart"></div></figure>
<p class="muted">D: prefill of one prompt on one GPU; n stages: D + R D²/(2n(n - RD)); tensor parallelism that runs
K times as fast: D/K + R D²/(2K(K - RD)). K is what the collectives and kernels of the cost model leave of n.</p>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"""
    return page("Tensor parallelism or pipeline stages", body, {"crossover": crossover_figure(crossings)})


__all__ = ["crossover_figure", "html"]
