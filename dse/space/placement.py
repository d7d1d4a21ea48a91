"""Placements as DistServe enumerates them, for any model and cluster, with their goodput and the traffic they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.batches import in_blocks
from dse.catalog import hardware
from dse.catalog.coefficients import CoefficientSet
from dse.catalog.models import model
from dse.cost import lengths as dist
from dse.cost.goodput import Slo
from dse.cost.placing import Pair, Placed, place
from dse.cost.traffic import KINDS
from dse.errors import InputError
from dse.programs import program
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.space.facts import facts
from dse.units import GB, MS

NAMES = ("pp_across", "tp_prefill", "pp_prefill", "tp_decode", "pp_decode")
SHOWN = (*NAMES, "gpus", "same_node", "req_s_gpu", "req_s", "l_m", "ttft_met", "tpot_met", "reason")
MOST_PLACEMENTS = 20_000
BLOCK = 256  # placements a call
TOP = 64.0  # requests/s a GPU: the bisection's upper end, 16 times as much while it is reached


@dataclass(frozen=True)
class PlacementAsked:
    """What is to be placed, and for whom. Lengths are lognormal of these means and coefficients of variation."""

    model: str
    gpu: str
    mean_isl: float
    mean_osl: float
    cluster: str = ""
    gpus: int = 8
    isl_cv: float = 1.0
    osl_cv: float = 1.0
    ttft_ms: float = 200.0
    tpot_ms: float = 100.0
    attainment: float = 0.9
    jointly: bool = False
    weights: str = "native"
    kv: str = "auto"
    engine: str = ""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("mean_isl", 1.0, 1e7),
            ("mean_osl", 2.0, 1e6),
            ("gpus", 2, 4096),
            ("isl_cv", 0.0, 3.0),
            ("osl_cv", 0.0, 3.0),
            ("ttft_ms", 1e-3, 1e9),
            ("tpot_ms", 1e-3, 1e9),
            ("attainment", 0.01, 0.999),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"{name}: {value:g} is out of range (allowed: {low:g} to {high:g})")


def placements(asked: PlacementAsked) -> pd.DataFrame:
    """Every legal placement: tp | heads and within a node, pp * pp_across | layers, GPUs within the budget.

    Stages of both pipelines are dealt to `pp_across` nodes; `same_node` where a node holds its segment of both.
    """
    entry, shape = model(asked.model), facts([model(asked.model)])
    cluster = hardware.cluster(asked.cluster or hardware.gpu(asked.gpu).default_cluster)
    node = int(cluster.levels[0].size.value)
    tps = np.array([n for n in range(1, min(node, asked.gpus) + 1) if shape.tp(np.array([n]))[0, 0]])
    if shape.moe[0]:
        tps = tps[shape.experts_of[0] % tps == 0]
    rows = []
    nodes = 1 if len(cluster.levels) == 1 else asked.gpus // 2
    pps = [n for n in range(1, min(asked.gpus, entry.layers) + 1) if entry.layers % n == 0]
    for across in pps:
        if across > nodes:
            break
        inner = [n for n in pps if entry.layers % (across * n) == 0]
        segments = [(int(tp), pp) for tp, pp in product(tps, inner) if tp * pp <= node]
        for (tp_p, pp_p), (tp_d, pp_d) in product(segments, segments):
            segment = tp_p * pp_p + tp_d * pp_d
            if across * segment <= asked.gpus and (segment <= node or len(cluster.levels) > 1):
                rows.append((across, tp_p, pp_p, tp_d, pp_d, across * segment, segment <= node))
        if len(rows) > MOST_PLACEMENTS:
            raise InputError(f"gpus: {asked.gpus} leave more than {MOST_PLACEMENTS} placements; give fewer")
    if not rows:
        raise InputError(f"gpus: {asked.gpus} cannot hold a prefill and a decode instance of {entry.name}")
    return pd.DataFrame(rows, columns=[*NAMES, "gpus", "same_node"])


def placement_table(asked: PlacementAsked, coefficients: CoefficientSet) -> pd.DataFrame:
    """Every placement, best rate a GPU first, ties to fewer GPUs.

    `req_s_gpu`, `req_s`; `l_m` (tokens that a prefill batch can hold) and `decode_tokens`; shares that meet the targets
    at that rate; `transfer_ms`; and GB/s that a GPU sends over each level: `prefill_reduce_l0_gb_s`, ..., `kv_l1_gb_s`
    (l0: inside the innermost unit; l1: what leaves it). `reason` where a placement reaches no rate.
    """
    table = placements(asked)
    sides = [_cases(asked, table, pool) for pool in ("prefill", "decode")]
    lengths = _lengths(asked)
    slo = Slo(ttft=asked.ttft_ms * MS, tpot=asked.tpot_ms * MS, attainment=asked.attainment)
    with jax.enable_x64(True):
        pairs = Pair(
            prefill=scenarios_of(sides[0], coefficients),
            decode=scenarios_of(sides[1], coefficients),
            same_node=table["same_node"].to_numpy(float),
            across=table["pp_across"].to_numpy(float),
        )

        def priced(top: float) -> Placed:
            one = _batched(asked.jointly)
            found: Placed = in_blocks(lambda some: one(some, lengths, slo, top), pairs, block=BLOCK)
            return found

        top = TOP
        found = priced(top)
        while np.max(found.per_gpu) > 0.999 * top:
            top *= 16.0
            found = priced(top)
    columns = _columns(found)
    columns["reason"] = _reasons(found, float(np.max(lengths.isl)))
    whole = pd.concat([table, pd.DataFrame(columns)], axis=1)
    rounded = whole["req_s_gpu"].round(4)
    order = np.lexsort((whole["gpus"], -rounded))
    return whole.iloc[order].reset_index(drop=True)


def _lengths(asked: PlacementAsked) -> dist.Lengths:
    """Cut where a request would pass the model's context."""
    most = float(model(asked.model).max_context)
    drawn = dist.lognormal(asked.mean_isl, asked.mean_osl, asked.isl_cv, asked.osl_cv)
    isl = np.minimum(drawn.isl, most - 2.0)
    return replace(drawn, isl=isl, osl=np.minimum(drawn.osl, most - isl))


