"""Cases: one deployment a row, priced in one batch; a bad row gets its reason and never stops the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
import pandas as pd

from dse.batches import at_rows, in_blocks
from dse.catalog import hardware
from dse.catalog.align import align
from dse.catalog.coefficients import LEVELS, CoefficientSet, deployment_key, version_key
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.catalog.precision import resolve
from dse.catalog.schema import GpuEntry
from dse.cost.evaluate import Scenario, estimate
from dse.cost.pools import Split, Transfer, estimate_split
from dse.cost.types import OVERLAPS, Device, Draft, Load, Plan, Precision, stack
from dse.errors import InputError, unknown
from dse.space import pools
from dse.space.case_numbers import COUNTS, degrees, draft, number
from dse.space.columns import columns
from dse.space.drafts import NONE, draft_entry, draft_table, shared_over
from dse.space.facts import facts
from dse.space.intervals import Known, interval_columns

REQUIRED = ("model", "gpu", "isl", "osl")
BLOCK = 65_536  # rows a call


@dataclass(frozen=True)
class Case:
    """One valid row, looked up."""

    entry: ModelEntry
    gpu: GpuEntry
    cluster: str
    engine: str
    version: str  # `version_key` of the engine
    precision: Precision
    plan: dict[str, float]
    load: Load
    draft: tuple[str, float] | None = None  # a draft model's name, and its TP

    @property
    def keys(self) -> dict[str, str]:
        """Level of a coefficient set -> this case's key."""
        deployment = deployment_key(self.engine, self.version, self.entry.name, self.gpu.name)
        keys = (self.gpu.generation, self.gpu.name, self.engine, self.version, self.entry.name, deployment)
        return dict(zip(LEVELS, keys, strict=True))


@dataclass(frozen=True)
class SplitCase:
    """One valid row of a split deployment: a worker of each pool, and how many of them."""

    prefill: Case
    decode: Case
    workers: tuple[float, float]
    transfer: Transfer
    ffn: Case | None = None  # the experts' GPUs of a decode worker, where they are its own
    micro_batches: float = 1.0
    seats: float = math.inf  # requests that a decode worker's engine runs at most


def estimate_cases(cases: pd.DataFrame, coefficients: CoefficientSet, intervals: bool = False) -> pd.DataFrame:
    """The input columns, then the contract's: one row in, one row out, same order (float64).

    Unknown columns pass through unread. Raises InputError only where no row could be read at all: required columns
    missing. Rows that cannot be priced have `feasible` False and a `reason`. `intervals`: also the ends between which
    90% of measurements are to lie (`ttft_ms_low`, `ttft_ms_high`, ...; split deployments have none).
    """
    rows = [_parse(row, _any_case) for row in _records(cases)]
    whole = [i for i, row in enumerate(rows) if isinstance(row, Case)]
    split = [i for i, row in enumerate(rows) if isinstance(row, SplitCase) and row.ffn is None]
    apart = [i for i, row in enumerate(rows) if isinstance(row, SplitCase) and row.ffn is not None]
    priced = [(whole, _price([row for row in rows if isinstance(row, Case)], coefficients, intervals))] if whole else []
    for where in (split, apart):
        if where:
            chosen = [row for row in (rows[i] for i in where) if isinstance(row, SplitCase)]
            priced.append((where, _price_split(chosen, coefficients)))
    names = dict.fromkeys(name for _, found in priced for name in found) or dict.fromkeys(columns_of_nothing())
    result: dict[str, Any] = {}
    for name in names:
        filled = np.full(len(rows), np.nan, dtype=object if name in _TEXT else float)
        for where, found in priced:
            if name in found:
                filled[where] = found[name]
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
    """Each row looked up, or why it cannot be priced; undivided deployments only.

    Raises InputError where required columns are missing.
    """
    return [_parse(row, _case) for row in _records(cases)]


def _records(cases: pd.DataFrame) -> list[dict[str, str]]:
    """Rows as text, missing cells as "". Raises InputError where required columns are missing."""
    missing = [name for name in REQUIRED if name not in cases.columns]
    if missing:
        what = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise InputError(f"cases: {what} missing (required: {', '.join(REQUIRED)})")
    known = [name for name in cases.columns if name in _READ or name in pools.COLUMNS]
    text = cases[known].astype(object).where(cases[known].notna(), "")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in text.to_dict("records")]


_READ = frozenset(
    (
        *REQUIRED,
        *COUNTS,
        *("cluster", "engine", "engine_version", "weights", "kv", "moe_tp", "moe_ep", "prefix_hit"),
        "stream_interval",
        *("speculation", "acceptance", "draft_model", "draft_tp", "overlap", "eplb_replicas"),
    )
)


Parsed = TypeVar("Parsed", bound=Case | SplitCase)


def _parse(row: dict[str, str], look_up: Callable[[dict[str, str]], Parsed]) -> Parsed | str:
    """A looked-up case, or why the row cannot be priced."""
    try:
        return look_up(row)
    except InputError as error:
        return str(error)


def _any_case(row: dict[str, str]) -> Case | SplitCase:
    return _split_case(row) if pools.is_split(row) else _case(row)


