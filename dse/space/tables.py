"""From flat indices back to what they mean: plans and loads for the cost model, and rows for people."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from dse.batches import at_rows
from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS, Load, Number, Plan
from dse.errors import InputError
from dse.space.compile import CompiledSpace, Designs
from dse.space.drafts import NONE

Array = np.ndarray


def plans(compiled: CompiledSpace, designs: Array | slice | None = None) -> Plan:
    """The plans of some designs (all by default), batched: leaves of shape (n,).

    What no design of the whole space uses (a sharded sequence, Megatron SP, a dispatch rule) is None, as the cost model
    wants it, so that every chunk of a space has one structure.
    """
    d = compiled.designs
    rows = slice(None) if designs is None else designs

    def column(name: str) -> Array:
        return np.asarray(getattr(d, name)[rows], np.float64)

    def used(name: str) -> Number:
        return column(name) if np.any(getattr(d, name)) else None

    index = d.precision_index[rows]
    return Plan(
        tp=column("tp"),
        pp=column("pp"),
        attention_dp=column("attention_dp"),
        cp=column("cp"),
        moe_tp=column("moe_tp"),
        moe_ep=column("moe_ep"),
        replicas=column("replicas"),
        precision=at_rows(compiled.precisions, index),
        sequence_parallel=used("sequence_parallel"),
        cp_method=column("cp_method") if np.any(d.cp > 1) else None,
        dispatch=used("dispatch"),
        eplb_replicas=used("eplb_replicas"),
        overlap_prefill=column("overlap_prefill"),
        overlap_decode=column("overlap_decode"),
        microbatches=column("microbatches"),
    )


def draft_rows(compiled: CompiledSpace) -> tuple[Array, Array, Array] | None:
    """Of every design its row of `compiled.drafts`, the draft's TP, and 1 where it has one; None where none drafts."""
    if compiled.drafts is None:
        return None
    d, names = compiled.designs, compiled.spec.axes.draft_model
    present = np.array([name != NONE for name in names])[d.draft_model]
    return d.model * len(names) + d.draft_model, d.draft_tp * 1.0, present * 1.0


def loads(compiled: CompiledSpace, points: Array | slice | None = None) -> Load:
    """The loads of some operating points (all by default) under every workload: leaves of shape (Q, W)."""
    rows = slice(None) if points is None else points
    o, w, options = compiled.operating, compiled.workloads, compiled.spec.options
    searched = compiled.spec.axes.prefix_hit is not None
    shape = (len(o.concurrency[rows]), len(w))

    def point(values: Array) -> Array:
        return np.broadcast_to(np.asarray(values[rows], np.float64)[:, None], shape)

    def kind(values: Array | float) -> Array:
        return np.broadcast_to(np.asarray(values, np.float64), shape)

    return Load(
        isl=kind(w.isl),
        osl=kind(w.osl),
        prefix_hit=point(o.prefix_hit) if searched else kind(w.prefix_hit),
        concurrency=point(o.concurrency),
        chunk=point(o.chunk),
        draft_tokens=point(o.draft_tokens),
        static_batch=point(o.static_batch),
        acceptance=point(o.acceptance),
        waves=kind(options.waves),
    )


def split(compiled: CompiledSpace, flat: Array | Sequence[int]) -> tuple[Array, Array]:
    """(design, operating point) of each flat index."""
    index = np.asarray(flat, np.int64)
    if index.size and (index.min() < 0 or index.max() >= compiled.legal):
        worst = index.min() if index.min() < 0 else index.max()
        raise InputError(f"index {worst} is outside the space (allowed: 0 to {compiled.legal - 1})")
    return np.divmod(index, len(compiled.operating))


def describe(compiled: CompiledSpace, flat: Array | Sequence[int]) -> pd.DataFrame:
    """One row a point, columns as `estimate` reads them and the axes searched.

    A mix of workloads has one isl, osl and prefix_hit a row, all values joined by "|" in the mix's order.
    """
    design, q = split(compiled, flat)
    d, o = compiled.designs, compiled.operating
    machine = d.machine[design]
    names = np.array(compiled.precision_names, dtype=object).reshape(-1, 3)[d.precision_index[design]]
    columns: dict[str, object] = {
        "model": _pick([e.name for e in compiled.models], d.model[design]),
        "gpu": _pick([m.gpu.name for m in compiled.machines], machine),
        "cluster": _pick([m.cluster.name for m in compiled.machines], machine),
        **{name: _workload(compiled, name) for name in ("isl", "osl", "prefix_hit")},
        "weights": names[:, 0],
        "activations": names[:, 1],
        "kv": names[:, 2],
        **{name: getattr(d, name)[design] for name in _DEGREES},
        "concurrency": _whole(o.concurrency[q]),
        "chunk": _whole(o.chunk[q]),
        "speculation": _whole(o.draft_tokens[q]),
        "static_batch": _whole(o.static_batch[q]),
        "overlap": overlap_names(d, design),
        "dispatch": _pick(DISPATCHES, d.dispatch[design]),
        "cp_method": _pick(CP_METHODS, d.cp_method[design]),
        "sequence_parallel": d.sequence_parallel[design],
        "microbatches": d.microbatches[design],
        "utilisation": d.utilisation[design],
        "gpus": d.gpus[design],
        "replicas": d.replicas[design],
    }
    if compiled.spec.axes.prefix_hit is not None:
        columns["prefix_hit"] = o.prefix_hit[q]
    if np.any(o.draft_tokens):
        columns["acceptance"] = o.acceptance[q]
    if compiled.drafts is not None:
        columns["draft_model"] = _pick(compiled.spec.axes.draft_model, d.draft_model[design])
        columns["draft_tp"] = d.draft_tp[design]
    if np.any(d.eplb_replicas):
        columns["eplb_replicas"] = d.eplb_replicas[design]
    return pd.DataFrame(columns, index=pd.RangeIndex(len(design)))


_DEGREES = ("tp", "pp", "attention_dp", "moe_tp", "moe_ep", "cp")


def overlap_names(designs: Designs, rows: Array) -> Array:
    """`full`, or `two_batch/none` where prefill and decode differ."""
    table = [a if a == b else f"{a}/{b}" for a in OVERLAPS for b in OVERLAPS]
    return _pick(table, designs.overlap_prefill[rows] * len(OVERLAPS) + designs.overlap_decode[rows])


def _workload(compiled: CompiledSpace, name: str) -> object:
    values = getattr(compiled.workloads, name).tolist()
    texts = [int(x) if float(x).is_integer() and name != "prefix_hit" else x for x in values]
    return texts[0] if len(texts) == 1 else "|".join(str(x) for x in texts)


def _pick(names: Sequence[str], codes: Array) -> Array:
    return np.array(names, dtype=object)[codes]


def _whole(values: Array) -> Array:
    return values.astype(np.int64)


__all__ = ["describe", "loads", "overlap_names", "plans", "split"]
