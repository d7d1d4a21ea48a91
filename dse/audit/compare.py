"""What the published methods and this project's model think the time of the same cases is made of, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.audit.networks import NetworkCurve, networks
from dse.catalog import hardware
from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.catalog.models import model, to_architecture
from dse.cost.evaluate import Scenario
from dse.cost.shard import shard_scenario
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Number, pytree
from dse.errors import InputError
from dse.published import compare as published
from dse.published import corrected_roofline as cr
from dse.published import distserve as ds
from dse.published import shallowsim_gpus as gpus
from dse.published.cells import Cells
from dse.published.rows import over_rows
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.units import GB, MS, TERA

OWN = "dse"
PHASES = ("prefill", "decode")
METHODS = ("shallowsim-prefill", "shallowsim-decode", "modelmeter dp_ep", "modelmeter sp_ep", "corrected-roofline")
# Parts in the order in which bars are drawn
PARTS = (*published.PARTS, "fitted step", "elementwise", "head", "overhead")
# Coarse groups in which methods that cut time differently can be compared
GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention", "KV cache"),
    "feed-forward and experts": ("dense FFN", "shared expert", "routed experts", "experts", "expert weights"),
    "communication": ("all-reduce", "sequence exchange", "exchange"),
    "compute and memory as a whole": ("compute or KV", "static weights", "fitted step"),
    "launches, head and host": ("elementwise", "head", "overhead"),
}
_WHOLE = "compute and memory as a whole"
REASONS: Mapping[str, str] = {
    **published.REASONS,
    "distserve": "a fit to measured OPT-13B steps on A100s, whatever the GPU of the case",
}


@dataclass(frozen=True)
class Entry:
    """One method on one case: seconds by part, or why it is refused."""

    case: int
    phase: str
    method: str
    parts: Mapping[str, float]
    reason: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Difference:
    """How far a method is from this project's model, in which group of parts, and why."""

    case: int
    phase: str
    method: str
    ratio: float
    group: str
    group_seconds: float
    text: str


@dataclass(frozen=True)
class Comparison:
    labels: tuple[str, ...]  # of the cases
    entries: tuple[Entry, ...]
    differences: tuple[Difference, ...]
    networks: tuple[NetworkCurve, ...]

    def table(self) -> pd.DataFrame:
        """One row a case, phase and method: ms by part, total, the ratio to this project's model, or the reason."""
        own = {(e.case, e.phase): e.total for e in self.entries if e.method == OWN}
        rows = []
        for e in self.entries:
            base = own.get((e.case, e.phase), 0.0)
            row: dict[str, Any] = {"case": e.case, "label": self.labels[e.case], "phase": e.phase, "method": e.method}
            row["total_ms"] = e.total / MS if e.parts else np.nan
            row["ratio"] = e.total / base if e.parts and base > 0 else np.nan
            row |= {f"{_column(part)}_ms": e.parts[part] / MS for part in PARTS if part in e.parts}
            rows.append({**row, "reason": e.reason})
        names = [f"{_column(part)}_ms" for part in PARTS]
        head = ("case", "label", "phase", "method", "total_ms", "ratio")
        return pd.DataFrame(rows, columns=[*head, *names, "reason"]).dropna(axis=1, how="all")


def compare(cases: pd.DataFrame, coefficients: CoefficientSet | None = None) -> Comparison:
    """Every method on every row. Columns: model (DeepSeek-R1), gpu (h200), isl, and with defaults tp, dp (or
    attention_dp), batch a GPU (or concurrency), context (isl), weights, kv; phase: prefill, decode or both.

    Raises InputError only where no row could be read; a method outside its domain has its reason.
    """
    if not len(cases):
        raise InputError("cases: no rows; give at least one with model, gpu and isl")
    rows = _rows(cases)
    looked_up = parse_cases(pd.DataFrame([r.contract for r in rows]))
    usable = [i for i, c in enumerate(looked_up) if isinstance(c, Case) and not rows[i].reason]
    own = _own([rows[i] for i in usable], [looked_up[i] for i in usable], coefficients)  # type: ignore[misc]
    entries: list[Entry] = []
    for i, row in enumerate(rows):
        found = looked_up[i]
        reason = row.reason or (found if isinstance(found, str) else "")
        for phase in row.phases:
            if reason or isinstance(found, str):
                entries.append(Entry(i, phase, OWN, {}, reason))
                continue
            entries.append(Entry(i, phase, OWN, own[phase][usable.index(i)]))
            entries += _published(i, phase, row, found)
    return Comparison(
        labels=tuple(row.label for row in rows),
        entries=tuple(entries),
        differences=_differences(entries),
        networks=tuple(networks(strategy) for strategy in ("dp_ep", "sp_ep")),
    )


