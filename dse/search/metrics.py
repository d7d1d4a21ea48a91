"""Estimates in the natural units of constraints and objectives; the one place where a direction becomes a sign."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from dse.space.metrics import METRICS, OPEN
from dse.units import GIB, MS

# of an `Estimate`; those under open load of an `OpenEstimate`
VALUE: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "ttft_ms": lambda e: e.ttft / MS,
        "tpot_ms": lambda e: e.tpot / MS,
        "e2e_ms": lambda e: e.e2e / MS,
        "output_tok_s_gpu": lambda e: e.output_rate,
        "total_tok_s_gpu": lambda e: e.total_rate,
        "tok_s_user": lambda e: e.user_rate,
        "gpus": lambda e: e.gpus,
        "usd_per_mtok": lambda e: e.usd_per_mtok,
        "memory_gib": lambda e: e.memory.total / GIB,
        "goodput_req_s_gpu": lambda e: e.goodput,
        "ttft_p90_ms": lambda e: e.open.ttft_p90 / MS,
        "ttft_p99_ms": lambda e: e.open.ttft_p99 / MS,
        "tpot_p90_ms": lambda e: e.open.tpot_p90 / MS,
        "attainment": lambda e: e.open.attainment,
    }
)
# Of a mix of workloads these are the worst one's, not the mean.
WORST = frozenset(("memory_gib", "gpus"))
# Relative float32 error that a sweep must not let decide (tests hold the model to 1e-5, what bisection finds to 1e-3);
# counts are exact.
MARGIN = MappingProxyType({name: 0.0 if name == "gpus" else 1e-3 if name in OPEN else 3e-5 for name in METRICS})


def signed(objectives: Sequence[tuple[str, str]]) -> list[float]:
    """+1 to minimise, -1 to maximise."""
    return [1.0 if direction == "min" else -1.0 for _, direction in objectives]


def relative_excess(value: Any, op: str, bound: Any, where: Callable[..., Any] = np.where) -> Any:
    """How far a metric breaks a bound (`op` max or min): at most 0 is met; `where` is `jnp.where` in a trace.

    In units of the bound (max) or of the value (min) where that is positive, else of the metric.
    """
    over, unit = (value - bound, bound) if op == "max" else (bound - value, value)
    return over / where(unit > 0, unit, 1.0)


def margins(objectives: Sequence[tuple[str, str]]) -> list[float]:
    return [MARGIN[name] for name, _ in objectives]
