"""A space of split deployments: the legal workers of each pool, and how many of each a budget of GPUs allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from dse.errors import InputError
from dse.space.compile import CompiledSpace, Constraint, compile_space, constraints_of
from dse.space.drafts import NONE
from dse.space.facts import facts
from dse.space.pools import DEGREES, FFN_GPUS, MICRO_BATCHES, NO_STAGES, POOLS, WORKERS
from dse.space.schema import Disaggregated, PoolAxes, SpaceSpec
from dse.space.tables import describe

Array = np.ndarray
MOST_RATIOS = 4096
# What a pool's row says that is the deployment's, not the pool's.
_SHARED = ("model", "isl", "osl", "prefix_hit")
_LOADS = ("concurrency", "chunk", "speculation", "acceptance", "draft_model", "static_batch")
_LEFT_OUT = frozenset((*_SHARED, *_LOADS, "gpus", "replicas"))


@dataclass(frozen=True, kw_only=True, eq=False)
class CompiledPools:
    """Both pools' spaces: a point of `prefill` (`decode`) is one worker under one chunk (number of running requests).

    `ratios`: (prefill workers, decode workers) that may be tried; which fit the budget depends on the workers' sizes.
    """

    spec: SpaceSpec
    prefill: CompiledSpace
    decode: CompiledSpace
    budget: int  # GPUs
    ratios: tuple[tuple[int, int], ...]
    transfers: tuple[str, ...]
    experts: tuple[tuple[int, int], ...]  # (GPUs of the experts' own, micro-batches) of a decode worker
    constraints: tuple[Constraint, ...]
    objectives: tuple[tuple[str, str], ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Prefill points, decode points x experts, ratios x transfers: a pair's flat index counts through them so."""
        return self.prefill.legal, self.decode.legal * len(self.experts), len(self.ratios) * len(self.transfers)


def compile_pools(spec: SpaceSpec) -> CompiledPools:
    """Look up every name of both pools and find their legal workers.

    Raises InputError for more than one model or workload, and for whatever `compile_space` refuses.
    """
    pools = spec.disaggregated
    if pools is None:
        raise InputError(f"{spec.where}: has no `disaggregated`; add prefill and decode pools")
    for name, items in (("models", spec.models), ("workloads", spec.workloads)):
        if len(items) > 1:
            raise InputError(
                f"{spec.where}: {name}: {len(items)} of them (allowed beside `disaggregated`: 1); search each by itself"
            )
    prefill = _pool(spec, pools, "prefill", {"concurrency": (1,), **_drafting(pools.decode)})
    decode = _pool(spec, pools, "decode", {})
    budget, experts = max(spec.gpus), _experts(spec, pools, decode)
    smallest = int(prefill.designs.gpus.min()), int(decode.designs.gpus.min()) + min(own for own, _ in experts)
    ratios = _ratios(spec, pools, budget, *smallest)
    return CompiledPools(
        spec=spec,
        prefill=prefill,
        decode=decode,
        budget=budget,
        ratios=ratios,
        transfers=pools.kv_transfer,
        experts=experts,
        constraints=constraints_of(spec.constraints),
        objectives=spec.objectives,
    )


def _pool(spec: SpaceSpec, pools: Disaggregated, name: str, fixed: dict[str, object]) -> CompiledSpace:
    """A pool's workers as a space of its own."""
    axes: PoolAxes = getattr(pools, name)
    changes = {
        "clusters": axes.clusters or spec.clusters,
        "gpus": axes.gpus,
        "axes": axes.model_copy(update=fixed),
        "constraints": {},
        "disaggregated": None,
    }
    if "draft_model" in fixed:  # which of its models have MTP modules is the decode pool's to ask
        changes["options"] = spec.options.model_copy(update={"external_draft": True})
    own = spec.model_copy(update=changes)
    own._where = f"{spec.where}: disaggregated.{name}"
    return compile_space(own)


def _drafting(decode: PoolAxes) -> dict[str, object]:
    """What decode workers draft with, prefill workers hold too: prompts pass through it, and its cache travels."""
    if set(decode.draft_model) == {NONE}:
        return {}
    idle = () if min(decode.draft_tokens) else (NONE,)
    return {"draft_model": tuple(dict.fromkeys((*idle, *decode.draft_model))), "draft_tokens": (1,)}


def draft_names(space: CompiledSpace) -> Array:
    """The draft model of each point (designs * Q,); "none" where the point drafts nothing."""
    d, q = space.designs, len(space.operating)
    named = np.array(space.spec.axes.draft_model, dtype=object)[np.repeat(d.draft_model, q)]
    return np.where(np.tile(space.operating.draft_tokens, len(d)) > 0, named, NONE)


