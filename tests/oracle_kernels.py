"""Kernel times in plain Python, one case at a time, written from the docstrings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, float]


def rounded_max(a: float, b: float, r: float) -> float:
    return (a + b + math.sqrt((a - b) ** 2 + 4 * r * r * a * b)) / 2


def positive_part(x: float) -> float:
    return (x + math.sqrt(x * x + 0.1)) / 2


def peak(device: Any, rate: float) -> float:
    return (device.peak_bf16, device.peak_fp8, device.peak_fp4, device.peak_int8)[int(rate)] or device.peak_bf16


def moved(size: float, c: Numbers, device: Any, warm: float) -> float:
    from_memory = size / (device.bandwidth * c["memory_share"])
    from_cache = min(from_memory, size / (c["l2_rate"] * device.sms * device.clock))
    hit = warm / (1 + (size / (c["l2_share"] * device.l2)) ** 4)
    return (1 - hit) * from_memory + hit * from_cache


def walk(n: float, serial: float, split: float, device: Any) -> float:
    return serial * n * split / (split + n) / device.clock


def gemm(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    m, n, k, a = x["m"], x["n"], x["k"], x["act_bytes"]
    compute = 2 * (m + c["half_m"]) * n * (k + c["half_k"]) / peak(device, x["rate"]) / c["peak_share"]
    memory = moved(x["weight_bytes"] * k * n + a * m * k + 2 * m * n, c, device, warm)
    quantise = c["quantise"] * (2 + a) * m * k / device.bandwidth
    return c["launch"] + walk(k, c["serial"], c["split"], device) + rounded_max(compute, memory, 0.2) + quantise


def pairs(tokens: float, cached: float, window: float) -> float:
    """(Query, key) pairs, the mean query t standing at cached + t: an integral in three exact pieces."""
    if window == 0 or window >= tokens + cached:
        return tokens * cached + tokens**2 / 2
    growing = max(0.0, window - cached)  # queries that still see everything
    return growing * cached + growing**2 / 2 + (tokens - growing) * window


def context_attention(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    b, h, d, t = x["batch"], x["heads"], x["head_dim"], x["tokens"]
    total = t + x["cached"]
    windowed = 0 < x["window"] < total
    extra = c["half_k"] / 2 + (c["window_edge"] if windowed else 0)
    share = c["peak_share"] * (d / 128) ** (c["narrow_power"] if d < 128 else c["wide_power"])
    work = 4 * b * h * d * (pairs(t, x["cached"], x["window"]) + extra * t)
    compute = work / peak(device, x["rate"]) / share
    size = 4 * c["query_passes"] * b * t * h * d + (4 + 2 * x["kv_bytes"]) * b * total * x["kv_heads"] * d
    waves = c["wave"] * positive_part(b * h / device.sms - 1) / device.clock
    launch = c["launch"] + (c["launch_narrow"] if d < 100 else 0) + (c["launch_wide"] if d > 150 else 0)
    busy = rounded_max(rounded_max(compute, moved(size, c, device, warm), c["corner"]), waves, c["corner"])
    return launch + walk(x["window"] if windowed else total, c["serial"], c["split"], device) + busy


def generation_attention(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    b, h, kv, d = x["batch"], x["heads"], x["kv_heads"], x["head_dim"]
    length = x["cached"] + x["tokens"]
    keys = min(length, x["window"]) if x["window"] > 0 else length
    ratio = h / kv
    few = 4 * b * kv * max(1, length // 128) < c["plain_below"] * device.sms
    plain = ratio < 1.5 or ratio > 40 or few
    size = 2 * b * kv * keys * d * x["kv_bytes"] * (1 if plain else c["bytes_share"]) + 4 * b * h * d
    compute = 4 * b * h * keys * d / (c["plain_flops" if plain else "flops"] * device.sms * device.clock)
    height = (d + c["head_dim"]) / (128 + c["head_dim"])
    if plain:
        launch, serial, split = c["plain_launch"], c["plain_serial"], c["plain_split"]
        wave, blocks = c["plain_wave"], b * h / c["plain_resident"]
    else:
        launch = c["launch"] + (c["launch_narrow"] if d <= 64 else 0) + c["launch_grouped"] * (ratio / 32) ** 2
        serial, split = c["serial"], c["split"]
        added = b * kv * positive_part(length / c["split_keys"] - 1)
        added = added / (1 + added / c["most_splits"] / device.sms)
        wave, blocks = c["wave"] * (1 + (ratio / c["wave_ratio"]) ** 2), (b * kv + added) / c["resident"]
    waves = wave / device.clock * positive_part(blocks / device.sms - 1) * height
    busy = rounded_max(rounded_max(compute, moved(size, c, device, warm), c["corner"]), waves, c["wave_corner"])
    return launch + walk(keys, serial, split, device) * height + busy


def context_mla(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    b, h, t = x["batch"], x["heads"], x["tokens"]
    total = t + x["cached"]
    compute = 2 * b * h * 320 * (pairs(t, x["cached"], 0) + c["half_k"] / 2 * t)
    compute /= peak(device, x["rate"]) * c["peak_share"]
    size = b * (640 * h * (t + total) + 576 * t * (2 + x["kv_bytes"]))
    waves = c["wave"] * positive_part(b * h / device.sms - 1) / device.clock
    busy = rounded_max(rounded_max(compute, moved(size, c, device, warm), c["corner"]), waves, c["corner"])
    return c["launch"] + walk(total, c["serial"], c["split"], device) + busy


def generation_mla(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    b, h, s = x["batch"], x["heads"], x["cached"] + x["tokens"]
    compute = 2 * b * (h + c["idle_heads"]) * 1088 * s / peak(device, x["rate"]) / c["peak_share"]
    memory = moved(b * s * 576 * x["kv_bytes"] + 2 * c["query_passes"] * b * h * 1088, c, device, warm)
    waves = c["wave"] * positive_part(b * (1 + h / c["wave_heads"]) / device.sms - 1) / device.clock
    busy = rounded_max(compute, memory, c["corner"])
    busy = rounded_max(busy, walk(s, c["serial"], c["split"], device), c["wave_corner"])
    return c["launch"] + rounded_max(busy, waves, c["wave_corner"])


def integral(power: float, low: float, high: float) -> float:
    return (high ** (power + 1) - low ** (power + 1)) / (power + 1)


def routing(imbalance: float, x: Numbers) -> tuple[float, float]:
    t, k, e, ep, a = x["tokens"], x["top_k"], x["experts"], x["ep"], x["skew"]
    local = e / ep
    if a == 0:
        touched = min(local, t * max(1, k / ep))
        return max(t * k / ep, touched), touched
    low, high = (1.0, max(0.8 * t, 1.5)) if t * k > e else (0.01, 2.0)
    whole = integral(-a, low, high)
    mean = integral(1 - a, low, high) / whole
    variance = integral(2 - a, low, high) / whole - mean**2
    busiest = 1.0
    if ep > 1:
        deviation = math.sqrt(max(variance / mean**2, 1e-6) / local)  # of the mean of a rank's experts
        busiest = min(ep, 1 + imbalance * deviation * math.sqrt(2 * math.log(ep)))
    copies = min(max(t * k / ep * busiest, 1), t * min(k, local))
    least = min(max(0.5 * e * mean / (t * k), low), high)
    touched = max(local * integral(-a, least, high) / whole, 1e-3)
    return copies, max((touched**-4 + copies**-4) ** -0.25, 1)


def moe(c: Numbers, x: Numbers, device: Any, warm: float) -> float:
    copies, touched = routing(c["imbalance"], x)
    h, f, mats = x["hidden"], x["width"], x["matrices"]
    rows = copies / touched
    compute = 2 * mats * h * f * touched * (rows + c["half_m"]) * (1 + c["half_n"] / f)
    compute /= peak(device, x["rate"]) * c["peak_share"]
    memory = x["weight_bytes"] * mats * h * f * touched / device.bandwidth / c["memory_share"]
    cycles = c["serial"] + c["serial_full"] * rows / (rows + c["full_rows"])
    busy = rounded_max(rounded_max(compute, memory, 0.8), cycles * (h + f) / device.clock, 0.8)
    permute = c["permute"] * copies * (4 * h + 2 * mats * f) / device.bandwidth
    return c["launch"] + c["launch_expert"] * x["experts"] / x["ep"] + busy + permute


FORMULAS = {
    "gemm": gemm,
    "context_attention": context_attention,
    "generation_attention": generation_attention,
    "context_mla": context_mla,
    "generation_mla": generation_mla,
    "moe": moe,
}
