"""What a search found, as data that tables, Markdown and HTML read: nothing is computed while rendering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from dse.report.names import SETTINGS, broken, label, limit, percent, plain, rate, seconds, setting
from dse.report.plan import PlanSummary, Row, delivers, headline, row_at, summarise_plan
from dse.report.sentences import Headline, headlines, notes
from dse.search.result import SearchResult

MOST_POINTS = 2_000  # of the front: what a page can draw; the whole front is in pareto.csv
MOST_GROUPS = 8
DELIVERED = ("output_tok_s_gpu", "tpot_ms", "ttft_ms", "tok_s_user", "usd_per_mtok", "memory_gib")
PLAN_COLUMNS = (
    *("model", "gpu", "cluster", "gpus", "replicas", "tp", "pp", "attention_dp", "cp", "moe_ep", "moe_tp", "weights"),
    *("kv", "concurrency", "static_batch", "chunk", "speculation", "eplb_replicas", "overlap", "dispatch"),
    *("cp_method", "sequence_parallel", "microbatches", "utilisation", "serving", "kv_transfer", "pipeline"),
    *(
        f"{pool}_{column}"
        for pool in ("prefill", "decode")
        for column in ("gpu", "num_workers", "tp_size", "attention_dp_size", "moe_ep_size", "kv", "chunk", "overlap")
    ),
)
# What may colour the front, most telling first.
GROUPINGS = (
    *(
        "serving",
        "gpu",
        "model",
        "cluster",
        "moe_ep",
        "tp",
        "gpus",
        "pp",
        "attention_dp",
        "cp",
        "weights",
        "kv",
        "speculation",
    ),
    *("cp_method", "overlap", "replicas", "chunk"),
)


@dataclass(frozen=True)
class Stage:
    """One stage of the funnel: points left, the share of the stage before and of all, and why others left here."""

    name: str
    count: int
    kept: float
    of_all: float
    cut: int
    why: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Column:
    key: str
    label: str
    numeric: bool
    is_metric: bool


@dataclass(frozen=True)
class Table:
    """Rows as values (numbers unrounded). `same`: what all rows have in common, left out of the columns."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    same: tuple[tuple[str, str], ...]
    marks: tuple[str, ...]  # a row's role: "best", "knee" or ""
    total: int  # rows of the whole front


@dataclass(frozen=True)
class Point:
    """`values` in the order of `Scatter.axes`."""

    values: tuple[float, ...]
    group: str
    plan: str
    delivers: str


@dataclass(frozen=True)
class Scatter:
    """`axes`: metrics; the first is drawn against each other one. `by`: the setting that `Point.group` is of."""

    axes: tuple[str, ...]
    by: str
    groups: tuple[str, ...]
    front: tuple[Point, ...]
    others: tuple[Point, ...]
    best: int  # positions in `front`, -1: none
    knee: int


@dataclass(frozen=True)
class Summary:
    """`headlines` and `notes`: most important first; `facts` (name, value) tell how the result was found."""

    name: str
    description: str
    feasible: bool
    partial: bool
    objectives: tuple[tuple[str, str], ...]
    headlines: tuple[Headline, ...]
    notes: tuple[str, ...]
    funnel: tuple[Stage, ...]
    limits: tuple[str, ...]
    workloads: tuple[str, ...]
    best: PlanSummary | None
    knee: PlanSummary | None
    least: PlanSummary | None
    front: Table
    scatter: Scatter | None
    facts: tuple[tuple[str, str], ...]

    @property
    def shown(self) -> PlanSummary | None:
        """The plan whose breakdown is drawn: the best by the first objective, else the least-violating one."""
        return self.best or self.least


def summarise(result: SearchResult) -> Summary:
    """Everything a reader of a search's result is told."""
    front = result.front
    best, knee = (0, knee_of(front, result.objectives)) if len(front) else (-1, -1)
    shown = _spread(len(front), MOST_POINTS, (best, knee))
    stages = funnel(result)
    least = row_at(result.least, 0) if result.least is not None and len(result.least) else None

    def plan(row: Row | None, role: str) -> PlanSummary | None:
        return None if row is None else summarise_plan(row, role, result.constraints)

    first = label(result.objectives[0][0]).long
    space = result.run.get("space", {})
    return Summary(
        name=plain(result.name),
        description=plain(space.get("description", "")),
        feasible=len(front) > 0,
        partial=result.partial,
        objectives=result.objectives,
        headlines=headlines(result, knee, least, [(s.name, s.count) for s in stages]),
        notes=notes(result, len(shown)),
        funnel=stages,
        limits=tuple(limit(*x) for x in result.constraints),
        workloads=_workloads(space.get("workloads", [])),
        best=plan(row_at(front, 0), f"plan of best {first}") if len(front) else None,
        knee=plan(row_at(front, knee), "knee of the front") if knee >= 0 else None,
        least=None if len(front) else plan(least, "least-violating plan"),
        front=_table(front, shown, result.objectives, {knee: "knee", best: "best"}),
        scatter=_scatter(result, shown, best, knee) if len(front) else None,
        facts=_facts(result),
    )


