"""Cases: one deployment a row, priced in one batch; a bad row gets its reason and never stops the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog import hardware
from dse.catalog.align import align
from dse.catalog.coefficients import CoefficientSet
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.catalog.precision import resolve
from dse.catalog.schema import GpuEntry
from dse.cost.evaluate import Estimate, Scenario, estimate
from dse.cost.types import OVERLAPS, Device, Load, Plan, Precision, stack
from dse.errors import InputError, unknown
from dse.space.columns import columns
from dse.space.facts import facts

REQUIRED = ("model", "gpu", "isl", "osl")
BLOCK = 65_536  # rows a call

# Counts with their defaults; "" stands for a missing cell.
_COUNTS = {"tp": 1, "pp": 1, "attention_dp": 1, "cp": 1, "concurrency": 1, "chunk": 8192}
_SPECULATION = {"": 0, "no": 0, "none": 0, "false": 0, "unknown": 0, "mtp_likely": None, "yes": None, "mtp": None}


@dataclass(frozen=True)
class Case:
    """One valid row, looked up."""

    entry: ModelEntry
    gpu: GpuEntry
    cluster: str
    engine: str
    precision: Precision
    plan: dict[str, float]
    load: Load


def estimate_cases(cases: pd.DataFrame, coefficients: CoefficientSet) -> pd.DataFrame:
    """The input columns, then the contract's: one row in, one row out, same order (float64).

    Unknown columns pass through unread. Raises InputError only where no row could be read at all: required columns
    missing. Rows that cannot be priced have `feasible` False and a `reason`.
    """
    missing = [name for name in REQUIRED if name not in cases.columns]
    if missing:
        what = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise InputError(f"cases: {what} missing (required: {', '.join(REQUIRED)})")
    rows = parse_cases(cases)
    valid = [i for i, row in enumerate(rows) if isinstance(row, Case)]
    priced = _price([row for row in rows if isinstance(row, Case)], coefficients) if valid else {}
    names = list(priced) or list(columns_of_nothing())
    result: dict[str, Any] = {}
    for name in names:
        filled = np.full(len(rows), np.nan, dtype=object if name in _TEXT else float)
        if valid:
            filled[valid] = priced[name]
        result[name] = filled
    for i, row in enumerate(rows):
        if isinstance(row, str):
            result["feasible"][i], result["reason"][i] = False, row
    kept = cases.drop(columns=[name for name in result if name in cases.columns])
    return pd.concat([kept.reset_index(drop=True), pd.DataFrame(result)], axis=1)


_TEXT = ("feasible", "reason", "coefficients")


def columns_of_nothing() -> Iterable[str]:
    """The result's columns where no row could be priced."""
    return ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "tok_s_user", "e2e_ms", "memory_gib", "feasible", "reason")


def parse_cases(cases: pd.DataFrame) -> list[Case | str]:
    """Each row looked up, or why it cannot be priced."""
    return [_parse(row) for row in _records(cases)]


def _records(cases: pd.DataFrame) -> list[dict[str, str]]:
    """Rows as text, missing cells as ""; whole numbers lose a spurious `.0`."""
    known = [name for name in cases.columns if name in _READ or name in _SPLIT]
    text = cases[known].astype(object).where(cases[known].notna(), "")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in text.to_dict("records")]


# Columns of a deployment split into a prefill and a decode pool.
_SPLIT = frozenset(
    f"{pool}_{what}"
    for pool in ("prefill", "decode")
    for what in ("num_workers", *(f"{x}_size" for x in ("tp", "pp", "attention_dp", "moe_tp", "moe_ep")))
)
_READ = frozenset(
    (
        *REQUIRED,
        *_COUNTS,
        *("cluster", "engine", "weights", "kv", "moe_tp", "moe_ep", "prefix_hit", "speculation", "overlap"),
    )
)


def _parse(row: dict[str, str]) -> Case | str:
    """A looked-up case, or why the row cannot be priced."""
    try:
        return _case(row)
    except InputError as error:
        return str(error)


