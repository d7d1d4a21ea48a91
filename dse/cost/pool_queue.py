"""The way of a request through split pools in closed form: the wait, the transfer, Little's law, the best ratio."""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Number, pytree


@pytree
class Journey:
    """What a request of one (prefill plan, decode plan, workers) meets, all that N does not change. Seconds."""

    idle: Number
    busy: Number
    service: Number
    servers: Number  # attention-DP ranks of the prefill pool
    fixed: Number  # arrival overhead, latency of the transfer, first decode step
    travel: Number  # the whole cache over the link
    layers: Number
    layerwise: Number
    first_wave: Number  # weight of the first wave of N prompts at once


def exposed(j: Journey, prefill: Number) -> Number:
    """Seconds from the end of prefill to the last byte: all of it, or layer by layer what does not fit behind the rest.

    Layer by layer: max(t/L, t - prefill (L-1)/L) of the transfer time t.
    """
    rest = jnp.maximum(j.travel / j.layers, j.travel - prefill * (j.layers - 1.0) / j.layers)
    return jnp.where(j.layerwise > 0, rest, j.travel)


def computed(j: Journey, rate: Number) -> Number:
    """Seconds of a prompt's own steps: other ranks are as busy as the pool."""
    return j.idle + jnp.minimum(rate * j.service / j.servers, 1.0) * (j.busy - j.idle)


def waiting(rate: Number, service: Number, servers: Number) -> Number:
    """Mean wait before `servers` ranks of a constant service time behind one balanced queue (M/D/c).

    S/(2c) rho^(sqrt(2(c+1))-1)/(1-rho) (Sakasegawa 1977; exact for one server). Finite at rho = 1: a closed loop never
    waits that long, and `in_flight` says how long.
    """
    rho = jnp.minimum(rate * service / servers, 1.0 - 1e-9)
    return 0.5 * service / servers * rho ** (jnp.sqrt(2.0 * (servers + 1.0)) - 1.0) / (1.0 - rho)


def in_flight(j: Journey, rate: Number, decoding: Number) -> tuple[Number, Number]:
    """(N, TTFT) at `rate` requests/s with `decoding` requests in the decode pool, below the prefill pool's rate.

    N = X TTFT(N) + decoding, with TTFT(N) = fixed + prompt + f S/2 max(N/c - 1, 0) + (1-f) min(W, S (N-1)/(2c)): the
    first wave's mean place in line by its weight f, else the queue's wait, which the N - 1 others bound. Each branch is
    a line in N with slope below one, so the solution is the larger over the max of the smaller over the min.
    """
    c, f = j.servers, j.first_wave
    prefill = computed(j, rate)
    base = j.fixed + prefill + exposed(j, prefill)
    half = 0.5 * j.service / c
    wait = (1.0 - f) * waiting(rate, j.service, c)

    def solve(burst: float) -> Number:
        start = base - burst * f * half * c
        slope = rate * burst * f * half
        bound = rate * (1.0 - f) * half
        queued = (rate * (start + wait) + decoding) / (1.0 - slope)
        bounded = (rate * (start - (1.0 - f) * half) + decoding) / (1.0 - slope - bound)
        return jnp.minimum(queued, bounded)

    n = jnp.maximum(solve(0.0), solve(1.0))
    return n, (n - decoding) / rate


def best_ratio(
    prefill_rate: Number, decode_rate: Number, prefill_gpus: Number, decode_gpus: Number, budget: Number, most: int = 64
) -> tuple[Number, Number, Number]:
    """Workers (prefill, decode) with the most requests/s a GPU within `budget` GPUs, and that rate.

    Rates in requests/s of one worker, GPUs of one worker; leaves broadcast. All pairs of 1..most workers are tried;
    ties go to fewer GPUs. Rate 0 where not even one worker of each fits.
    """
    counts = jnp.arange(1, most + 1, dtype=jnp.result_type(float))
    arrays = jnp.broadcast_arrays(prefill_rate, decode_rate, prefill_gpus, decode_gpus, budget)
    rp, rd, gp, gd, limit = (jnp.asarray(a)[..., None, None] for a in arrays)
    p, d = counts[:, None], counts[None, :]
    gpus = p * gp + d * gd
    rate = jnp.where(gpus <= limit, jnp.minimum(p * rp, d * rd) / gpus, 0.0)
    rate = rate.reshape(*rate.shape[:-2], -1)
    fewest = jnp.broadcast_to(gpus, (*arrays[0].shape, most, most)).reshape(rate.shape)
    top = rate.max(axis=-1, keepdims=True)
    place = jnp.argmin(jnp.where(rate >= top * (1.0 - 1e-6), fewest, jnp.inf), axis=-1)
    return counts[place // most], counts[place % most], top[..., 0]


__all__ = ["Journey", "best_ratio", "computed", "exposed", "in_flight", "waiting"]