def funnel(result: SearchResult) -> tuple[Stage, ...]:
    """Stages in order; the reasons of the cut to legal plans are counted, a later stage has one: its limit."""
    limits = {f"meets {m} {op} {bound:g}": (m, op, bound) for m, op, bound in result.constraints}
    causes = {"evaluated": "not sampled or not reached", "fits in memory": "needs more memory than a GPU has usable"}
    stages: list[Stage] = []
    total = result.funnel[0][1] if result.funnel else 0
    for raw, count in result.funnel:
        name = f"meets {limit(*limits[raw])}" if raw in limits else plain(raw)
        before = stages[-1].count if stages else count
        cut = before - count
        why: tuple[tuple[str, int], ...] = ()
        if raw == "legal":
            why = tuple(sorted(((plain(k), n) for k, n in result.cuts.items() if n), key=lambda x: (-x[1], x[0])))
        elif cut > 0:
            why = ((broken(*limits[raw]) if raw in limits else causes.get(raw, ""), cut),)
        stages.append(Stage(name, count, _share(count, before), _share(count, total), cut, why))
    return tuple(stages)


def knee_of(front: pd.DataFrame, objectives: Sequence[tuple[str, str]]) -> int:
    """The row with the least sum of objectives, each scaled to its range on the front; -1 where it is an end of it.

    With two objectives: the point farthest from the line between the two ends. Positive values are compared by their
    logarithms, so that a speed and its reciprocal, a time, have the same knee.
    """
    if len(front) < 3 or len(objectives) < 2:
        return -1
    sign = np.array([1.0 if direction == "min" else -1.0 for _, direction in objectives])
    values = front[[name for name, _ in objectives]].to_numpy(float)
    values = sign * (np.log(values) if (values > 0).all() else values)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    knee = int(np.argmin(scaled.sum(axis=1)))
    return -1 if knee in scaled.argmin(axis=0) else knee


def _spread(count: int, most: int, needed: Sequence[int]) -> list[int]:
    """At most about `most` positions, evenly along, with both ends and the needed ones."""
    if count <= most:
        return list(range(count))
    even = np.linspace(0, count - 1, most).round().astype(int)
    return sorted({*even.tolist(), *(i for i in needed if i >= 0)})


def spread_rows(table: Table, most: int) -> list[int]:
    """Positions of at most about `most` rows of a table, the marked ones among them."""
    return _spread(len(table.rows), most, [i for i, mark in enumerate(table.marks) if mark])


def _table(
    frame: pd.DataFrame, shown: list[int], objectives: Sequence[tuple[str, str]], marks: dict[int, str]
) -> Table:
    """Objectives, other main metrics, then the settings in which the rows differ."""
    if not len(frame):
        return Table((), (), (), (), 0)
    metrics = list(dict.fromkeys([*(name for name, _ in objectives), *DELIVERED]))
    varying = [c for c in PLAN_COLUMNS if c in frame and c not in metrics and frame[c].nunique(dropna=False) > 1]
    if {"gpu", "cluster"} <= set(varying) and len(frame[["gpu", "cluster"]].drop_duplicates()) == frame[
        "gpu"
    ].nunique():
        varying.remove("cluster")  # it goes with the GPU
    common = [c for c in PLAN_COLUMNS if c in frame and c not in metrics and frame[c].nunique(dropna=False) <= 1]
    keys = [c for c in metrics if c in frame] + varying
    heads = {c: label(c).short if c in metrics else SETTINGS[c][0] for c in keys}
    numeric = {c: bool(pd.api.types.is_numeric_dtype(frame[c])) for c in keys}
    columns = tuple(Column(c, heads[c], numeric[c], c in metrics) for c in keys)
    values = frame[keys].iloc[shown].astype(object).itertuples(index=False, name=None)
    return Table(
        columns=columns,
        rows=tuple(tuple(x if isinstance(x, (int, float)) else plain(x) for x in row) for row in values),
        same=tuple((SETTINGS[c][0], setting(frame[c].iloc[0])) for c in common if frame[c].iloc[0] != SETTINGS[c][1]),
        marks=tuple(marks.get(i, "") for i in shown),
        total=len(frame),
    )