def _split_case(row: dict[str, str]) -> SplitCase:
    """Both pools looked up as deployments of their own, each carrying the whole deployment's requests in flight."""
    parts = pools.take_apart(row)
    load = number(row, "concurrency", 1.0, low=1.0)  # a mean number in flight need not be whole
    found = []
    for pool in pools.POOLS:
        try:
            case = _case(getattr(parts, pool))
        except InputError as error:
            raise pools.pool_message(pool, error) from None
        drafted = 0.0 if pool == "prefill" else case.load.draft_tokens  # prefill workers compute a draft's prompts only
        found.append(replace(case, load=replace(case.load, concurrency=load, draft_tokens=drafted)))
    name = f"_{pools.WORKERS}"
    counts = {pool + name: text for pool, text in zip(pools.POOLS, parts.workers, strict=True)}
    workers = tuple(number(counts, column, None, low=1.0, whole=True) for column in counts)
    ffn, micro_batches = _experts(parts, found[1])
    seats = number({pools.MAX_BATCH: parts.max_batch}, pools.MAX_BATCH, math.inf, low=1.0, whole=True)
    transfer = parts.transfer(found[0].engine)
    return SplitCase(found[0], found[1], (workers[0], workers[1]), transfer, ffn, micro_batches, seats)


def _experts(parts: pools.SplitRow, decode: Case) -> tuple[Case | None, float]:
    """The experts' GPUs of a decode worker, and its micro-batches."""
    texts = {pools.FFN_GPUS: parts.ffn_gpus, pools.MICRO_BATCHES: parts.micro_batches}
    gpus = number(texts, pools.FFN_GPUS, 0.0, low=0.0, whole=True)
    if not gpus:
        return None, 1.0
    if decode.draft is not None:
        raise InputError(f"draft_model: {decode.draft[0]} beside {pools.FFN_GPUS} (allowed: none; MTP by speculation)")
    if decode.plan["pp"] > 1:
        raise InputError(
            f"decode_pp_size: {decode.plan['pp']:g} beside {pools.FFN_GPUS} (allowed: 1): {pools.NO_STAGES}"
        )
    experts = facts([decode.entry]).experts_of[0]
    if not facts([decode.entry]).moe[0] or experts % gpus:
        allowed = (
            f"allowed: 0, or what divides its {experts} experts" if experts > 1 else "allowed: 0, it has no experts"
        )
        raise InputError(f"{pools.FFN_GPUS}: {gpus:g} for {decode.entry.name} ({allowed})")
    case = replace(_case(parts.ffn(gpus)), load=decode.load)
    return case, number(texts, pools.MICRO_BATCHES, None, low=1.0, high=64.0, whole=True)


def _case(row: dict[str, str]) -> Case:
    if pools.is_split(row):
        raise InputError("a split deployment (prefill_* and decode_* columns); only `dse estimate` prices these")
    if not row["model"]:
        raise InputError("model: is empty (required)")
    entry, gpu = model(row["model"]), hardware.gpu(row["gpu"])
    counts = {name: number(row, name, default, low=1.0, whole=True) for name, default in COUNTS.items()}
    overlap = [part.strip() for part in (row.get("overlap") or "none").split("/")]
    for rule in overlap:
        if rule not in OVERLAPS:
            raise unknown("overlap rule", rule, OVERLAPS, "overlap")
    plan = degrees(row, entry, counts)
    drafted = draft(row.get("speculation", ""), entry)
    return Case(
        entry=entry,
        gpu=gpu,
        cluster=hardware.cluster(row.get("cluster") or gpu.default_cluster).name,
        engine=row.get("engine", "").lower(),
        version=version_key(row.get("engine", "").lower(), row.get("engine_version", "")),
        precision=_precision(entry.name, gpu.name, row.get("weights") or "native", row.get("kv") or "auto"),
        plan={
            **plan,
            "overlap_prefill": float(OVERLAPS.index(overlap[0])),
            "overlap_decode": float(OVERLAPS.index(overlap[-1])),
        },
        load=Load(
            isl=number(row, "isl", None, low=1.0),
            osl=number(row, "osl", None, low=1.0),
            concurrency=counts["concurrency"],
            chunk=counts["chunk"],
            prefix_hit=number(row, "prefix_hit", 0.0, low=0.0, high=1.0),
            acceptance=number(row, "acceptance", Load.acceptance, low=0.0, high=1.0),
            draft_tokens=drafted,
            stream_interval=number(row, "stream_interval", 1.0, low=1.0, high=1e4, whole=True),
        ),
        draft=_draft_model(row, entry, plan["tp"], drafted),
    )


def _draft_model(row: dict[str, str], entry: ModelEntry, tp: float, tokens: float) -> tuple[str, float] | None:
    """The row's draft model and its TP: its target's where that divides it, or 1."""
    name = row.get("draft_model") or NONE
    if name.lower() == NONE:
        return None
    draft_entry(name, entry)
    if not row.get("speculation"):
        raise InputError(f"speculation: is empty; how many tokens does {name} draft a step?")
    shared = float(shared_over(name, entry, np.array([int(tp)]))[0])
    own = number(row, "draft_tp", shared, low=1.0, whole=True)
    if own not in (1.0, shared):
        raise InputError(f"draft_tp: {own:g} (allowed: 1{f' or {shared:g}' if shared > 1 else ''})")
    return (name, own) if tokens else None


