"""A summary as terminal tables (rich) and as Markdown: the same numbers, in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from dse.report.names import PART_LABELS, number, percent, setting
from dse.report.plan import MemoryUse, PlanSummary
from dse.report.summary import Column, Summary, spread_rows

MOST_ROWS = 15  # of the front in a terminal; Markdown takes more


@dataclass(frozen=True)
class Grid:
    """A table of finished text; `right`: columns aligned right; `strong`: rows that stand out."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]
    strong: tuple[int, ...] = ()
    caption: str = ""


@dataclass(frozen=True)
class _Printed:
    """A summary that takes the width of the console it is printed on."""

    summary: Summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        s = self.summary
        yield Text(s.name, style="bold")
        if s.description:
            yield Text(s.description, style="dim")
        yield ""
        for line in s.headlines:
            yield Text.assemble((f"{line.title}: ", "bold"), line.text)
            if line.plan:
                yield Padding(Text(line.plan, style="cyan"), (0, 0, 0, 2), expand=False)
        for note in s.notes:
            yield Text(f"Note: {note}", style="yellow")
        for grid in grids(s, MOST_ROWS, options.max_width):
            yield _rich(grid)


def render(summary: Summary) -> RenderableType:
    """What the command line prints: sentences, then tables that fit the console's width."""
    return _Printed(summary)


def markdown(summary: Summary, most: int = 50) -> str:
    """The summary as a Markdown document."""
    lines = [f"# {_escaped(summary.name)}", ""]
    if summary.description:
        lines += [_escaped(summary.description), ""]
    for line in summary.headlines:
        plan = f" {_escaped(line.plan)}." if line.plan else ""
        lines.append(f"- **{_escaped(line.title)}**: {_escaped(line.text)}.{plan}")
    lines += ["", *(f"> {_escaped(note)}\n" for note in summary.notes)]
    for grid in grids(summary, most):
        lines += grid_markdown(grid)
    lines += ["## Run", "", *(f"- {name}: {_escaped(text)}" for name, text in summary.facts)]
    return "\n".join(lines) + "\n"


def grid_markdown(grid: Grid) -> list[str]:
    """Lines of one section: title, table, caption."""
    lines = [f"## {_escaped(grid.title)}", "", _row(grid.heads)]
    lines.append(_row(["---:" if right else "---" for right in grid.right], escape=False))
    lines += [_row(row) for row in grid.rows]
    return [*lines, "", *([_escaped(grid.caption), ""] if grid.caption else [])]


def grids(summary: Summary, most: int, width: int | None = None) -> Iterator[Grid]:
    """The tables of a summary: front, steps, memory, funnel."""
    if summary.front.rows:
        yield front_grid(summary, most, width)
    plan = summary.shown
    if plan is not None and plan.steps:
        yield steps_grid(plan)
    if plan is not None and plan.memory is not None:
        yield memory_grid(plan, plan.memory)
    if summary.funnel:
        yield funnel_grid(summary)


def front_grid(summary: Summary, most: int, width: int | None = None) -> Grid:
    """Rows of the front, evenly along it; where they do not fit in `width`, metrics that are no objective go first."""
    table = summary.front
    positions = spread_rows(table, most)
    texts = [[_cell(c, table.rows[i][k]) for k, c in enumerate(table.columns)] for i in positions]
    marks = [table.marks[i] for i in positions]
    kept = list(range(len(table.columns)))
    if width is not None:
        wide = [max(len(x) for x in (*c.label.split(), *column)) + 2 for c, column in zip(table.columns, zip(*texts))]
        for k in _least_needed(summary):
            if sum(wide[i] for i in kept) + 5 > width:
                kept.remove(k)
    more = f"{len(positions):,} of the front's {table.total:,} plans, evenly along it." if most < table.total else ""
    same = ", ".join(f"{name} {value}" for name, value in table.same)
    gone = ", ".join(c.label for k, c in enumerate(table.columns) if k not in kept and not c.is_metric)
    texts_below = [more, f"All: {same}." if same else "", f"Left out for want of width: {gone}." if gone else ""]
    return Grid(
        title=f"Front of {table.total:,} plan{'s' if table.total != 1 else ''}",
        heads=("", *(table.columns[k].label for k in kept)),
        rows=tuple((mark, *(row[k] for k in kept)) for mark, row in zip(marks, texts, strict=True)),
        right=(False, *(table.columns[k].numeric for k in kept)),
        strong=tuple(i for i, mark in enumerate(marks) if mark),
        caption=" ".join(text for text in texts_below if text),
    )