def _cases(asked: PlacementAsked, table: pd.DataFrame, pool: str) -> list[Case]:
    """One instance a row; experts are spread over its TP group."""
    tp, pp = table[f"tp_{pool}"], table[f"pp_{pool}"] * table["pp_across"]
    rows = pd.DataFrame(
        {
            "model": asked.model,
            "gpu": asked.gpu,
            "cluster": asked.cluster,
            "engine": asked.engine,
            "weights": asked.weights,
            "kv": asked.kv,
            "isl": max(round(asked.mean_isl), 1),
            "osl": max(round(asked.mean_osl), 2),
            "tp": tp,
            "pp": pp,
            "moe_ep": tp,
        }
    )
    cases = []
    for row in parse_cases(rows):
        if isinstance(row, str):
            raise InputError(f"placement: {row}")
        cases.append(row)
    return cases


@lru_cache(maxsize=2)
def _batched(jointly: bool) -> Any:
    return program(_one, jointly, in_axes=(0, None, None, None))


def _one(jointly: bool, x: Pair, lengths: Any, slo: Slo, top: Any) -> Placed:
    return place(x, lengths, slo, top, jointly)


def _columns(found: Placed) -> dict[str, Any]:
    columns: dict[str, Any] = {
        "req_s_gpu": found.per_gpu,
        "req_s": found.rate,
        "l_m": np.floor(found.prefill_tokens),
        "decode_tokens": np.floor(found.decode_tokens),
        "ttft_met": found.ttft_met,
        "tpot_met": found.tpot_met,
        "transfer_ms": np.asarray(found.transfer) / MS,
    }
    pools = (("prefill", found.prefill_traffic), ("decode", found.decode_traffic))
    for level in range(np.shape(found.kv_traffic)[1]):
        for pool, sent in pools:
            for kind in KINDS:
                columns[f"{pool}_{kind}_l{level}_gb_s"] = getattr(sent, kind)[:, level] / GB
        columns[f"kv_l{level}_gb_s"] = np.asarray(found.kv_traffic)[:, level] / GB
    return columns


def _reasons(found: Placed, longest: float) -> list[str]:
    reasons = []
    for rate, tokens, held in zip(found.rate, found.prefill_tokens, found.decode_tokens, strict=True):
        if rate > 0:
            reasons.append("")
        elif tokens < longest:
            reasons.append(f"memory: a prefill batch holds {tokens:.0f} tokens, the longest prompt has {longest:.0f}")
        elif held <= 0:
            reasons.append("memory: decode has no room for one request")
        else:
            reasons.append("targets: missed at any rate")
    return reasons


__all__ = ["SHOWN", "PlacementAsked", "placement_table", "placements"]