# --------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class _Row:
    label: str
    phases: tuple[str, ...]
    isl: float
    context: float
    batch: float
    tp: float
    dp: float
    contract: dict[str, Any]
    reason: str


def _rows(table: pd.DataFrame) -> list[_Row]:
    """The table's cells in the terms of both sides."""
    cells = Cells(table, "cases")
    isl = cells.number("isl", "seq_len", above=True)
    tp = cells.number("tp", default=1.0, low=1.0, whole=True)
    dp = cells.number("dp", "attention_dp", default=8.0, low=1.0, whole=True)
    if cells.has("concurrency") and not cells.has("batch"):
        batch = cells.number("concurrency", above=True) / np.maximum(tp * dp, 1.0)
    else:
        batch = cells.number("batch", default=64.0, above=True)
    context = cells.number("context", default=isl, above=True)
    names = {key: cells.text(key) for key in ("model", "gpu", "phase", "weights", "kv", "overlap", "cluster")}
    cells.refuse(
        ~np.isin(names["phase"], ("", *PHASES)), lambda i: f"phase: {names['phase'][i]!r} (allowed: prefill, decode)"
    )
    rows = []
    for i in range(cells.n):
        name, gpu = names["model"][i] or "DeepSeek-R1", names["gpu"][i] or "h200"
        contract = {"model": name, "gpu": gpu, "isl": isl[i], "osl": 1}
        contract |= {"tp": f"{tp[i]:g}", "attention_dp": f"{dp[i]:g}"}
        ranks = tp[i] * dp[i]
        if not cells.reason[i]:
            contract |= {"moe_ep": f"{ranks:g}", "concurrency": f"{max(round(batch[i] * ranks), 1):g}"}
        contract |= {key: names[key][i] for key in ("weights", "kv", "overlap", "cluster")}
        label = f"{name} on {tp[i] * dp[i]:g} {gpu}, TP{tp[i]:g}×DP{dp[i]:g}, {isl[i]:g} in, {batch[i]:g} a GPU"
        phases = (names["phase"][i],) if names["phase"][i] in PHASES else PHASES
        rows.append(_Row(label, phases, isl[i], context[i], batch[i], tp[i], dp[i], contract, str(cells.reason[i])))
    return rows


# ----------------------------------------------------------------------------------------------- own model


@pytree
class _Steps:
    prefill: Step
    decode: Step


@pytree
class _Load:
    isl: Number
    context: Number
    requests: Number


def _both(x: Scenario, load: _Load) -> _Steps:
    """A prompt a rank, and one token of every request of a rank."""
    cut = shard_scenario(x)
    prompt = Segment(requests=1.0, tokens=load.isl, start=0.0, span=load.isl)
    token = Segment(requests=load.requests, tokens=1.0, start=load.context, span=1.0)
    return _Steps(
        prefill=step(cut, Batch(prefill=prompt, decode=None), x.plan.overlap_prefill),
        decode=step(cut, Batch(prefill=None, decode=token), x.plan.overlap_decode),
    )


