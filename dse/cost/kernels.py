"""Times of single kernels as smooth functions of their shape: GEMM and grouped experts.

One scalar case in, seconds out; batch by `vmap`. Shared by all of them (attention: `attention_kernels`):

- `launch`, s: launch, prologue and epilogue of the kernel and of what its benchmark runs around it;
- `serial`, cycles an element: one thread block's dependent walk along the dimension it reduces, which splitting that
  dimension over blocks stops at about `split` elements: serial k/(1 + k/split);
- `peak_share`, `memory_share`: attainable share of the data sheet's FLOP/s and bytes/s;
- latencies inside a kernel are cycles of `Device.clock`; launches are not;
- `warm` = 1 for a benchmark that repeats one kernel on the same buffers: what fits in the last-level cache is read from
  there. In serving it is 0: the weights of a layer have long been evicted when its turn comes again.

Coefficients are fitted by `dse.calibrate.kernels` (values: `catalog/coefficients/kernels.yaml`). The forms are ours,
refinements of the roofline (Williams et al. 2009). Ignored: tile and wave quantisation of GEMMs (no gain was measured,
and no gradient), the kernel selection of each library where it does not follow from shapes, clocks under power limits.
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Device, Number, pytree
from dse.numerics import pick, smooth_max

GEMM_CORNER = 0.2  # rounding of compute against memory; fitted values stay near it
EXPERT_CORNER = 0.8


def peak(device: Device, rate: Number) -> Number:
    """Dense FLOP/s of a rate (index of `units.RATES`); a unit the device lacks computes in 16 bits."""
    rates = [device.peak_bf16, device.peak_fp8, device.peak_fp4, device.peak_int8]
    return pick(rate, [jnp.where(jnp.asarray(value) > 0, value, device.peak_bf16) for value in rates])


def stream(
    moved: Number, memory_share: Number, l2_share: Number, l2_rate: Number, device: Device, warm: Number
) -> Number:
    """Seconds to move `moved` bytes: memory, but for the warm share 1/(1 + (moved/(l2_share L2))^4), at `l2_rate`.

    `l2_rate`: bytes a cycle a SM. An artefact of benchmark loops, so it never makes a cold read faster.
    """
    cold = moved / (device.bandwidth * memory_share)
    hit = warm / (1.0 + (moved / (l2_share * device.l2)) ** 4)
    return cold + hit * (jnp.minimum(cold, moved / (l2_rate * device.sms * device.clock)) - cold)


def walk(length: Number, serial: Number, split: Number, device: Device) -> Number:
    """Seconds of one block's walk along `length` elements, `serial` cycles each until it is split."""
    return serial * length / (1.0 + length / split) / device.clock


def beyond(x: Number) -> Number:
    """A smooth max(x, 0): (x + sqrt(x^2 + 0.1))/2."""
    return 0.5 * (x + jnp.sqrt(x * x + 0.1))


# ------------------------------------------------------------------------------------------------- GEMM


@pytree
class GemmCase:
    """m rows through a k x n matrix; outputs in 16 bits."""

    m: Number
    n: Number
    k: Number
    weight_bytes: Number  # an element
    act_bytes: Number
    rate: Number  # index of units.RATES


@pytree
class GemmKernel:
    """Coefficients of one GPU and precision."""

    launch: Number  # s; run-time quantisation of activations is two kernels more
    serial: Number  # cycles an element of k
    split: Number  # k
    peak_share: Number
    half_m: Number  # rows that a partial tile wastes
    half_k: Number  # elements of k that filling and draining a tile costs
    memory_share: Number
    quantise: Number  # passes over the activations to quantise them; about 0 where they stay in 16 bits
    l2_share: Number
    l2_rate: Number


def gemm(c: GemmKernel, case: GemmCase, device: Device, warm: Number = 0.0) -> Number:
    """Seconds: launch + walk(k) + max(compute, bytes/(bandwidth share)) + quantise (2+a)mk/bandwidth.

    compute = 2 (m + half_m) n (k + half_k)/(peak share); bytes = w k n + a m k + 2 m n; the corner of the maximum is
    rounded by `GEMM_CORNER`.
    """
    compute = 2.0 * (case.m + c.half_m) * case.n * (case.k + c.half_k) / (peak(device, case.rate) * c.peak_share)
    moved = case.weight_bytes * case.k * case.n + case.act_bytes * case.m * case.k + 2.0 * case.m * case.n
    memory = stream(moved, c.memory_share, c.l2_share, c.l2_rate, device, warm)
    quantise = c.quantise * (2.0 + case.act_bytes) * case.m * case.k / device.bandwidth
    return c.launch + walk(case.k, c.serial, c.split, device) + smooth_max(compute, memory, GEMM_CORNER) + quantise


# ------------------------------------------------------------------------------------------- routed experts


@pytree
class ExpertsCase:
    """Routed experts on one of `ep` ranks; `tokens` over the whole group.

    `skew` 0: balanced round robin; else expert loads are drawn from a power law of that exponent, and the rank is the
    busiest one.
    """

    tokens: Number
    hidden: Number
    width: Number  # of an expert's slice: inter_size / moe_tp
    matrices: Number  # 3 gated, 2 not
    top_k: Number
    experts: Number
    ep: Number
    skew: Number
    weight_bytes: Number
    act_bytes: Number
    rate: Number


