"""What a plan can claim: the kinds, their dimension, and how they are called."""

from __future__ import annotations

from types import MappingProxyType
from typing import NamedTuple


class Kind(NamedTuple):
    """`dimension` of the claimed number, and the name in findings."""

    dimension: str
    label: str


KINDS = MappingProxyType(
    {
        "parameters": Kind("parameters", "parameters"),
        "active_parameters": Kind("parameters", "active parameters"),
        "weights": Kind("bytes", "weights"),
        "weights_gpu": Kind("bytes", "weights a GPU"),
        "weights_total": Kind("bytes", "weights in all"),
        "weights_expert": Kind("bytes", "weights of an expert"),
        "kv": Kind("bytes", "KV cache"),
        "kv_token": Kind("bytes", "KV cache a token"),
        "kv_sequence": Kind("bytes", "KV cache a sequence"),
        "kv_gpu": Kind("bytes", "KV cache a GPU"),
        "kv_total": Kind("bytes", "KV cache in all"),
        "activations_gpu": Kind("bytes", "activations a GPU"),
        "buffers_gpu": Kind("bytes", "buffers a GPU"),
        "memory_gpu": Kind("bytes", "memory a GPU"),
        "memory_share": Kind("share", "share of memory"),
        "headroom": Kind("share", "memory headroom"),
        "prefill_time": Kind("seconds", "prefill time"),
        "ttft": Kind("seconds", "TTFT"),
        "decode_latency": Kind("seconds", "decode latency a token"),
        "throughput": Kind("tokens/s", "throughput"),
        "throughput_gpu": Kind("tokens/s", "throughput a GPU"),
        "expert_communication": Kind("bytes", "expert communication between GPUs"),
        "communication_bytes": Kind("bytes", "communication a GPU"),
        "communication_share": Kind("share", "communication share of the time"),
        "tp_overhead_time": Kind("seconds", "TP overhead an operation"),
        "tp_overhead": Kind("share", "TP overhead"),
        "capacity_factor": Kind("ratio", "capacity factor"),
        "imbalance": Kind("share", "imbalance"),
        "mfu": Kind("share", "MFU"),
        "bandwidth_utilisation": Kind("share", "bandwidth utilisation"),
        "gpus": Kind("GPUs", "number of GPUs"),
        "equation": Kind("", "arithmetic"),
    }
)


def label(kind: str) -> str:
    return KINDS[kind].label if kind in KINDS else "claim"


__all__ = ["KINDS", "Kind", "label"]