def _case(row: dict[str, str]) -> Case:
    if any(row.get(name) for name in _SPLIT):
        raise InputError("split deployments (prefill_* and decode_* columns) cannot be priced yet")
    if not row["model"]:
        raise InputError("model: is empty (required)")
    entry, gpu = model(row["model"]), hardware.gpu(row["gpu"])
    counts = {name: _number(row, name, default, low=1.0, whole=True) for name, default in _COUNTS.items()}
    overlap = [part.strip() for part in (row.get("overlap") or "none").split("/")]
    for rule in overlap:
        if rule not in OVERLAPS:
            raise unknown("overlap rule", rule, OVERLAPS, "overlap")
    degrees = _degrees(row, entry, counts)
    return Case(
        entry=entry,
        gpu=gpu,
        cluster=hardware.cluster(row.get("cluster") or gpu.default_cluster).name,
        engine=row.get("engine", "").lower(),
        precision=_precision(entry.name, gpu.name, row.get("weights") or "native", row.get("kv") or "auto"),
        plan={
            **degrees,
            "overlap_prefill": float(OVERLAPS.index(overlap[0])),
            "overlap_decode": float(OVERLAPS.index(overlap[-1])),
        },
        load=Load(
            isl=_number(row, "isl", None, low=1.0),
            osl=_number(row, "osl", None, low=1.0),
            concurrency=counts["concurrency"],
            chunk=counts["chunk"],
            prefix_hit=_number(row, "prefix_hit", 0.0, low=0.0, high=1.0),
            draft_tokens=_draft(row.get("speculation", ""), entry),
        ),
    )


def _degrees(row: dict[str, str], entry: ModelEntry, counts: dict[str, float]) -> dict[str, float]:
    """Parallel degrees that belong together; moe_* are ignored for dense models and derived where left out."""
    shape = facts([entry])
    tp, pp, stage = counts["tp"], counts["pp"], counts["tp"] * counts["attention_dp"] * counts["cp"]
    if not shape.tp(np.array([int(tp)]))[0, 0]:
        allowed = [str(n) for n in 2 ** np.arange(8) if shape.tp(np.array([n]))[0, 0]]
        what = f"the heads and widths of {entry.name} (allowed: {', '.join(allowed)})"
        raise InputError(f"tp: {tp:g} does not divide {what}")
    if pp > entry.layers:
        raise InputError(f"pp: {pp:g} is more than the {entry.layers} layers of {entry.name}")
    moe_ep = moe_tp = 1.0
    if shape.moe[0]:
        ep, mtp = row.get("moe_ep", ""), row.get("moe_tp", "")
        moe_ep = _number(row, "moe_ep", 1.0, low=1.0, whole=True)
        moe_tp = _number(row, "moe_tp", 1.0, low=1.0, whole=True)
        if not mtp:
            moe_tp = stage / moe_ep
        elif not ep:
            moe_ep = stage / moe_tp
        if moe_ep * moe_tp != stage:
            raise InputError(
                f"moe_ep * moe_tp = {moe_ep * moe_tp:g} is not tp * attention_dp * cp = {stage:g}; they share the GPUs"
            )
    else:
        moe_tp = stage
    return {
        "tp": tp,
        "pp": pp,
        "attention_dp": counts["attention_dp"],
        "cp": counts["cp"],
        "moe_tp": moe_tp,
        "moe_ep": moe_ep,
    }


def _number(
    row: dict[str, str],
    name: str,
    default: float | None,
    low: float = 0.0,
    high: float = 1e12,
    whole: bool = False,
) -> float:
    text = row.get(name, "")
    if not text:
        if default is None:
            raise InputError(f"{name}: is empty (required)")
        return float(default)
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{name}: {text!r} is not a number") from None
    if not low <= value <= high or (whole and value != round(value)):
        kind = "whole numbers " if whole else ""
        raise InputError(f"{name}: {text} is out of range (allowed: {kind}{low:g} to {high:g})")
    return value