def _scatter(result: SearchResult, shown: list[int], best: int, knee: int) -> Scatter:
    """Objectives as axes; a lone objective is drawn against what is usually traded for it."""
    axes = [name for name, _ in result.objectives]
    if len(axes) == 1:
        axes.append(next(m for m in ("tpot_ms", "output_tok_s_gpu") if m not in axes))
    by = _grouping(result.front)
    names = _group_names(result.front, by)

    def points(frame: pd.DataFrame) -> list[Point]:
        return [
            Point(
                values=tuple(float(row[a]) for a in axes),
                group=names.get(row.get(by), "other"),
                plan=headline(row),
                delivers=delivers(row, DELIVERED),
            )
            for row in frame.to_dict("records")
        ]

    front = points(result.front.iloc[shown])
    on_front = {p.values for p in front}
    return Scatter(
        axes=tuple(axes),
        by=SETTINGS[by][0] if by else "",
        groups=tuple(dict.fromkeys(names.values())) or ("front",),
        front=tuple(front),
        others=tuple(p for p in points(result.candidates) if p.values not in on_front),
        best=shown.index(best),
        knee=shown.index(knee) if knee >= 0 else -1,
    )


def _grouping(front: pd.DataFrame) -> str:
    """The first setting with few values of which none has nearly all rows, else the first that varies at all."""
    counts = {c: front[c].value_counts() for c in GROUPINGS if c in front}
    varying = [c for c, n in counts.items() if len(n) > 1]
    telling = [c for c in varying if counts[c].iloc[:MOST_GROUPS].sum() >= 0.8 * len(front)]
    even = [c for c in telling if counts[c].iloc[0] <= 0.9 * len(front)]
    return next(iter([*even, *telling, *varying]), "")


def _group_names(front: pd.DataFrame, by: str) -> dict[Any, str]:
    """Value -> group: the most frequent ones by themselves, in order; the rest together."""
    if not by:
        return {None: "front"}
    counts = front[by].value_counts()
    kept = list(counts.index[: MOST_GROUPS if len(counts) <= MOST_GROUPS else MOST_GROUPS - 1])
    ordered = sorted(kept) if pd.api.types.is_numeric_dtype(front[by]) else [x for x in front[by].unique() if x in kept]
    prefix = "" if by in ("gpu", "model", "cluster") else f"{SETTINGS[by][0]} "
    return {**{x: prefix + setting(x) for x in ordered}, **{x: "other" for x in counts.index[len(kept) :]}}


def _workloads(mix: Sequence[Any]) -> tuple[str, ...]:
    """`2048 in, 512 out`; weights and prefix hits where they matter."""
    total = sum(float(w.get("weight", 1)) for w in mix) or 1.0
    texts = []
    for w in mix:
        text = f"{w.get('isl', 0):,} tokens in, {w.get('osl', 0):,} out"
        if w.get("prefix_hit"):
            text += f", {percent(float(w['prefix_hit']))} of the prompt cached"
        texts.append(f"{percent(float(w.get('weight', 1)) / total)}: {text}" if len(mix) > 1 else text)
    return tuple(texts)


def _facts(result: SearchResult) -> tuple[tuple[str, str], ...]:
    run = result.run
    facts = [
        ("sampler", plain(result.sampler) + ("" if run.get("seed") is None else f", seed {run['seed']}")),
        ("objectives", "; ".join(f"{label(n).axis}, {d}" for n, d in result.objectives)),
        ("limits", "; ".join(limit(*x) for x in result.constraints) or "memory only"),
        ("plans enumerated", f"{result.enumerated:,}"),
        ("legal", f"{result.legal:,}"),
        ("evaluated", f"{result.evaluated:,}" + (" (partial run)" if result.partial else "")),
        ("feasible", f"{result.feasible:,}"),
        ("pairs of prefill and decode workers", _pairs(run)),
        ("time", f"{seconds(result.seconds)}, {rate(result.rate)} while sweeping"),
    ]
    if result.hypervolume_ratio is not None:
        facts.append(("hypervolume", f"{percent(result.hypervolume_ratio)} of the exhaustive front's"))
    versions = {**run.get("versions", {}), **({"python": run["python"]} if "python" in run else {})}
    facts.append(("versions", ", ".join(f"{plain(k)} {plain(v)}" for k, v in versions.items())))
    return tuple((name, text) for name, text in facts if text)


def _pairs(run: Mapping[str, Any]) -> str:
    found = run.get("disaggregated", {})
    return f"{found['pairs']:,}, in {seconds(found['seconds'])}" if "pairs" in found else ""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


__all__ = ["Column", "Point", "Scatter", "Stage", "Summary", "Table", "funnel", "knee_of", "spread_rows", "summarise"]
