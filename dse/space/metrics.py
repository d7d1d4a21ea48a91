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

# Of pipelines of several models; requests and tokens of the whole pipeline, GPUs of all its pools.
PIPELINE_METRICS = MappingProxyType(
    {
        **{
            name: METRICS[name]
            for name in (
                *("ttft_ms", "ttft_p90_ms", "ttft_p99_ms", "tpot_ms", "tpot_p90_ms", "e2e_ms"),
                *("output_tok_s_gpu", "gpus", "usd_per_mtok"),
            )
        },
        "tpot_p99_ms": Metric("ms", "min"),
        "requests_s": Metric("requests/s", "max"),
        "requests_s_gpu": Metric("requests/s", "max"),
        "usd_per_request": Metric("USD", "min"),
    }
)

# What only an open loop has: at the given rate, or without one at the goodput.
OPEN = ("goodput_req_s_gpu", "ttft_p90_ms", "ttft_p99_ms", "tpot_p90_ms", "attainment")

__all__ = ["METRICS", "OPEN", "PIPELINE_METRICS", "Metric"]