def _least_needed(summary: Summary) -> list[int]:
    """Columns that may be left out, least needed first: metrics, then settings but the load; objectives stay."""
    columns = list(enumerate(summary.front.columns))
    objectives = {name for name, _ in summary.objectives}
    metrics = [k for k, c in columns if c.is_metric and c.key not in objectives]
    settings = [k for k, c in columns if not c.is_metric and c.key != "concurrency"]
    return [*reversed(metrics), *reversed(settings)]


def steps_grid(plan: PlanSummary) -> Grid:
    """Milliseconds and shares of each step; parts are as if nothing overlapped, what overlap hides is taken off."""
    rows: list[tuple[str, ...]] = []
    for key in plan.step_parts:
        cells = [step.part(key) for step in plan.steps]
        texts = [(number(p.value), percent(p.share)) if p else ("", "") for p in cells]
        rows.append((PART_LABELS.get(key, key), *(text for pair in texts for text in pair)))
    if any(step.hidden_ms for step in plan.steps):
        hidden = [(f"−{number(s.hidden_ms)}", f"−{percent(s.hidden_share)}") for s in plan.steps]
        rows.append(("hidden by overlap", *(text for pair in hidden for text in pair)))
    rows.append(("step", *(text for s in plan.steps for text in (number(s.total_ms), "100%"))))
    heads = tuple(text for s in plan.steps for text in (f"{s.step} ms", "share"))
    return Grid(
        title=f"Engine steps, {plan.role}",
        heads=("", *heads),
        rows=tuple(rows),
        right=(False, *(True for _ in heads)),
        strong=(len(rows) - 1,),
    )


def memory_grid(plan: PlanSummary, memory: MemoryUse) -> Grid:
    rows = [(p.label, number(p.value), percent(p.share)) for p in memory.parts]
    rows += [("total", number(memory.total), percent(memory.share)), ("usable", number(memory.usable), "100%")]
    return Grid(
        title=f"Memory of the fullest GPU, {plan.role}",
        heads=("", "GiB", "of usable"),
        rows=tuple(rows),
        right=(False, True, True),
        strong=(len(rows) - 2,),
    )


def funnel_grid(summary: Summary) -> Grid:
    rows = []
    for stage in summary.funnel:
        why = "; ".join(f"{n:,} {reason}" if len(stage.why) > 1 else reason for reason, n in stage.why)
        rows.append((stage.name, f"{stage.count:,}", percent(stage.kept), f"{stage.cut:,}" if stage.cut else "", why))
    return Grid(
        title="From all plans to feasible ones",
        heads=("stage", "plans", "kept", "cut", "why"),
        rows=tuple(rows),
        right=(False, True, True, True, False),
    )


def _cell(column: Column, value: object) -> str:
    return number(value) if column.is_metric else setting(value)


def _rich(grid: Grid) -> RenderableType:
    table = RichTable(box=None, pad_edge=False)
    for head, right in zip(grid.heads, grid.right, strict=True):
        table.add_column(Text(_stacked(head), style="dim"), justify="right" if right else "left", overflow="fold")
    for i, row in enumerate(grid.rows):
        table.add_row(*(Text(cell) for cell in row), style="bold" if i in grid.strong else None)
    below = [Text(grid.caption, style="dim")] if grid.caption else []
    return Padding(Group(Text(grid.title, style="bold"), table, *below), (1, 0, 0, 0), expand=False)


def _stacked(head: str) -> str:
    """A head of two words in two lines: `out tok/s/GPU`."""
    return head.replace(" ", "\n")


def _row(cells: Sequence[str], escape: bool = True) -> str:
    return "| " + " | ".join(_escaped(c) if escape else c for c in cells) + " |"


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{c}" if c in "|*_`[]#" else c for c in text)


__all__ = [
    "Grid",
    "front_grid",
    "funnel_grid",
    "grid_markdown",
    "grids",
    "markdown",
    "memory_grid",
    "render",
    "steps_grid",
]
