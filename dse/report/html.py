"""A summary as one self-contained page: charts by an inlined plotly.js, nothing is fetched, every name is escaped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from dse.report.figures import Figure, front_figure, memory_figure, steps_figure
from dse.report.names import label, number, percent, setting
from dse.report.plan import MemoryUse, PlanSummary
from dse.report.style import CSS, SCRIPT
from dse.report.summary import Column, Scatter, Stage, Summary, Table, spread_rows
from dse.report.text import Grid, memory_grid, steps_grid

MOST_ROWS = 200  # of the front's table
TILES = ("output_tok_s_gpu", "tpot_ms", "ttft_ms", "tok_s_user", "usd_per_mtok", "gpus")
POLICY = (  # a page that can fetch nothing and send nothing
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "form-action 'none'; base-uri 'none'"
)


def html(summary: Summary) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs  # 4.8 MB of text; nothing else of plotly is needed

    figures: dict[str, Figure] = {}
    body = [_header(summary)]
    if summary.scatter is not None:
        figures["front"] = front_figure(summary, summary.scatter)
        body.append(_front(summary, summary.scatter))
    if summary.shown is not None:
        body.append(_plan(summary.shown, figures))
    body.append(_funnel(summary.funnel))
    if summary.front.rows:
        body.append(_table(summary))
    body.append(_run(summary))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(summary.name)} – search report</title>
<style>{CSS}</style>
</head>
<body>
<main>
{"".join(body)}
</main>
<script type="application/json" id="figures">{_json(figures)}</script>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(data: Any) -> Any:
    """NaN and infinities as null: JSON has none."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not (-1e308 < data < 1e308) else data


def _header(s: Summary) -> str:
    rows = "".join(
        f"<dt>{escape(h.title)}</dt><dd>{escape(h.text)}"
        + (f'<div class="plan">{escape(h.plan)}</div>' if h.plan else "")
        + "</dd>"
        for h in s.headlines
    )
    chips = [("workload", x) for x in s.workloads] + [("limit", x) for x in s.limits]
    kinds = ["" if s.partial and i == 0 else " info" for i in range(len(s.notes))]
    notes = "".join(f'<p class="note{kind}">{escape(note)}</p>' for kind, note in zip(kinds, s.notes, strict=True))
    bad = (
        ""
        if s.feasible
        else '<p class="note bad">No plan meets every limit; below is the one that misses by least.</p>'
    )
    lead = f'<p class="lead">{escape(s.description)}</p>' if s.description else ""
    return (
        f"<header><h1>{escape(s.name)}</h1>{lead}{_chips(chips)}</header>{bad}{notes}<dl class='headlines'>{rows}</dl>"
    )


