"""Split deployments as rows: what the `prefill_*` and `decode_*` columns say, and what comes back of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dse.cost.memory import Memory
from dse.cost.pools import SplitEstimate, Transfer
from dse.cost.types import TRANSFERS
from dse.errors import InputError, unknown
from dse.space.columns import MEMORY_PARTS, STEP_PARTS, fits
from dse.units import GIB, MS

Array = np.ndarray
Row = Mapping[str, str]
POOLS = ("prefill", "decode")
WORKERS = "num_workers"

# Column of a pool -> the column of an undivided deployment that it stands for. GPUs of a worker = tp * attention_dp *
# cp * pp, and a stage's as moe_tp * moe_ep: so it is in every row of the measured tables.
DEGREES: Mapping[str, str] = {f"{name}_size": name for name in ("tp", "pp", "attention_dp", "cp", "moe_tp", "moe_ep")}
# What a pool may have of its own; left out, it is what the row says for both.
# A decode worker whose attention and FFN are split: GPUs of the experts beside those of attention, and micro-batches.
FFN_GPUS, MICRO_BATCHES = "decode_ffn_gpus", "decode_micro_batches"
# Requests that a decode worker's engine runs at most (max_num_seqs, max_batch_size, over its attention-DP ranks).
MAX_BATCH = "decode_max_batch"
OWN = ("gpu", "cluster", "weights", "kv", "overlap", "chunk", "eplb_replicas", "draft_tp")
COLUMNS = frozenset(f"{pool}_{what}" for pool in POOLS for what in (WORKERS, *DEGREES, *OWN)) | {
    "kv_transfer",
    FFN_GPUS,
    MICRO_BATCHES,
    MAX_BATCH,
}
# Engines whose decode worker computes the first token again, so that a user sees it one decode step later (vLLM's
# remote prefill); SGLang and TensorRT-LLM stream the prefill worker's token once the cache has arrived.
FIRST_STEP = frozenset(("vllm",))


NO_STAGES = "attention and FFN on GPUs of their own have no pipeline stages"


@dataclass(frozen=True)
class SplitRow:
    """A row taken apart: one row of an undivided deployment a pool, and what joins them."""

    prefill: dict[str, str]
    decode: dict[str, str]
    workers: tuple[str, str]
    kv_transfer: str
    ffn_gpus: str
    micro_batches: str
    max_batch: str

    def ffn(self, gpus: float) -> dict[str, str]:
        """The experts' GPUs of a decode worker as a row of its own: one rank each."""
        degrees = {"tp": "1", "pp": "1", "cp": "1", "moe_tp": "1", "attention_dp": f"{gpus:g}", "moe_ep": f"{gpus:g}"}
        return {**self.decode, **degrees}

    def transfer(self, engine: str) -> Transfer:
        return Transfer(
            layerwise=float(self.kv_transfer == "layerwise"),
            first_step=float(engine in FIRST_STEP),
            free=float(self.kv_transfer == "free"),
        )


def is_split(row: Row) -> bool:
    """Whether a row says anything of a pool."""
    return any(row.get(name) for name in COLUMNS - {"kv_transfer"})


def take_apart(row: Row) -> SplitRow:
    """The two pools of a row. Raises InputError where one is missing or the transfer's name is unknown."""
    kind = (row.get("kv_transfer") or TRANSFERS[0]).lower()
    if kind not in TRANSFERS:
        raise unknown("KV transfer", kind, TRANSFERS, "kv_transfer")
    for pool, other in (POOLS, POOLS[::-1]):
        if not any(row.get(f"{pool}_{name}") for name in (WORKERS, *DEGREES)):
            raise InputError(f"{pool}_*: no column of the {pool} pool is filled, though {other}_* are; give both pools")
    return SplitRow(
        prefill=_pool(row, "prefill"),
        decode=_pool(row, "decode"),
        workers=(row.get(f"prefill_{WORKERS}") or "1", row.get(f"decode_{WORKERS}") or "1"),
        kv_transfer=kind,
        ffn_gpus=row.get(FFN_GPUS, ""),
        micro_batches=row.get(MICRO_BATCHES) or "2",
        max_batch=row.get(MAX_BATCH, ""),
    )


def _pool(row: Row, pool: str) -> dict[str, str]:
    """A pool as a row of its own; `concurrency` is the whole deployment's, so a worker's is left out."""
    shared = {name: text for name, text in row.items() if name not in COLUMNS and name not in DEGREES.values()}
    own = {name: row.get(f"{pool}_{name}") or row.get(name, "") for name in OWN}
    if row.get(f"{pool}_gpu") and not row.get(f"{pool}_cluster"):
        own["cluster"] = ""  # the other GPU's usual cluster, not the row's
    degrees = {name: row.get(f"{pool}_{column}", "") for column, name in DEGREES.items()}
    return {**shared, **own, **degrees, "concurrency": "1"}


def pool_message(pool: str, error: InputError) -> InputError:
    return InputError(f"{pool} pool: {error}")


def split_columns(e: SplitEstimate) -> dict[str, Array]:
    """Contract columns of a batch of split deployments (leaves (n,)), then what only they have."""
    feasible, reason = split_fits(e)
    result: dict[str, Array] = {
        "ttft_ms": e.ttft / MS,
        "tpot_ms": e.tpot / MS,
        "output_tok_s_gpu": e.output_rate,
        "tok_s_user": e.user_rate,
        "e2e_ms": e.e2e / MS,
        "memory_gib": e.memory.total / GIB,
        "feasible": feasible,
        "reason": reason,
        "total_tok_s_gpu": e.total_rate,
        "requests_s": e.request_rate,
        "gpus": e.gpus,
        "usd_per_mtok": e.usd_per_mtok,
        "joules_per_token": e.joules_per_token,
        "queue_ms": e.queue / MS,
        "running": e.running,
        "kv_requests": e.decode_memory.requests,
    }
    for pool, step in (("decode", e.decode_step), ("prefill", e.prefill_step)):
        result[f"{pool}_step_ms"] = np.asarray(step.total) / MS
        for part in STEP_PARTS:
            result[f"{pool}_{part}_ms"] = np.asarray(getattr(step, part)) / MS
    for part in MEMORY_PARTS:
        result[f"{part}_gib"] = np.asarray(getattr(e.memory, part)) / GIB
    result["usable_gib"] = np.asarray(e.memory.usable) / GIB
    result |= {
        "transfer_ms": e.transfer / MS,
        "prefill_busy": e.prefill_busy,
        "decode_busy": e.decode_busy,
        "prefill_memory_gib": e.prefill_memory.total / GIB,
        "decode_memory_gib": e.decode_memory.total / GIB,
    }
    return {name: np.asarray(values) for name, values in result.items()}


def split_fits(e: SplitEstimate) -> tuple[Array, Array]:
    """Whether both pools fit in memory, and the one reason why they do not."""
    feasible, reason = np.ones(np.shape(e.ttft), bool), np.full(np.shape(e.ttft), "", dtype=object)
    pools: tuple[tuple[str, Memory], ...] = (("prefill", e.prefill_memory), ("decode", e.decode_memory))
    for pool, memory in pools:
        requests = np.asarray(memory.kv) / np.maximum(np.asarray(memory.kv_request), 1e-30)
        one, why = fits(memory, requests, np.ones_like(requests))
        for i in np.flatnonzero(feasible & ~one):
            reason[i] = f"{pool} pool: {why[i]}"
        feasible &= one
    return feasible, reason


__all__ = ["COLUMNS", "SplitRow", "is_split", "pool_message", "split_columns", "split_fits", "take_apart"]
