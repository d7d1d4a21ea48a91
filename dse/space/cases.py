"""Cases: one deployment a row, priced in one batch; a bad row gets its reason and never stops the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import jax
import numpy as np
import pandas as pd

from dse.catalog import hardware
from dse.catalog.align import align
from dse.catalog.coefficients import LEVELS, CoefficientSet, version_key
from dse.catalog.model_schema import ModelEntry
from dse.catalog.models import model, to_architecture
from dse.catalog.precision import resolve
from dse.catalog.schema import GpuEntry
from dse.cost.evaluate import Scenario, estimate
from dse.cost.pools import Split, Transfer, estimate_split
from dse.cost.types import OVERLAPS, Device, Load, Plan, Precision, stack
from dse.errors import InputError, unknown
from dse.space import pools
from dse.space.columns import columns
from dse.space.facts import facts
from dse.space.intervals import Known, interval_columns

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
    version: str  # `version_key` of the engine
    precision: Precision
    plan: dict[str, float]
    load: Load

    @property
    def keys(self) -> dict[str, str]:
        """Level of a coefficient set -> this case's key."""
        keys = (self.gpu.generation, self.gpu.name, self.engine, self.version, self.entry.name)
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


def estimate_cases(cases: pd.DataFrame, coefficients: CoefficientSet, intervals: bool = False) -> pd.DataFrame:
    """The input columns, then the contract's: one row in, one row out, same order (float64).

    Unknown columns pass through unread. Raises InputError only where no row could be read at all: required columns
    missing. Rows that cannot be priced have `feasible` False and a `reason`. `intervals`: also the ends between which
    90% of measurements are to lie (`ttft_ms_low`, `ttft_ms_high`, ...; split deployments have none).
    """
    missing = [name for name in REQUIRED if name not in cases.columns]
    if missing:
        what = f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        raise InputError(f"cases: {what} missing (required: {', '.join(REQUIRED)})")
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
    """Each row looked up, or why it cannot be priced; undivided deployments only."""
    return [_parse(row, _case) for row in _records(cases)]


def _records(cases: pd.DataFrame) -> list[dict[str, str]]:
    """Rows as text, missing cells as ""; whole numbers lose a spurious `.0`."""
    known = [name for name in cases.columns if name in _READ or name in pools.COLUMNS]
    text = cases[known].astype(object).where(cases[known].notna(), "")
    return [{str(k): str(v).strip() for k, v in row.items()} for row in text.to_dict("records")]


