"""Collectives against measurements: tables of NCCL, custom all-reduce and DeepEP priced, and read as rows of a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from dse.batches import at_rows
from dse.calibrate.collective_calls import Calls, Exchange, Transfer, exchanges, log_seconds, transfers
from dse.calibrate.nccl_tests import read_nccl_tests
from dse.calibrate.parameters import apply
from dse.calibrate.sources import Refusal, Source, compiled, row_weight
from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.catalog.schema import GpuEntry
from dse.cost.coefficients import Coefficients
from dse.cost.types import replace, stack
from dse.errors import InputError, unknown
from dse.programs import program

Array = np.ndarray
SCALE = 0.10  # log residual that a good model leaves
MS, US = 1e-3, 1e-6


@dataclass(frozen=True)
class Kind:
    """How one kind of table is read: its calls, its measured columns and their unit, and the columns predicted."""

    calls: Callable[[pd.DataFrame, str], Calls]
    measured: tuple[str, ...]
    unit: float
    predicted: tuple[str, ...] = ()
    adapt: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table


def _dgx(table: pd.DataFrame) -> pd.DataFrame:
    """Columns system (a100_dgx), op, num_workers, devices_per_node, message_bytes."""
    return table.assign(
        gpu=table["system"].astype(str).str.split("_").str[0],
        cluster=table["system"],
        op_name=table["op"],
        num_gpus=table["num_workers"],
    )


def _multinode(table: pd.DataFrame) -> pd.DataFrame:
    """Columns gpu, op, n_ranks, n_nodes, message_bytes."""
    return table.assign(
        op_name=table["op"], num_gpus=table["n_ranks"], devices_per_node=table["n_ranks"] / table["n_nodes"]
    )


KINDS: dict[str, Kind] = {
    "nccl": Kind(transfers, ("latency",), MS, ("predicted_ms",)),
    "custom_allreduce": Kind(lambda t, w: transfers(t, w, engine=True), ("latency",), MS, ("predicted_ms",)),
    "wideep_deepep_normal": Kind(
        lambda t, w: exchanges(t, w, low_latency=False),
        ("dispatch_transmit_us", "combine_transmit_us"),
        US,
        ("predicted_dispatch_us", "predicted_combine_us"),
    ),
    "wideep_deepep_ll": Kind(
        lambda t, w: exchanges(t, w, low_latency=True),
        ("dispatch_avg_t_us", "combine_avg_t_us"),
        US,
        ("predicted_dispatch_us", "predicted_combine_us"),
    ),
    "dgx": Kind(transfers, ("median_ms",), MS, adapt=_dgx),
    "multinode": Kind(transfers, ("time_us",), US, adapt=_multinode),
    "nccl_tests": Kind(transfers, ("time_us",), US, adapt=lambda t: t.assign(num_gpus=t["num_workers"])),
}
PRICED = tuple(name for name, kind in KINDS.items() if kind.predicted)


# ------------------------------------------------------------------------------------------------ prices


def estimate_collectives(
    op: str, table: pd.DataFrame, coefficients: str | Path | CoefficientSet | None = None
) -> pd.DataFrame:
    """The table with predictions: `predicted_ms` (nccl, custom_allreduce; on `cluster` where the table has that column,
    else the GPU's usual one), or `predicted_dispatch_us` and `predicted_combine_us` (wideep_deepep_normal,
    wideep_deepep_ll), and `reason`: why a row has none.

    Measured columns are not read. InputError: an unknown operation, or a table without the needed columns.
    """
    if op not in PRICED:
        raise unknown("collective", op, PRICED)
    kind = KINDS[op]
    chosen = coefficients if isinstance(coefficients, CoefficientSet) else coefficient_set(coefficients)
    calls = kind.calls(table, op)
    seconds = np.full((len(table), len(kind.predicted)), np.nan)
    if calls.inputs is not None:
        with jax.enable_x64(True):
            batch = stack([chosen.of(g.generation, g.name) for g in dict.fromkeys(calls.gpus)])
            place = {g.name: i for i, g in enumerate(dict.fromkeys(calls.gpus))}
            rows = np.array([place[g.name] for g in calls.gpus])
            own = at_rows(batch, rows)
            seconds[calls.keep] = np.exp(np.asarray(_priced(own, calls.inputs)))
    columns = {name: seconds[:, i] / kind.unit for i, name in enumerate(kind.predicted)}
    return table.assign(**columns, reason=calls.reasons)


_priced = program(log_seconds, in_axes=0)


# ------------------------------------------------------------------------------------------- observations


@dataclass(frozen=True)
class CollectiveRows:
    """Measured calls of one kind, in the order of `frame`.

    `inputs`: leaves (n,); `measured`: (n, k) log seconds, k = 1 (transfers) or 2 (dispatch, combine); `labels`: level
    of a coefficient set -> key of each row. No engine speaks: NCCL, the custom kernel and DeepEP are libraries that all
    engines share, so what they measure belongs to the base, the GPU's generation and the GPU.
    """

    kind: str
    frame: pd.DataFrame
    labels: dict[str, list[str]]
    metrics: tuple[str, ...]
    measured: Array
    inputs: Transfer | Exchange
    refused: tuple[Refusal, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.measured)


def read_collectives(table: pd.DataFrame | str | Path, kind: str) -> CollectiveRows:
    """A table (or its path) of a kind: nccl, custom_allreduce, wideep_deepep_normal, wideep_deepep_ll, dgx, multinode,
    or nccl_tests (the text that nccl-tests print).

    Refused with a reason: rows that cannot be priced (one rank moves nothing), times that are not positive, faster than
    every link at its full rate allows, wrong results, the same row again.
    """
    if kind not in KINDS:
        raise unknown("kind of collective table", kind, KINDS)
    how = KINDS[kind]
    frame = _read(table, kind)
    missing = [name for name in how.measured if name not in frame]
    if missing:
        raise InputError(f"{kind}: measured columns {', '.join(missing)} missing")
    calls = how.calls(how.adapt(frame), kind)
    times = frame[list(how.measured)].apply(pd.to_numeric, errors="coerce").to_numpy(float) * how.unit
    reasons = list(calls.reasons)
    floor = np.zeros_like(times)
    if calls.inputs is not None:
        floor[calls.keep] = _floor(calls.inputs)
        for i, n in zip(calls.keep, np.asarray(calls.inputs.n), strict=True):
            reasons[i] = "one rank moves nothing" if n < 2 else ""
    duplicate = frame.duplicated().to_numpy()
    problem = frame["problem"].fillna("").to_numpy(str) if "problem" in frame else np.full(len(frame), "")
    for i, row in enumerate(times):
        if problem[i]:
            reasons[i] = str(problem[i])
        if reasons[i]:
            continue
        if not (np.isfinite(row) & (row > 0)).all():
            reasons[i] = f"{', '.join(how.measured)}: not a positive number"
        elif (row < floor[i]).any():
            fast, least = row[row < floor[i]][0], floor[i][row < floor[i]][0]
            reasons[i] = f"{fast / US:.4g} us; the links alone need {least / US:.4g} us: another unit or size?"
        elif duplicate[i]:
            reasons[i] = "the same row again"
    good = np.array([not reason for reason in reasons])
    refused = tuple(Refusal(i, reason, kind) for i, reason in enumerate(reasons) if reason)
    if not good.any():
        raise InputError(f"{kind}: no row can serve the fit; " + (refused[0].reason if refused else "it is empty"))
    inside = good[calls.keep]
    gpus = [g for g, ok in zip(calls.gpus, inside, strict=True) if ok]
    return CollectiveRows(
        kind=kind,
        frame=frame[good].reset_index(drop=True),
        labels=_labels(gpus),
        metrics=how.measured,
        measured=np.log(times[good]),
        inputs=at_rows(calls.inputs, inside),
        refused=refused,
    )


def collective_source(rows: CollectiveRows, rest: CoefficientSet | None = None) -> Source:
    """The rows as a source of the joint fit; `rest` gives the coefficients that are not fitted (physics)."""
    fixed = (rest or CoefficientSet("physics")).of()

    return Source(
        name=rows.kind,
        frame=rows.frame,
        labels=rows.labels,
        metrics=rows.metrics,
        measured=rows.measured,
        scale=np.full(len(rows.metrics), SCALE),
        weight=row_weight(len(rows)),
        refused=rows.refused,
        **compiled(_log_seconds, rows.inputs, fixed),
    )


def _log_seconds(logs: Any, x: Transfer | Exchange, fixed: Coefficients) -> Any:
    return log_seconds(apply(logs, fixed), x)


def _read(table: pd.DataFrame | str | Path, kind: str) -> pd.DataFrame:
    if isinstance(table, pd.DataFrame):
        return table.reset_index(drop=True)
    path = Path(table)
    try:
        if kind == "nccl_tests":
            return read_nccl_tests(path.read_text())
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read ({first})") from None


def _labels(gpus: list[GpuEntry]) -> dict[str, list[str]]:
    return {
        "generation": [g.generation for g in gpus],
        "gpu": [g.name for g in gpus],
        "engine": [""] * len(gpus),
        "version": [""] * len(gpus),
        "deployment": [""] * len(gpus),
        "model": [""] * len(gpus),
    }


def _floor(inputs: Transfer | Exchange) -> Array:
    """Seconds (n, k) at which links at their full rate, shared by nobody and without latency, move the bytes."""
    levels = tuple(
        replace(x, oversubscription=x.oversubscription * 0 + 1.0, rails=x.rails * 0 + 1.0)
        for x in inputs.topology.levels
    )
    bare = replace(inputs, topology=replace(inputs.topology, levels=levels))
    with jax.enable_x64(True):
        ideal = jax.tree.map(jnp.asarray, Coefficients.ideal())
        return np.exp(np.asarray(jax.vmap(lambda x: log_seconds(ideal, x))(bare)))


__all__ = [
    "KINDS",
    "PRICED",
    "CollectiveRows",
    "collective_source",
    "estimate_collectives",
    "read_collectives",
]