def _own(
    rows: Sequence[_Row], cases: Sequence[Case], coefficients: CoefficientSet | None
) -> dict[str, list[dict[str, float]]]:
    if not rows:
        return {phase: [] for phase in PHASES}
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients or coefficient_set())
        load = _Load(
            isl=np.array([r.isl for r in rows]),
            context=np.array([r.context for r in rows]),
            requests=np.array([r.batch * r.tp for r in rows]),
        )
        steps: _Steps = jax.tree.map(np.asarray, over_rows(_both)(scenarios, load))
    return {phase: [_parts(getattr(steps, phase), i) for i in range(len(rows))] for phase in PHASES}


def _parts(s: Step, i: int) -> dict[str, float]:
    """A step by the parts of the others; what overlap hides is taken off the communication."""
    at = {f: float(np.broadcast_to(np.asarray(getattr(s, f)), np.shape(s.tokens))[i]) for f in _FIELDS}
    parts = {
        "attention": at["projections"] + at["attention"],
        "dense FFN": at["dense"],
        "routed experts": at["experts"],
        "all-reduce": at["reduce"],
        "sequence exchange": at["sequence"],
        "exchange": at["exchange"],
        "elementwise": at["elementwise"],
        "head": at["head"],
        "overhead": at["overhead"],
    }
    hidden = at["hidden"]
    for part in ("exchange", "all-reduce", "sequence exchange"):
        taken = min(hidden, parts[part])
        parts[part], hidden = parts[part] - taken, hidden - taken
    parts["overhead"] -= hidden
    return {part: value for part, value in parts.items() if value != 0.0}


_FIELDS = (
    *("projections", "attention", "dense", "experts", "elementwise", "head"),
    *("reduce", "exchange", "sequence", "hidden", "overhead"),
)

# ------------------------------------------------------------------------------------------- other methods


def _published(i: int, phase: str, row: _Row, case: Case) -> list[Entry]:
    """Each published method on a case, or why it does not apply."""
    found: list[Entry] = []
    deepseek = case.entry.name in ("DeepSeek-V3", "DeepSeek-R1")
    shallow = f"shallowsim-{phase}"
    names = [shallow, *(m for m in METHODS if m.startswith("modelmeter") and phase == "prefill"), "corrected-roofline"]
    gpu, why = _gpu(case)
    known: dict[str, Mapping[str, Any]] = {}
    refused = {shallow: why} if why and deepseek else {}
    if deepseek:
        one = published.Deployment(
            isl=row.isl,
            context=row.context,
            batch=row.batch,
            tp=row.tp,
            dp=row.dp,
            ep=row.tp * row.dp,
            gpu=gpu,
            weight_bytes=float(case.precision.expert_bytes),
            kv_bytes=float(case.precision.kv_bytes),
        )
        with jax.enable_x64(True):
            known = dict(published.breakdowns(jax.tree.map(lambda v: np.array([float(v)]), one), phase))
    else:
        try:
            known = {"corrected-roofline": _roofline(row, case, gpu, phase)}
        except InputError as error:
            refused["corrected-roofline"] = str(error)
    for name in names:
        if name in refused:
            entry = Entry(i, phase, name, {}, refused[name])
        elif name not in known:
            entry = Entry(i, phase, name, {}, f"model: {case.entry.name} is outside the method: DeepSeek-V3/R1 only")
        else:
            entry = Entry(i, phase, name, {k: float(np.ravel(v)[0]) for k, v in known[name].items()})
        found.append(entry)
    return [*found, _distserve(i, phase, row, case)]


def _gpu(case: Case) -> tuple[gpus.Gpu, str]:
    """ShallowSim's row of a GPU; where it has none, the catalogue's numbers for the methods that need only those."""
    try:
        return gpus.gpu(case.gpu.name), ""
    except InputError as error:
        d = hardware.to_device(case.gpu)
        net = hardware.to_topology(hardware.cluster(case.cluster)).levels
        rates = {"fp16_tflops": d.peak_bf16, "fp8_tflops": d.peak_fp8 or d.peak_bf16, "fp4_tflops": d.peak_fp4}
        own = gpus.Gpu(
            sm=1.0,
            comm_sm=0.0,
            mem_GB=d.capacity / GB,
            mem_bw_GBs=d.bandwidth / GB,
            nvlink_GBs=net[0].bandwidth / GB,
            pcie_GBs=net[-1].bandwidth / GB,
            gpu_per_node=net[0].size,
            **{k: v / TERA for k, v in rates.items()},
        )
        return own, str(error).partition(";")[0]  # the remedy is of another table