_READ = frozenset(
    (
        *REQUIRED,
        *_COUNTS,
        *("cluster", "engine", "engine_version", "weights", "kv", "moe_tp", "moe_ep", "prefix_hit"),
        *("speculation", "acceptance", "overlap", "eplb_replicas"),
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
    load = _number(row, "concurrency", 1.0, low=1.0)  # a mean number in flight need not be whole
    found = []
    for pool in pools.POOLS:
        try:
            case = _case(getattr(parts, pool))
        except InputError as error:
            raise pools.pool_message(pool, error) from None
        found.append(replace(case, load=replace(case.load, concurrency=load)))
    name = f"_{pools.WORKERS}"
    counts = {pool + name: text for pool, text in zip(pools.POOLS, parts.workers, strict=True)}
    workers = tuple(_number(counts, column, None, low=1.0, whole=True) for column in counts)
    ffn, micro_batches = _experts(parts, found[1])
    return SplitCase(found[0], found[1], (workers[0], workers[1]), parts.transfer(found[0].engine), ffn, micro_batches)


def _experts(parts: pools.SplitRow, decode: Case) -> tuple[Case | None, float]:
    """The experts' GPUs of a decode worker, and its micro-batches."""
    texts = {pools.FFN_GPUS: parts.ffn_gpus, pools.MICRO_BATCHES: parts.micro_batches}
    gpus = _number(texts, pools.FFN_GPUS, 0.0, low=0.0, whole=True)
    if not gpus:
        return None, 1.0
    experts = facts([decode.entry]).experts_of[0]
    if not facts([decode.entry]).moe[0] or experts % gpus:
        allowed = (
            f"allowed: 0, or what divides its {experts} experts" if experts > 1 else "allowed: 0, it has no experts"
        )
        raise InputError(f"{pools.FFN_GPUS}: {gpus:g} for {decode.entry.name} ({allowed})")
    case = replace(_case(parts.ffn(gpus)), load=decode.load)
    return case, _number(texts, pools.MICRO_BATCHES, None, low=1.0, high=64.0, whole=True)


def _case(row: dict[str, str]) -> Case:
    if pools.is_split(row):
        raise InputError("a split deployment (prefill_* and decode_* columns); only `dse estimate` prices these")
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
        version=version_key(row.get("engine", "").lower(), row.get("engine_version", "")),
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
            acceptance=_number(row, "acceptance", Load.acceptance, low=0.0, high=1.0),
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
    replicas = 0.0
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
        replicas = _replicas(row, int(shape.experts_of[0]), moe_ep)
    else:
        moe_tp = stage
    return {
        "tp": tp,
        "pp": pp,
        "attention_dp": counts["attention_dp"],
        "cp": counts["cp"],
        "moe_tp": moe_tp,
        "moe_ep": moe_ep,
        "eplb_replicas": replicas,
    }


def _replicas(row: dict[str, str], experts: int, ep: float) -> float:
    """Redundant experts a layer; none in a group of one."""
    value = _number(row, "eplb_replicas", 0.0, low=0.0, high=1e5, whole=True)
    if value and (experts + value) % ep:
        raise InputError(
            f"eplb_replicas: {value:g} with {experts} experts do not fill {ep:g} ranks evenly"
            f" (allowed: {-experts % ep:g} and every {ep:g} more)"
        )
    return value if ep > 1 else 0.0


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


def _price(cases: Sequence[Case], coefficients: CoefficientSet, intervals: bool = False) -> dict[str, np.ndarray]:
    """All cases in one batch of one structure."""
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients)
        whole = _in_blocks(estimate, scenarios, len(cases))
    concurrency = np.array([case.load.concurrency for case in cases])
    priced = columns(whole, concurrency, np.array([case.plan["attention_dp"] for case in cases]))
    if intervals:
        priced |= interval_columns(priced, scenarios, [Known(c.entry.name, c.keys) for c in cases], coefficients)
    known = [coefficients.known(*case.keys.values()) for case in cases]
    return {**priced, "coefficients": np.array(known, dtype=object)}


def _in_blocks(price: Callable[[Any], Any], batch: Any, rows: int) -> Any:
    """A batch priced in blocks padded to powers of two, so that few shapes are ever compiled."""
    parts = []
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        size = max(16, 1 << (count - 1).bit_length())
        index = np.minimum(np.arange(start, start + size), rows - 1)
        result = price(jax.tree.map(lambda leaf, i=index: leaf[i], batch))
        parts.append(jax.tree.map(lambda leaf, n=count: np.asarray(leaf)[:n], result))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _price_split(cases: Sequence[SplitCase], coefficients: CoefficientSet) -> dict[str, np.ndarray]:
    """All split deployments in one batch; `coefficients` says the levels that spoke for each pool."""
    with jax.enable_x64(True):
        splits = splits_of(cases, coefficients)
        priced = pools.split_columns(_in_blocks(estimate_split, splits, len(cases)))
    known = [
        " | ".join(dict.fromkeys(coefficients.known(*case.keys.values()) for case in (split.prefill, split.decode)))
        for split in cases
    ]
    return {**priced, "coefficients": np.array(known, dtype=object)}


def splits_of(cases: Sequence[SplitCase], coefficients: CoefficientSet) -> Split:
    """The batch of some split deployments: leaves (n,). All of them split attention and FFN once more, or none."""
    ffn = [case.ffn for case in cases if case.ffn is not None]
    return Split(
        prefill=scenarios_of([case.prefill for case in cases], coefficients),
        decode=scenarios_of([case.decode for case in cases], coefficients),
        prefill_workers=np.array([case.workers[0] for case in cases]),
        decode_workers=np.array([case.workers[1] for case in cases]),
        transfer=stack([case.transfer for case in cases]),
        ffn=scenarios_of(ffn, coefficients) if ffn else None,
        micro_batches=np.array([case.micro_batches for case in cases]) if ffn else None,
        apart=np.array([float(case.prefill.cluster != case.decode.cluster) for case in cases]),
    )


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
        ),
        load=replace(
            loads,
            draft_tokens=loads.draft_tokens if np.any(loads.draft_tokens) else None,
            waves=np.full(n, Load.waves),
        ),
        coefficients=gather(
            lambda c: (c.gpu.name, c.engine, c.version),
            lambda some: stack([coefficients.of(*c.keys.values()) for c in some]),
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
