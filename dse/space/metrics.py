"""The metrics that constraints and objectives may name: their unit, and which direction is better."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    unit: str  # a key of `dse.space.values.UNITS`
    better: Literal["min", "max"]


METRICS = MappingProxyType(
    {
        "ttft_ms": Metric("ms", "min"),
        "tpot_ms": Metric("ms", "min"),
        "e2e_ms": Metric("ms", "min"),
        "output_tok_s_gpu": Metric("tokens/s", "max"),
        "total_tok_s_gpu": Metric("tokens/s", "max"),  # prompt and output tokens
        "tok_s_user": Metric("tokens/s", "max"),
        "gpus": Metric("GPUs", "min"),
        "usd_per_mtok": Metric("USD", "min"),
        "memory_gib": Metric("GiB", "min"),
        # under open load (workloads with `slo`, and perhaps `arrivals`)
        "goodput_req_s_gpu": Metric("requests/s", "max"),
        "ttft_p90_ms": Metric("ms", "min"),
        "ttft_p99_ms": Metric("ms", "min"),
        "tpot_p90_ms": Metric("ms", "min"),
        "attainment": Metric("fraction", "max"),
    }
)

# What only an open loop has: at the given rate, or without one at the goodput.
OPEN = ("goodput_req_s_gpu", "ttft_p90_ms", "ttft_p99_ms", "tpot_p90_ms", "attainment")

__all__ = ["METRICS", "OPEN", "Metric"]
