"""Collectives of the oracle: a group's ranks laid on the levels one by one, every algorithm timed on its own bytes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

DISPATCHES = ("auto", "flat", "rank_dedup", "node_dedup", "node_limited")


def larger(a: float, b: float, rounding: float | None) -> float:
    """The larger root x of (x - a)(x - b) = r^2 a b: max(a, b) with a rounded corner."""
    if rounding is None:
        return max(a, b)
    return (a + b + math.sqrt((a - b) ** 2 + 4 * rounding**2 * a * b)) / 2


def shape(topology: Any, n: float, stride: float) -> list[Any]:
    """At each level: how many sub-units meet (`meet`), ranks below (`inner`), up to here (`outer`), and the link."""
    ranks, reach = round(n), round(n * stride)
    rows, unit, inner = [], 1, 1.0
    for i, level in enumerate(topology.levels):
        unit *= round(level.size)
        units = min(max(math.ceil(reach / unit), 1), ranks)
        if i == len(topology.levels) - 1:
            units = 1
        outer = ranks / units
        rows.append(
            SimpleNamespace(
                meet=outer / inner,
                inner=inner,
                outer=outer,
                latency=level.latency,
                link=level.bandwidth / level.oversubscription,
            )
        )
        inner = outer
    return rows


def ranks_of(levels: list[Any]) -> float:
    return levels[-1].outer


def crossing(levels: list[Any]) -> float:
    return sum(level.latency for level in levels if level.meet > 1)


def scatter(levels: list[Any], size: float, ring: bool, c: Any) -> float:
    """A reduce-scatter of `size` bytes, level by level inside out, each on what the one below has left."""
    total, left = 0.0, size
    for level in levels:
        g = level.meet
        hops = g - 1 if ring else math.log2(g)
        alpha = level.latency * (c.hop_simple if ring else c.hop_ll)
        link = level.link * (c.link_simple if ring else c.link_ll)
        total += hops * alpha + left * (g - 1) / g / link
        left /= g
    return total


def all_gather(levels: list[Any], size: float, c: Any) -> float:
    """The same as a reduce-scatter, mirrored."""
    if ranks_of(levels) == 1:
        return 0.0
    ring = c.collective_base + c.collective_simple + scatter(levels, size, True, c)
    doubling = c.collective_base + scatter(levels, size, False, c)
    return min([ring, doubling])


def all_reduce(levels: list[Any], size: float, multicast: bool, c: Any) -> float:
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    ring = c.collective_base + c.collective_simple + 2 * scatter(levels, size, True, c)
    doubling = c.collective_base + 2 * scatter(levels, size, False, c)
    times = [ring, doubling]
    if levels[0].outer == n:  # all under one switch
        link = levels[0].link * c.link_simple
        times.append(c.one_shot_base + 2 * c.hop_ll * levels[0].latency + (n - 1) * size / link)
        if multicast:
            times.append(c.multicast_base + (1 + 1 / n) * size / link)
    return min(times)


def all_to_all(levels: list[Any], size: float, c: Any) -> float:
    """`size`: what one rank sends, its own share included."""
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    slowest, pairwise, bruck = 0.0, 0.0, 0.0
    for i, level in enumerate(levels):
        reached = level.outer if i == 0 else n
        slowest = max(slowest, size * (reached - level.inner) / n / (level.link * c.link_simple))
        pairwise += (level.meet - 1) * level.latency * c.hop_ll
        pairwise += size * (level.meet - 1) / level.meet / (level.link * c.link_simple)
        bruck += math.log2(level.meet) * (level.latency * c.hop_ll + size / 2 / (level.link * c.link_ll))
    simple = c.collective_base + c.collective_simple
    return min([simple + crossing(levels) * c.hop_simple + slowest, simple + pairwise, c.collective_base + bruck])


def point_to_point(levels: list[Any], size: float, c: Any) -> float:
    if ranks_of(levels) == 1:
        return 0.0
    slowest = min(level.link for level in levels if level.meet > 1)
    return c.collective_base + crossing(levels) * c.hop_simple + size / (slowest * c.link_simple)


def places_hit(places: float, choices: float) -> float:
    """Expected distinct places that uniform choices hit."""
    return places * (1 - (1 - 1 / places) ** choices)


def dispatch(levels: list[Any], tokens: float, routed: Any, mode: int, token_bytes: float, c: Any) -> float:
    """Tokens of one rank to their experts: bytes that each level carries, the slowest level decides."""
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    k, first = routed.top_k, levels[0]
    sent = tokens * token_bytes

    def at(level: Any, copies: float) -> float:
        return sent * copies / (level.link * c.link_simple)

    def to_ranks(copies: float) -> float:
        """Each copy goes straight to its rank, evenly spread over all n."""
        inside = at(first, copies * (first.outer - 1) / n)
        return max([inside] + [at(level, copies * (n - level.inner) / n) for level in levels[1:]])

    def to_units(limit: float) -> float:
        """One copy to each unit hit, and from there over the first level to the ranks."""
        slowest = at(first, places_hit(n, k) * (first.outer - 1) / first.outer)
        for level in levels[1:]:
            units = n / level.inner
            hit = places_hit(min(limit, n / first.outer, units), k)
            slowest = max(slowest, at(level, hit * (units - 1) / units))
        return slowest

    ways = {
        "flat": to_ranks(k),
        "rank_dedup": to_ranks(places_hit(n, k)),
        "node_dedup": to_units(math.inf),
        "node_limited": to_units(routed.group_limit if routed.group_limit > 0 else math.inf),
    }
    name = DISPATCHES[mode]
    time = min(ways.values()) if name == "auto" else ways[name]
    return c.all_to_all_base + crossing(levels) + time
