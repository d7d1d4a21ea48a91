"""Counts -> seconds: an operator's time as the larger of two straight lines in its tokens, and what does not overlap.

t(m) = max(compute(m), memory(m)) + walk + quantise m, with compute(m) = 2 (m + m_half) n (k + k_half)/rate: partial
tiles and the filling of a tile only shift the line, so it is fixed once a plan and every gradient exists. The forms are
those of `kernels` with what single-kernel benchmarks do not see in serving left out. Launches are added by the step.
Ignored: tile and wave quantisation (no gain was measured), cache reuse between operators.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.operators import GemmShape
from dse.cost.types import Device, Number, Plan, Routed, pytree
from dse.numerics import pick, safe_divide, smooth_max

SIXTEEN_BIT = 2.0  # bytes


@pytree
class Roofline:
    """Seconds of one GEMM: max(compute_fixed + compute_token*m, memory_fixed + memory_token*m) + fixed + token*m."""

    compute_fixed: Number
    compute_token: Number
    memory_fixed: Number
    memory_token: Number
    fixed: Number  # one thread block's walk along k
    token: Number  # quantising the inputs at run time

    def __call__(self, m: Number, rounding: Number | None = None) -> Number:
        """Time of m rows."""
        compute = self.compute_fixed + self.compute_token * m
        memory = self.memory_fixed + self.memory_token * m
        return smooth_max(compute, memory, rounding) + self.fixed + self.token * m


@pytree
class Grouped:
    """Seconds of a layer's routed experts on one rank, all their matrices together."""

    row: Number  # compute, a row of one expert
    weights: Number  # reading one expert
    walk: Number  # one thread block's walk along both reductions
    fixed: Number  # scheduling of the experts held
    copy: Number  # permuting a token's copy in and out
    m_half: Number
    m_most: Number
    corner: Number

    def __call__(self, copies: Number, touched: Number) -> Number:
        """Time of `copies` rows over `touched` experts, each with a partial tile of its own.

        Rows an expert r = copies/touched are padded to r + m_half r/(r + m_half/m_most).
        """
        wasted = safe_divide(self.m_half * touched, copies + touched * safe_divide(self.m_half, self.m_most))
        compute = self.row * copies * (1.0 + wasted)
        longest = smooth_max(smooth_max(compute, self.weights * touched, self.corner), self.walk, self.corner)
        return longest + self.fixed + self.copy * copies


def rates(device: Device, c: Coefficients) -> list[Number]:
    """Attainable FLOP/s of a large GEMM by rate index (units.RATES); a unit the device lacks falls to bf16.

    peak e/(1 + (peak/power)/flops_per_joule): what the power limit lets a chip sustain.
    """
    peaks = [device.peak_bf16, device.peak_fp8, device.peak_fp4, device.peak_int8]
    shares = [c.gemm_bf16, c.gemm_fp8, c.gemm_fp4, c.gemm_int8]
    attainable = [
        p * e / (1.0 + safe_divide(p, device.power) / c.flops_per_joule) for p, e in zip(peaks, shares, strict=True)
    ]
    return [jnp.where(rate > 0, rate, attainable[0]) for rate in attainable]


def gemm(
    shape: GemmShape, weight_bytes: Number, act_bytes: Number, rate: Number, device: Device, c: Coefficients
) -> Roofline:
    """One GEMM with weights of `weight_bytes` and inputs of `act_bytes` an element, outputs in 16 bits.

    The tile's filling takes a fixed time, so its k_half grows with the rate.
    """
    attainable = rates(device, c)
    at = pick(rate, attainable)
    k_half = jnp.where(shape.k > 0, c.gemm_k_half * at / attainable[0], 0.0)
    token = 2.0 * (shape.k + k_half) * shape.n / at
    stream = device.bandwidth * c.memory
    quantised = jnp.where(act_bytes < SIXTEEN_BIT, c.quantise_passes, 0.0)
    return Roofline(
        compute_fixed=token * c.gemm_m_half,
        compute_token=token,
        memory_fixed=weight_bytes * shape.weights() / stream,
        memory_token=(act_bytes * shape.k + SIXTEEN_BIT * shape.n) / stream,
        fixed=c.gemm_walk * shape.k / (1.0 + shape.k / c.gemm_split),
        token=quantised * (SIXTEEN_BIT + act_bytes) * shape.k / device.bandwidth,
    )


def grouped(routed: Routed, plan: Plan, device: Device, c: Coefficients) -> Grouped:
    """A layer's routed experts on one rank of `plan`."""
    p = plan.precision
    width = routed.width / plan.moe_tp
    attainable = pick(p.expert_rate, rates(device, c)) * c.grouped_gemm
    wasted = pick(p.expert_rate, [c.expert_half, c.expert_half_fp8, c.expert_half_fp4, c.expert_half_fp8])
    each = pick(p.expert_rate, [c.expert_each, c.expert_each_fp8, c.expert_each_fp4, c.expert_each_fp8])
    area = routed.matrices * routed.d_in
    return Grouped(
        row=2.0 * area * (width + wasted) / attainable,
        weights=p.expert_bytes * area * width / (device.bandwidth * c.expert_memory),
        walk=c.expert_walk * (routed.d_in + width),
        fixed=each * routed.experts / plan.moe_ep,
        copy=c.permute_passes
        * (2.0 * SIXTEEN_BIT * routed.d_in + SIXTEEN_BIT * routed.matrices * width)
        / device.bandwidth,
        m_half=c.expert_m_half,
        m_most=c.expert_m_most,
        corner=c.expert_corner,
    )


__all__ = ["Grouped", "Roofline", "gemm", "grouped", "rates"]
