"""Counts -> seconds: an operator's time as the larger of two straight lines in its tokens.

t(m) = max(compute(m), memory(m)) with e_c = e_max m/(m + m_half) n/(n + n_half), so that compute(m) =
2nk/(peak e_max e_n) (m + m_half) is a line too, and every gradient exists. Launch time is added by the step.
Ignored: tile and wave quantisation (zero gradient), cache reuse between operators.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.operators import GemmShape
from dse.cost.types import Device, Number, pytree
from dse.numerics import pick, safe_divide, smooth_max


@pytree
class Roofline:
    """Seconds: compute = compute_fixed + compute_token*m, memory = memory_fixed + memory_token*m."""

    compute_fixed: Number
    compute_token: Number
    memory_fixed: Number
    memory_token: Number

    def __call__(self, m: Number, touched: Number = 1.0, rounding: Number | None = None) -> Number:
        """Time of m rows; `touched` matrices (experts) are read and each pays its own partial tile."""
        compute = self.compute_fixed * touched + self.compute_token * m
        memory = self.memory_fixed * touched + self.memory_token * m
        return smooth_max(compute, memory, rounding)


def rates(device: Device, c: Coefficients) -> list[Number]:
    """Attainable FLOP/s of a large GEMM by rate index (units.RATES); a unit the device lacks falls to bf16."""
    attainable = [
        device.peak_bf16 * c.gemm_bf16,
        device.peak_fp8 * c.gemm_fp8,
        device.peak_fp4 * c.gemm_fp4,
        device.peak_int8 * c.gemm_int8,
    ]
    return [jnp.where(rate > 0, rate, attainable[0]) for rate in attainable]


def gemm(
    shape: GemmShape,
    weight_bytes: Number,
    act_bytes: Number,
    rate: Number,
    device: Device,
    c: Coefficients,
    expert_width: Number | None = None,
) -> Roofline:
    """One GEMM with weights of `weight_bytes` and inputs of `act_bytes` an element, outputs in 16 bits.

    In a grouped GEMM the width of an expert's slice sets the efficiency of both its matrices.
    """
    narrow, half = (shape.n, c.gemm_n_half) if expert_width is None else (expert_width, c.expert_half)
    width = safe_divide(narrow, narrow + half, otherwise=1.0)
    token = safe_divide(2.0 * shape.k * shape.n, pick(rate, rates(device, c)) * width)
    stream = device.bandwidth * c.memory
    return Roofline(
        compute_fixed=token * c.gemm_m_half,
        compute_token=token,
        memory_fixed=weight_bytes * shape.weights() / stream,
        memory_token=(act_bytes * shape.k + 2.0 * shape.n) / stream,
    )