@pytree
class ExpertsKernel:
    """Coefficients of one GPU and precision."""

    launch: Number  # s, with sorting, permuting and finalising
    launch_expert: Number  # s more an expert held
    memory_share: Number
    peak_share: Number
    half_m: Number  # rows wasted in the partial tile of each expert touched
    half_n: Number  # width that a narrow slice wastes
    serial: Number  # cycles an element of both GEMMs' reductions
    serial_full: Number  # more cycles once a block's rows are full ...
    full_rows: Number  # ... half of them at this many rows an expert
    permute: Number  # passes over the activations of all copies
    imbalance: Number  # of the busiest rank, in standard deviations of the mean of its experts' loads


def experts(c: ExpertsKernel, case: ExpertsCase, device: Device) -> Number:
    """Seconds: launches + max(max(compute, weights read once), walk of both reductions) + permute copies/bandwidth.

    compute = 2 M h f touched (rows + half_m)(1 + half_n/f)/(peak share) with rows = copies/touched an expert;
    weights = w M h f touched/(bandwidth share); walk = (serial + serial_full rows/(rows + full_rows)) (h + f) cycles.
    """
    copies, touched = routing(c.imbalance, case)
    rows = copies / touched
    weights = case.matrices * case.hidden * case.width * touched
    full = peak(device, case.rate) * c.peak_share
    compute = 2.0 * weights * (rows + c.half_m) * (1.0 + c.half_n / case.width) / full
    memory = case.weight_bytes * weights / (device.bandwidth * c.memory_share)
    cycles = c.serial + c.serial_full * rows / (rows + c.full_rows)
    serial = cycles * (case.hidden + case.width) / device.clock
    permute = c.permute * copies * (4.0 * case.hidden + 2.0 * case.matrices * case.width) / device.bandwidth
    busy = smooth_max(smooth_max(compute, memory, EXPERT_CORNER), serial, EXPERT_CORNER)
    return c.launch + c.launch_expert * case.experts / case.ep + busy + permute


def routing(imbalance: Number, case: ExpertsCase) -> tuple[Number, Number]:
    """(token copies, distinct experts) on the rank that the benchmark times.

    Round robin: token t takes experts t + i E/k, so a rank meets min(E/ep, T max(1, k/ep)) distinct experts. Power law:
    loads are independent with density x^-skew on [1, 0.8 T] ([0.01, 2] while T k <= E), scaled to T k in sum. The
    busiest of ep means of E/ep such draws exceeds the mean by about cv sqrt(2 ln(ep) ep/E) (extremes of a normal, cv
    the coefficient of variation of one draw), and the experts touched are those whose load rounds to at least one. In
    serving `shard` has its own: uniform 1 - (1 - k/E)^T and a given imbalance.
    """
    tokens, top_k, ep = case.tokens, case.top_k, case.ep
    local = case.experts / ep
    even_touched = jnp.minimum(local, tokens * jnp.maximum(1.0, top_k / ep))
    even_copies = jnp.maximum(tokens * top_k / ep, even_touched)

    many = tokens * top_k > case.experts
    low = jnp.where(many, 1.0, 0.01)
    high = jnp.where(many, jnp.maximum(0.8 * tokens, 1.5), 2.0)
    skewed = case.skew > 0
    a = jnp.where(skewed, case.skew, 1.2)
    whole = _power_integral(-a, low, high)
    mean = _power_integral(1.0 - a, low, high) / whole
    spread = jnp.sqrt(jnp.maximum(_power_integral(2.0 - a, low, high) / whole / mean**2 - 1.0, 1e-6))
    several = jnp.maximum(ep, 1.0 + 1e-6)  # one rank: no busiest one; ln and its root stay finite
    extreme = spread * jnp.sqrt(2.0 * jnp.log(several) * ep / case.experts)
    share = jnp.minimum(1.0 + imbalance * extreme, ep)
    most = tokens * jnp.minimum(top_k, local)
    copies = jnp.minimum(jnp.maximum(tokens * top_k / ep * share, 1.0), most)
    least = jnp.clip(0.5 * case.experts * mean / (tokens * top_k), low, high)
    touched = jnp.maximum(local * _power_integral(-a, least, high) / whole, 1e-3)
    touched = jnp.maximum((touched**-4 + copies**-4) ** -0.25, 1.0)
    return jnp.where(skewed, copies, even_copies), jnp.where(skewed, touched, even_touched)


def _power_integral(p: Number, low: Number, high: Number) -> Number:
    """The integral of x^p from low to high; p = -1 by a neighbour (the logarithm to 1e-3)."""
    q = p + 1.0
    q = jnp.where(jnp.abs(q) < 1e-3, 1e-3, q)
    return (high**q - low**q) / q


__all__ = [
    "ExpertsCase",
    "ExpertsKernel",
    "GemmCase",
    "GemmKernel",
    "beyond",
    "experts",
    "gemm",
    "peak",
    "routing",
    "stream",
    "walk",
]
