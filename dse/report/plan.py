"""One plan of a result as data for people: its settings, what it delivers, its steps and its memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dse.report.names import (
    DEGREES,
    METRIC_LABELS,
    PART_LABELS,
    SETTINGS,
    amount,
    label,
    number,
    percent,
    plain,
    quantity,
    setting,
)
from dse.space.columns import MEMORY_PARTS, STEP_PARTS, STEPS

Row = Mapping[Any, Any]


@dataclass(frozen=True)
class Part:
    """`share` of the step's time, or of usable memory."""

    key: str
    label: str
    value: float
    share: float


@dataclass(frozen=True)
class Breakdown:
    """One engine step. Parts are as if nothing overlapped: they add up to `total_ms + hidden_ms`."""

    step: str
    total_ms: float
    hidden_ms: float
    parts: tuple[Part, ...]

    @property
    def hidden_share(self) -> float:
        return self.hidden_ms / self.total_ms

    def part(self, key: str) -> Part | None:
        return next((p for p in self.parts if p.key == key), None)


@dataclass(frozen=True)
class MemoryUse:
    """GiB of the fullest GPU."""

    total: float
    usable: float
    parts: tuple[Part, ...]

    @property
    def free(self) -> float:
        return self.usable - self.total

    @property
    def share(self) -> float:
        return self.total / self.usable if self.usable else 0.0


@dataclass(frozen=True)
class Limit:
    """A plan against one constraint; `used` is 1 at the limit, above it the limit is broken."""

    metric: str
    op: str
    bound: float
    value: float
    used: float

    @property
    def text(self) -> str:
        """`TPOT 46.5 ms of at most 50 ms (93%)`."""
        reached = f"{label(self.metric).long} {amount(self.metric, self.value)}"
        if self.op == "max":
            return f"{reached} of at most {amount(self.metric, self.bound)} ({percent(self.used)})"
        times = self.value / self.bound if self.bound else float("inf")
        return f"{reached}, {number(times)} times the least of {amount(self.metric, self.bound)}"


@dataclass(frozen=True)
class PlanSummary:
    """`role`: why this plan is shown. `headline`: it in a line. `settings`: (name, value). `metrics`: by column."""

    role: str
    headline: str
    settings: tuple[tuple[str, str], ...]
    metrics: dict[str, float]
    limits: tuple[Limit, ...]
    steps: tuple[Breakdown, ...]
    memory: MemoryUse | None
    ties: int

    @property
    def step_parts(self) -> tuple[str, ...]:
        """Parts that any of its steps has, in the order in which they are drawn."""
        present = {part.key for step in self.steps for part in step.parts}
        return tuple(part for part in STEP_PARTS if part in present)


def row_at(frame: pd.DataFrame, position: int) -> Row:
    return frame.iloc[[position]].to_dict("records")[0]


def summarise_plan(row: Row, role: str, constraints: Sequence[tuple[str, str, float]]) -> PlanSummary:
    """A row of a result's DataFrame, as data."""
    return PlanSummary(
        role=role,
        headline=headline(row),
        settings=tuple((SETTINGS[c][0], setting(row[c])) for c in SETTINGS if c in row and _says_something(row, c)),
        metrics={name: float(row[name]) for name in METRIC_LABELS if name in row},
        limits=tuple(_limit(row, *x) for x in constraints if x[0] in row),
        steps=tuple(b for b in (_breakdown(row, step) for step in STEPS) if b is not None),
        memory=_memory(row),
        ties=int(row.get("ties", 1)),
    )


def headline(row: Row, model: bool = True) -> str:
    """`Llama-3.1-70B on 2 × h100: tp 2, weights fp8, kv fp8, 87 in flight, chunk 1024, overlap partial`."""
    get = row.get
    if "pipeline" in row:
        return f"{plain(row['pipeline'])} ({setting(get('gpus'))} × {plain(get('gpu', 'GPU'))})"
    if is_split(row):
        return _split_headline(row, model)
    degrees = [f"{SETTINGS[d][0]} {setting(get(d))}" for d in DEGREES if int(get(d, 1)) > 1] or ["tp 1"]
    replicas = int(get("replicas", 1))
    parts = [f"{replicas:,} replicas of {' · '.join(degrees)}" if replicas > 1 else " · ".join(degrees)]
    parts += [f"{name} {plain(get(name))}" for name in ("weights", "kv") if name in row]
    if "concurrency" in row:
        load = setting(get("concurrency"))
        parts.append(f"batch {load}" if get("static_batch", 0) else f"{load} in flight")
        parts[-1] += " a replica" if replicas > 1 else ""
    for column in (
        "chunk",
        "speculation",
        "eplb_replicas",
        "overlap",
        "dispatch",
        "cp_method",
        "sequence_parallel",
        "microbatches",
    ):
        if column in row and _says_something(row, column):
            name = SETTINGS[column][0]
            parts.append(name if column == "sequence_parallel" else f"{name} {setting(get(column))}")
    machine = f"{setting(get('gpus', 1))} × {plain(get('gpu', 'GPU'))}"
    place = f"{plain(get('model', 'model'))} on {machine}" if model else machine
    return f"{place}: {', '.join(parts)}"