def _chips(pairs: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><span>{escape(name)}</span> {escape(value)}</li>" for name, value in pairs)
    return f'<ul class="chips">{items}</ul>' if items else ""


def _front(s: Summary, scatter: Scatter) -> str:
    colour = f"Colour and symbol: {escape(scatter.by)}. " if scatter.by else ""
    line = "The dotted line bounds what is attained. " if len(s.objectives) == 2 and s.front.total > 1 else ""
    directions = "; ".join(f"{label(n).long} {'lower' if d == 'min' else 'higher'} is better" for n, d in s.objectives)
    many = f"{s.front.total:,} plans that no other beats" if s.front.total != 1 else "One plan that no other beats"
    return f"""
<section><h2>Pareto front</h2>
<p class="muted">{many}; {escape(directions)}. {colour}{line}Point at a plan to read it whole.</p>
<figure><div id="front" class="chart"></div></figure></section>
"""


def _plan(plan: PlanSummary, figures: dict[str, Figure]) -> str:
    tiles = "".join(_tile(plan, name) for name in TILES if name in plan.metrics)
    if plan.memory is not None:
        tiles += f"<div class='tile'><b>{percent(plan.memory.share)}</b><span>of usable memory</span></div>"
    more = "1 more plan reaches" if plan.ties == 2 else f"{plan.ties - 1:,} more plans reach"
    ties = f" {more} the same." if plan.ties > 1 else ""
    limits = escape(f"{_capital('; '.join(x.text for x in plan.limits))}." if plan.limits else "")
    text = f"""
<section><h2>{escape(_capital(plan.role))}</h2>
<p class="plan">{escape(plan.headline)}</p><p class="muted">{limits}{ties}</p>
<div class="tiles">{tiles}</div>{_chips(plan.settings)}"""
    if plan.steps:
        figures["steps"] = steps_figure(plan)
        text += f"""
<h3>Where the time of a step goes</h3>
<p class="muted">Decode: running requests only. Mixed: a chunk of prompts beside them. Prefill: prompts only.
Parts are as if nothing overlapped: what lies right of the red line is hidden by overlap and takes no time.</p>
<figure><div id="steps" class="chart"></div></figure>{grid_html(steps_grid(plan))}"""
    if plan.memory is not None:
        figures["memory"] = memory_figure(plan.memory)
        text += _memory(plan, plan.memory)
    return text + "</section>"


def _memory(plan: PlanSummary, memory: MemoryUse) -> str:
    left = f"{number(memory.free)} GiB are free" if memory.free >= 0 else f"{number(-memory.free)} GiB are missing"
    return f"""
<h3>Memory of the fullest GPU</h3>
<p class="muted">{number(memory.total)} of {number(memory.usable)} usable GiB; {left}.</p>
<figure><div id="memory" class="chart"></div></figure>{grid_html(memory_grid(plan, memory))}"""


def _tile(plan: PlanSummary, name: str) -> str:
    unit = label(name).unit
    what = f"{label(name).long}, {unit}" if unit and "tokens" not in unit else unit or label(name).long
    return f"<div class='tile'><b>{number(plan.metrics[name])}</b><span>{escape(what)}</span></div>"


def _funnel(stages: Sequence[Stage]) -> str:
    rows = "".join(
        f"<tr><td>{escape(s.name)}</td><td class='n'>{s.count:,}</td><td class='bar'>{_bar(s)}</td>"
        f"<td class='n'>{percent(s.kept)}</td><td class='why'>{_why(s)}</td></tr>"
        for s in stages
    )
    return f"""
<section><h2>From all plans to feasible ones</h2>
<div class="scroll"><table class="wide"><thead><tr><th>stage</th><th class="n">plans left</th><th>of all</th>
<th class="n">kept</th><th>why the others were cut</th></tr></thead><tbody>{rows}</tbody></table></div></section>
"""


def _bar(stage: Stage) -> str:
    return f"<i style='width:{100 * stage.of_all:.3f}%'></i>" if stage.count else ""


def _why(stage: Stage) -> str:
    return "<br>".join(f"{count:,}: {escape(reason)}" for reason, count in stage.why)


def _table(s: Summary) -> str:
    table, shown = s.front, spread_rows(s.front, MOST_ROWS)
    heads = "".join(
        f"<th{_class(c)}><button type='button'>{escape(c.label)}</button></th>"
        for c in (Column("", "plan", False, False), *table.columns)
    )
    rows = "".join(_front_row(table, i) for i in shown)
    same = ", ".join(f"{name} {value}" for name, value in table.same)
    more = f"{len(shown):,} of {table.total:,} plans, evenly along the front; " if len(shown) < table.total else ""
    return f"""
<section><h2>Plans of the front</h2>
<p class="muted">{more}pareto.csv has every plan and column. Select a heading to sort.
{escape(f"The same for all: {same}." if same else "")}</p>
<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>
"""


def _front_row(table: Table, i: int) -> str:
    cells = [f"<td data-v='{i}'>{escape(table.marks[i]) or i + 1}</td>"]
    for column, value in zip(table.columns, table.rows[i], strict=True):
        text = number(value) if column.is_metric else setting(value)
        exact = f" data-v='{float(value)!r}'" if column.numeric else ""
        cells.append(f"<td{_class(column)}{exact}>{escape(text)}</td>")
    return f"<tr{' class=strong' if table.marks[i] else ''}>{''.join(cells)}</tr>"


def _class(column: Column) -> str:
    return " class='n'" if column.numeric else ""


def grid_html(grid: Grid) -> str:
    """A table of finished text, without its title and caption."""
    kinds = [" class='n'" if right else "" for right in grid.right]
    heads = "".join(f"<th{k}>{escape(h)}</th>" for k, h in zip(kinds, grid.heads, strict=True))
    rows = "".join(
        f"<tr{' class=strong' if i in grid.strong else ''}>"
        + "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for i, row in enumerate(grid.rows)
    )
    return f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"


def _run(s: Summary) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in s.facts)
    return f"<section><h2>How this was found</h2><dl class='facts'>{facts}</dl></section>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


__all__ = ["grid_html", "html"]