def _experts(spec: SpaceSpec, pools: Disaggregated, decode: CompiledSpace) -> tuple[tuple[int, int], ...]:
    """GPUs of the experts' own with each number of micro-batches; 0 has no micro-batches."""
    axes, held = pools.decode, int(facts(list(decode.models)).experts_of[0])
    stages = int(decode.designs.pp.max())
    if max(axes.ffn_gpus) and stages > 1:
        raise InputError(
            f"{spec.where}: disaggregated.decode.pp: {stages} beside ffn_gpus (allowed: 1): {NO_STAGES};"
            " search pipelines apart, without ffn_gpus"
        )
    for own in axes.ffn_gpus:
        if own and (not held or held % own):
            what = f"its {held} experts" if held else "a model with experts"
            raise InputError(
                f"{spec.where}: disaggregated.decode.ffn_gpus: {own} does not divide {what} (allowed: 0, or what does)"
            )
    return tuple((own, m) for own in axes.ffn_gpus for m in (axes.micro_batches if own else (1,)))


def _ratios(
    spec: SpaceSpec, pools: Disaggregated, budget: int, prefill_gpus: int, decode_gpus: int
) -> tuple[tuple[int, int], ...]:
    """Numbers of workers for which the smallest workers fit the budget."""
    most = (budget - decode_gpus) // prefill_gpus, (budget - prefill_gpus) // decode_gpus
    counts = [
        [n for n in (axes.workers or range(1, limit + 1)) if n <= limit]
        for axes, limit in zip((pools.prefill, pools.decode), most, strict=True)
    ]
    found = [(p, d) for p in counts[0] for d in counts[1] if p * prefill_gpus + d * decode_gpus <= budget]
    if not found:
        raise InputError(
            f"{spec.where}: disaggregated: one worker of {prefill_gpus} GPUs and one of {decode_gpus} are more than the"
            f" {budget} that gpus allows, or than workers asks for; raise gpus, or give smaller workers"
        )
    if len(found) > MOST_RATIOS:
        raise InputError(
            f"{spec.where}: disaggregated: {len(found)} numbers of workers (allowed: {MOST_RATIOS});"
            " name those to try in prefill.workers and decode.workers"
        )
    return tuple(found)


def unravel(pools: CompiledPools, flat: Array) -> tuple[Array, Array, Array, Array]:
    """(prefill point, decode point x experts, ratio, transfer) of each pair's flat index."""
    prefill, decode, rest = np.unravel_index(np.asarray(flat, np.int64), pools.shape)
    ratio, transfer = np.divmod(rest, len(pools.transfers))
    return prefill, decode, ratio, transfer


def describe_pairs(pools: CompiledPools, flat: Array) -> pd.DataFrame:
    """One row a pair, in the columns that `estimate` reads of split rows, and the axes searched.

    `concurrency`, all requests in flight, is a result of the decode workers' and so left to whoever prices the pair.
    """
    prefill, decode, ratio, transfer = unravel(pools, flat)
    decode, own = np.divmod(decode, len(pools.experts))
    rows = {"prefill": describe(pools.prefill, prefill), "decode": describe(pools.decode, decode)}
    workers = np.array(pools.ratios)[ratio]
    columns: dict[str, object] = {name: rows["prefill" if name == "prefix_hit" else "decode"][name] for name in _SHARED}
    for name in ("gpu", "cluster"):
        both = [rows[pool][name].to_numpy() for pool in POOLS]
        columns[name] = [a if a == b else f"{a} + {b}" for a, b in zip(*both, strict=True)]
    for name in ("speculation", "acceptance"):
        if name in rows["decode"]:
            columns[name] = rows["decode"][name]
    if "draft_model" in rows["decode"]:
        columns["draft_model"] = draft_names(pools.decode)[decode]
    columns["kv_transfer"] = np.array(pools.transfers, dtype=object)[transfer]
    names = {short: column for column, short in DEGREES.items()}
    for i, pool in enumerate(POOLS):
        columns[f"{pool}_{WORKERS}"] = workers[:, i]
        for name in map(str, rows[pool]):
            if name not in _LEFT_OUT:
                columns[f"{pool}_{names.get(name, name)}"] = rows[pool][name]
    columns["prefill_chunk"] = rows["prefill"]["chunk"]
    if pools.experts != ((0, 1),):
        columns[FFN_GPUS], columns[MICRO_BATCHES] = np.array(pools.experts)[own].T
    return pd.DataFrame(columns, index=pd.RangeIndex(len(prefill)))


__all__ = ["CompiledPools", "compile_pools", "describe_pairs", "draft_names", "unravel"]