def _roofline(row: _Row, case: Case, gpu: gpus.Gpu, phase: str) -> dict[str, float]:
    """The corrected roofline of any model: one TP group, all experts in it."""
    p = case.precision
    peak = cr.Peak(flops=gpu.fp16_tflops * TERA, bandwidth=gpu.mem_bw_GBs * GB)
    prompt, decode = (1.0, 0.0) if phase == "prefill" else (0.0, row.batch * row.tp)
    with jax.enable_x64(True):
        shape = cr.shape_of(to_architecture(model(case.entry.name)), float(p.expert_bytes), float(p.kv_bytes))
        s = cr.step_of(prompt, row.isl * prompt, 0.0, decode, row.context)
        values = [float(x) for x in cr.terms(cr.features_one(shape, row.tp, peak, s))[:5]]
    return {
        "compute or KV": values[0] + values[1],
        "static weights": values[2],
        "expert weights": values[3],
        "all-reduce": values[4],
    }


def _distserve(i: int, phase: str, row: _Row, case: Case) -> Entry:
    if case.entry.name != "OPT-13B":
        return Entry(i, phase, "distserve", {}, f"model: {case.entry.name} is outside the method: OPT-13B only")
    if row.tp not in ds.TPS:
        return Entry(i, phase, "distserve", {}, f"tp: {row.tp:g} was not profiled (allowed: {ds.TPS})")
    with jax.enable_x64(True):
        if phase == "prefill":
            seconds = ds.prefill_stage(row.isl, row.isl**2, row.tp, 1.0)
        else:
            requests = row.batch * row.tp
            seconds = ds.decode_stage(requests, requests * row.context, row.tp, 1.0)
    return Entry(i, phase, "distserve", {"fitted step": float(seconds)})


# --------------------------------------------------------------------------------------------- differences


def _differences(entries: Sequence[Entry], most: int = 12) -> tuple[Difference, ...]:
    """The methods furthest from this project's model, with the group of parts that makes most of it."""
    own = {(e.case, e.phase): e for e in entries if e.method == OWN and e.parts}
    found = []
    for e in entries:
        base = own.get((e.case, e.phase))
        if e.method == OWN or not e.parts or base is None or base.total <= 0 or e.total <= 0:
            continue
        apart = _apart(e, base)
        group = max(apart, key=lambda g: abs(apart[g]))
        ratio = e.total / base.total
        text = (
            f"{e.method} says {e.total / MS:.3g} ms of {e.phase}, {ratio:.2g} times this project's "
            f"{base.total / MS:.3g} ms; "
            f"most of it in {group} ({apart[group] / MS:+.3g} ms): {REASONS.get(e.method, '')}"
        )
        found.append(Difference(e.case, e.phase, e.method, ratio, group, apart[group], text))
    return tuple(sorted(found, key=lambda d: -abs(math.log(d.ratio)))[:most])


def _apart(e: Entry, base: Entry) -> dict[str, float]:
    """Seconds between two breakdowns by group; a method that does not divide its work is compared as a whole."""
    apart = {group: _sum(e, parts) - _sum(base, parts) for group, parts in GROUPS.items()}
    if not any(e.parts.get(part) for part in GROUPS[_WHOLE]):
        return apart
    communication = apart["communication"]
    return {"communication": communication, _WHOLE: sum(apart.values()) - communication}


def _sum(e: Entry, parts: Sequence[str]) -> float:
    return sum(e.parts.get(part, 0.0) for part in parts)


def _column(part: str) -> str:
    return part.lower().replace(" ", "_").replace("-", "_")


__all__ = ["OWN", "PARTS", "Comparison", "Difference", "Entry", "NetworkCurve", "compare", "networks"]
