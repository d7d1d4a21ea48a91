"""What tables of single kernels say of the coefficients that a serving fit shares with them: priors for it.

A kernel's coefficient on one GPU is one draw of what the step model calls by another name. Their mean over the GPUs of
the tables, as sure as they agree, and the cited default, as sure as its `doubt` says, together give the prior's centre;
its width is that of any other prior. How far draws lie apart is itself estimated, from them and from the doubt as if it
were one draw more: a single GPU (the only one with fp4 tables, say) counts no more than the default. Launches are left
out: a table's hold what its benchmark runs around the kernel. Peak shares are set against what the power limit leaves
(`roofline.rates`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from dse.calibrate.kernels import fit_kernels
from dse.calibrate.parameters import FREE
from dse.catalog.hardware import gpu, to_device
from dse.catalog.kernel_coefficients import KernelSet
from dse.cost.coefficients import Coefficients
from dse.cost.kernels import peak
from dse.cost.types import Device
from dse.units import RATES

Priors = dict[str, tuple[float, float]]


def _as_is(value: float, device: Device) -> float:
    return value


def _cycles(value: float, device: Device) -> float:
    """Cycles -> seconds."""
    return value / float(device.clock)


def _of_power(rate: str) -> Callable[[float, Device], float]:
    """Share of the data sheet's peak -> share of what the power limit leaves of it."""

    def share(value: float, device: Device) -> float:
        promised = float(peak(device, RATES.index(rate))) / float(device.power)
        return value * (1.0 + promised / Coefficients().flops_per_joule)

    return share


# coefficient -> (operator, its precisions, its name there, into the step model's unit)
SHARED: Mapping[str, tuple[str, tuple[str, ...], str, Callable[[float, Device], float]]] = {
    "gemm_bf16": ("gemm", ("bfloat16",), "peak_share", _of_power("bf16")),
    "gemm_fp8": ("gemm", ("fp8", "fp8_block"), "peak_share", _of_power("fp8")),
    "gemm_fp4": ("gemm", ("nvfp4",), "peak_share", _of_power("fp4")),
    "gemm_m_half": ("gemm", ("bfloat16",), "half_m", _as_is),
    "gemm_walk": ("gemm", ("bfloat16",), "serial", _cycles),
    "memory": ("gemm", ("bfloat16", "fp8"), "memory_share", _as_is),
    "quantise_passes": ("gemm", ("fp8", "fp8_block"), "quantise", _as_is),
    "expert_memory": ("moe", ("bfloat16", "fp8", "fp8_block"), "memory_share", _as_is),
    "expert_half": ("moe", ("bfloat16",), "half_n", _as_is),
    "expert_half_fp8": ("moe", ("fp8", "fp8_block"), "half_n", _as_is),
    "expert_m_half": ("moe", ("bfloat16", "fp8"), "half_m", _as_is),
    "expert_each": ("moe", ("bfloat16",), "launch_expert", _as_is),
    "expert_each_fp8": ("moe", ("fp8", "fp8_block"), "launch_expert", _as_is),
    "expert_walk": ("moe", ("bfloat16", "fp8"), "serial", _cycles),
    "permute_passes": ("moe", ("bfloat16", "fp8", "fp8_block"), "permute", _as_is),
    "core_prefill": ("context_attention", ("bfloat16/bfloat16",), "peak_share", _as_is),
    "core_memory": ("generation_attention", ("bfloat16", "fp8"), "memory_share", _as_is),
}


def kernel_priors(tables: Mapping[str, pd.DataFrame], seed: int = 0) -> Priors:
    """Coefficient -> (centre, spread) of its log, from tables of the operators that share one. Empty: none does."""
    wanted = {op for op, *_ in SHARED.values()}
    fits = {op: fit_kernels(op, table, seed) for op, table in tables.items() if op in wanted}
    found: Priors = {}
    for name, (op, precisions, field, into) in SHARED.items():
        if op in fits:
            fitted = fits[op]
            values = _draws(fitted.coefficients(), op, precisions, field, into, fitted.data)
            if len(values):
                found[name] = _together(name, values)
    return found


def _together(name: str, values: np.ndarray) -> tuple[float, float]:
    """(centre, spread): default and draws, each by its precision."""
    free = next(f for f in FREE if f.name == name)
    apart = (free.doubt**2 + np.sum((values - np.mean(values)) ** 2)) / len(values)
    sure, seen = free.doubt**-2.0, 1.0 / apart
    default = np.log(getattr(Coefficients(), name))
    return float((default * sure + np.mean(values) * seen) / (sure + seen)), free.spread("base")


def _draws(
    chosen: KernelSet,
    op: str,
    precisions: tuple[str, ...],
    field: str,
    into: Callable[[float, Device], float],
    data: Any,
) -> np.ndarray:
    """The log of a coefficient on each GPU and precision that the data have."""
    logs = []
    for name, precision in sorted(set(zip(data.cases.gpu.tolist(), data.cases.precision.tolist(), strict=True))):
        if precision in precisions:
            entry = gpu(name)
            value = into(float(getattr(chosen.of(op, precision, entry.generation, name), field)), to_device(entry))
            if value > 0:
                logs.append(np.log(value))
    return np.array(logs)


__all__ = ["SHARED", "kernel_priors"]