def is_split(row: Row) -> bool:
    """Whether a row is of a prefill and a decode pool."""
    workers = row.get("prefill_num_workers")
    return workers is not None and not pd.isna(workers)


def _split_headline(row: Row, model: bool) -> str:
    """`DeepSeek-V3 on 32 × h200: 2 prefill workers of attention_dp 8, ep 8, chunk 8192; 1 decode worker of ...`."""
    pools = []
    for pool in ("prefill", "decode"):
        count = int(row[f"{pool}_num_workers"])
        columns = [f"{pool}_{name}" for name in ("tp_size", "pp_size", "attention_dp_size", "cp_size", "moe_ep_size")]
        degrees = [c for c in columns if int(row.get(c, 1)) > 1]
        own = [f"{pool}_{name}" for name in ("weights", "kv", "chunk", "overlap")]
        said = [c for c in own if c in row and _says_something(row, c)]
        texts = [f"{SETTINGS[c][0].removeprefix(f'{pool} ')} {setting(row[c])}" for c in (*degrees, *said)]
        gpu = f" on {plain(row[f'{pool}_gpu'])}" if " + " in str(row.get("gpu", "")) else ""
        pools.append(f"{count:,} {pool} worker{'s' if count > 1 else ''}{gpu} of {', '.join(texts)}")
    common = [c for c in ("speculation", "kv_transfer") if c in row and _says_something(row, c)]
    texts = [*pools, *(f"{SETTINGS[c][0]} {setting(row[c])}" for c in common)]
    if "concurrency" in row:
        texts.append(f"{number(row['concurrency'])} in flight")
    machine = f"{setting(row.get('gpus', 1))} × {plain(row.get('gpu', 'GPU'))}"
    place = f"{plain(row.get('model', 'model'))} on {machine}" if model else machine
    return f"{place}: {'; '.join(texts)}"


def delivers(row: Row, metrics: Sequence[str]) -> str:
    """`903 tokens/s/GPU, TPOT 46.5 ms`."""
    return ", ".join(quantity(name, row[name]) for name in metrics if name in row)


def _says_something(row: Row, column: str) -> bool:
    """Whether a setting's value is not the one that goes without saying."""
    return bool(row[column] != SETTINGS[column][1]) and not pd.isna(row[column])


def _limit(row: Row, metric: str, op: str, bound: float) -> Limit:
    value = float(row[metric])
    low, high = (value, bound) if op == "max" else (bound, value)
    used = low / high if high else (float("inf") if low > 0 else 0.0)
    return Limit(metric=metric, op=op, bound=float(bound), value=value, used=used)


def _breakdown(row: Row, step: str) -> Breakdown | None:
    total = float(row.get(f"{step}_step_ms", 0.0))
    if not total > 0:
        return None
    parts = [(part, float(row.get(f"{step}_{part}_ms", 0.0))) for part in STEP_PARTS if part != "hidden"]
    return Breakdown(
        step=step,
        total_ms=total,
        hidden_ms=float(row.get(f"{step}_hidden_ms", 0.0)),
        parts=tuple(_part(key, value, total) for key, value in parts if value > 0),
    )


def _memory(row: Row) -> MemoryUse | None:
    usable = float(row.get("usable_gib", 0.0))
    if not usable > 0:
        return None
    parts = [_part(key, float(row.get(f"{key}_gib", 0.0)), usable) for key in MEMORY_PARTS]
    return MemoryUse(total=float(row["memory_gib"]), usable=usable, parts=tuple(parts))


def _part(key: str, value: float, whole: float) -> Part:
    return Part(key=key, label=PART_LABELS.get(key, key), value=value, share=value / whole)