# ------------------------------------------------------------------------------------------- pricing


def _price(cases: Sequence[Case], coefficients: CoefficientSet, intervals: bool = False) -> dict[str, np.ndarray]:
    """All cases in one batch of one structure."""
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients)
        whole = in_blocks(estimate, scenarios, block=BLOCK)
    concurrency = np.array([case.load.concurrency for case in cases])
    priced = columns(whole, concurrency, np.array([case.plan["attention_dp"] for case in cases]))
    if intervals:
        priced |= interval_columns(priced, scenarios, [Known(c.entry.name, c.keys) for c in cases], coefficients)
    known = [coefficients.known(**case.keys) for case in cases]
    return {**priced, "coefficients": np.array(known, dtype=object)}


def _price_split(cases: Sequence[SplitCase], coefficients: CoefficientSet) -> dict[str, np.ndarray]:
    """All split deployments in one batch; `coefficients` says the levels that spoke for each pool."""
    with jax.enable_x64(True):
        splits = splits_of(cases, coefficients)
        priced = pools.split_columns(in_blocks(estimate_split, splits, block=BLOCK))
    known = [
        " | ".join(dict.fromkeys(coefficients.known(**case.keys) for case in (split.prefill, split.decode)))
        for split in cases
    ]
    return {**priced, "coefficients": np.array(known, dtype=object)}


def splits_of(cases: Sequence[SplitCase], coefficients: CoefficientSet) -> Split:
    """The batch of some split deployments: leaves (n,). All of them split attention and FFN once more, or none."""
    ffn = [case.ffn for case in cases if case.ffn is not None]
    seats = np.array([case.seats for case in cases])
    return Split(
        prefill=scenarios_of([case.prefill for case in cases], coefficients),
        decode=scenarios_of([case.decode for case in cases], coefficients),
        prefill_workers=np.array([case.workers[0] for case in cases]),
        decode_workers=np.array([case.workers[1] for case in cases]),
        transfer=stack([case.transfer for case in cases]),
        ffn=scenarios_of(ffn, coefficients) if ffn else None,
        micro_batches=np.array([case.micro_batches for case in cases]) if ffn else None,
        apart=np.array([float(case.prefill.cluster != case.decode.cluster) for case in cases]),
        seats=np.minimum(seats, 1e12) if np.isfinite(seats).any() else None,
    )


def scenarios_of(cases: Sequence[Case], coefficients: CoefficientSet) -> Scenario:
    """Tables of what differs, gathered by row."""

    def gather(key: Callable[[Case], Any], make: Callable[[Sequence[Case]], Any]) -> Any:
        first: dict[Any, Case] = {}
        for case in cases:
            first.setdefault(key(case), case)
        place = {k: i for i, k in enumerate(first)}
        index = np.array([place[key(case)] for case in cases])
        return at_rows(make(list(first.values())), index)

    n = len(cases)
    plan = {name: np.array([c.plan[name] for c in cases]) for name in cases[0].plan}
    sharded, replicas = bool((plan["cp"] > 1).any()), plan.pop("eplb_replicas")
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
            eplb_replicas=replicas if replicas.any() else None,
            draft=_drafts(cases),
        ),
        load=replace(
            loads,
            draft_tokens=loads.draft_tokens if np.any(loads.draft_tokens) else None,
            stream_interval=loads.stream_interval if any(c.load.stream_interval != 1.0 for c in cases) else None,
            waves=np.full(n, Load.waves),
        ),
        coefficients=gather(
            lambda c: tuple(c.keys.values()),
            lambda some: stack([coefficients.of(**c.keys) for c in some]),
        ),
    )


def _drafts(cases: Sequence[Case]) -> Draft | None:
    """Draft models of a batch; None where no row has one."""
    if not any(c.draft for c in cases):
        return None
    pairs = [(c.draft[0] if c.draft else NONE, c.entry) for c in cases]
    first = {(name, entry.name): (name, entry) for name, entry in pairs}
    place = {key: i for i, key in enumerate(first)}
    index = np.array([place[name, entry.name] for name, entry in pairs])
    table = draft_table(list(first.values()))
    return Draft(
        architecture=at_rows(table, index),
        tp=np.array([c.draft[1] if c.draft else 1.0 for c in cases]),
        present=np.array([float(c.draft is not None) for c in cases]),
    )


@cache
def _device_of(gpu: str) -> Device:
    return hardware.to_device(hardware.gpu(gpu))


@cache
def _precision(model_name: str, gpu: str, weights: str, kv: str) -> Precision:
    """Formats of a model on a GPU, each worked out once."""
    return resolve(model(model_name), _device_of(gpu), weights, kv)


def _topologies(some: Sequence[Case]) -> Any:
    return hardware.stacked([hardware.to_topology(hardware.cluster(c.cluster)) for c in some])