def _draft(text: str, entry: ModelEntry) -> float:
    """Drafted tokens a step: a number, or a word that says whether the run speculated (MTP depth of the model)."""
    word = text.lower()
    if word in _SPECULATION:
        known = _SPECULATION[word]
        return float(max(1, entry.mtp_depth) if known is None else known)
    return _number({"speculation": text}, "speculation", 0.0, low=0.0, high=64.0)


# ------------------------------------------------------------------------------------------- pricing


def _price(cases: Sequence[Case], coefficients: CoefficientSet) -> dict[str, np.ndarray]:
    """All cases in one batch of one structure, padded to a power of two so that few shapes are ever compiled."""
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients)
        parts = []
        for start in range(0, len(cases), BLOCK):
            count = min(BLOCK, len(cases) - start)
            size = max(16, 1 << (count - 1).bit_length())
            index = np.minimum(np.arange(start, start + size), len(cases) - 1)
            result = estimate(jax.tree.map(lambda leaf, i=index: leaf[i], scenarios))
            parts.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], result))
    whole: Estimate = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    concurrency = np.array([case.load.concurrency for case in cases])
    priced = columns(whole, concurrency, np.array([case.plan["attention_dp"] for case in cases]))
    known = [coefficients.known(case.gpu.generation, case.gpu.name, case.engine) for case in cases]
    return {**priced, "coefficients": np.array(known, dtype=object)}


def scenarios_of(cases: Sequence[Case], coefficients: CoefficientSet) -> Scenario:
    """Tables of what differs, gathered by row."""

    def gather(key: Callable[[Case], Any], make: Callable[[Sequence[Case]], Any]) -> Any:
        first: dict[Any, Case] = {}
        for case in cases:
            first.setdefault(key(case), case)
        place = {k: i for i, k in enumerate(first)}
        index = np.array([place[key(case)] for case in cases])
        return jax.tree.map(lambda leaf: leaf[index], make(list(first.values())))

    n = len(cases)
    plan = {name: np.array([c.plan[name] for c in cases]) for name in cases[0].plan}
    sharded = bool((plan["cp"] > 1).any())
    loads = stack([c.load for c in cases])
    return Scenario(
        architecture=gather(
            lambda c: c.entry.name, lambda some: stack(align([to_architecture(c.entry) for c in some]))
        ),
        device=gather(lambda c: c.gpu.name, lambda some: stack([_device_of(c.gpu.name) for c in some])),
        topology=gather(lambda c: c.cluster, _topologies),
        plan=Plan(
            **plan,
            replicas=np.ones(n),
            microbatches=np.zeros(n),
            precision=gather(lambda c: id(c.precision), lambda some: stack([c.precision for c in some])),
            cp_method=np.zeros(n) if sharded else None,
        ),
        load=replace(
            loads,
            draft_tokens=loads.draft_tokens if np.any(loads.draft_tokens) else None,
            waves=np.full(n, Load.waves),
            acceptance=np.full(n, Load.acceptance),
        ),
        coefficients=gather(
            lambda c: (c.gpu.name, c.engine),
            lambda some: stack([coefficients.of(c.gpu.generation, c.gpu.name, c.engine) for c in some]),
        ),
    )


@cache
def _device_of(gpu: str) -> Device:
    return hardware.to_device(hardware.gpu(gpu))


@cache
def _precision(model_name: str, gpu: str, weights: str, kv: str) -> Precision:
    """Formats of a model on a GPU, each worked out once."""
    return resolve(model(model_name), _device_of(gpu), weights, kv)


def _topologies(some: Sequence[Case]) -> Any:
    found = [hardware.to_topology(hardware.cluster(c.cluster)) for c in some]
    depth = max(len(t.levels) for t in found)
    return stack([hardware.pad_levels(t, depth) for t in found])
