"""Collectives of the oracle: a group's ranks laid on the levels one by one, every algorithm timed on its own bytes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

ROUND = 0.2  # how far copying by SMs and links, or casting and links, are from overlapping wholly
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
                ways=inner if level.rails > 0 else 1.0,
            )
        )
        inner = outer
    return rows


def ranks_of(levels: list[Any]) -> float:
    return levels[-1].outer


def crossing(levels: list[Any]) -> float:
    return sum(level.latency for level in levels if level.meet > 1)


def moved(levels: list[Any], share: float, c: Any) -> list[float]:
    """Bytes/s of each level: what leaves the innermost one has a share of its own."""
    return [level.link * share * (1.0 if i == 0 else c.link_network) for i, level in enumerate(levels)]


def scatter(levels: list[Any], size: float, protocol: str, c: Any) -> float:
    """A reduce-scatter of `size` bytes, level by level inside out, each on what the one below has left.

    Where a level has no rails, one flow of each unit carries all of it.
    """
    share = {"simple": c.link_simple, "ll128": c.link_ll128, "ll": c.link_ll}[protocol]
    total = 0.0
    for level, link in zip(levels, moved(levels, share, c), strict=True):
        g = level.meet
        ring = (g - 1) * {"simple": c.hop_simple, "ll128": c.hop_ll128, "ll": c.hop_ll}[protocol]
        hops = min(ring, math.log2(g) * c.hop_tree) if protocol == "ll" else ring
        total += hops * level.latency + size / level.ways * (g - 1) / g / link
    return total


def protocols(levels: list[Any], size: float, passes: int, own: float, c: Any) -> list[float]:
    """Simple, with the rank's own part copied; LL128; LL."""
    copied = size / ranks_of(levels) * own / (levels[0].link * c.link_simple)
    return [
        c.collective_base + c.collective_simple + passes * scatter(levels, size, "simple", c) + copied,
        c.collective_base + c.collective_ll128 + passes * scatter(levels, size, "ll128", c),
        c.collective_base + passes * scatter(levels, size, "ll", c),
    ]


def all_gather(levels: list[Any], size: float, c: Any) -> float:
    """The same as a reduce-scatter, mirrored."""
    if ranks_of(levels) == 1:
        return 0.0
    return min(protocols(levels, size, 1, c.own_copy, c))


def all_reduce(levels: list[Any], size: float, multicast: bool, c: Any) -> float:
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    times = protocols(levels, size, 2, 0.0, c)
    if levels[0].outer == n:  # all under one switch
        link = levels[0].link
        barriers = 2 * c.hop_ll * levels[0].latency + (n - 1) * c.one_shot_peer
        times.append(c.one_shot_base + barriers + (n - 1) * size / (link * c.link_one_shot))
        if multicast:
            times.append(c.multicast_base + (1 + 1 / n) * size / (link * c.link_multicast))
    return min(times)


def all_to_all(levels: list[Any], size: float, c: Any) -> float:
    """`size`: what one rank sends, its own share included."""
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    links, links_ll = moved(levels, c.link_simple, c), moved(levels, c.link_ll, c)
    slowest, pairwise, bruck = 0.0, 0.0, size / n * c.channel_ll
    for i, level in enumerate(levels):
        reached = level.outer if i == 0 else n
        slowest = max(slowest, size * (reached - level.inner) / n / links[i])
        pairwise += (level.meet - 1) * level.latency * c.hop_ll
        pairwise += size * (level.meet - 1) / level.meet / links[i]
        bruck += math.log2(level.meet) * (level.latency * c.hop_ll + size / 2 / links_ll[i])
    simple = c.all_to_all_base + c.all_to_all_simple + size / n * c.own_copy / links[0]
    return min([simple + crossing(levels) * c.hop_simple + slowest, simple + pairwise, c.all_to_all_base + bruck])


def point_to_point(levels: list[Any], size: float, c: Any) -> float:
    if ranks_of(levels) == 1:
        return 0.0
    links = moved(levels, c.link_simple, c)
    slowest = min(link for link, level in zip(links, levels, strict=True) if level.meet > 1)
    return c.all_to_all_base + crossing(levels) * c.hop_simple + size / slowest


def places_hit(places: float, choices: float) -> float:
    """Expected distinct places that uniform choices hit."""
    return places * (1 - (1 - 1 / places) ** choices)


def exchange(levels: list[Any], tokens: float, routed: Any, mode: int, token_bytes: float, back: bool, c: Any) -> float:
    """Tokens of one rank to their experts, or (`back`) their outputs home: the faster of DeepEP's two modes."""
    n = ranks_of(levels)
    if n == 1:
        return 0.0
    k, first = routed.top_k, levels[0]
    sent = tokens * token_bytes

    def at(i: int, copies: float, inside: float) -> float:
        share = inside if i == 0 else c.link_simple * c.link_network
        return sent * copies / (levels[i].link * share)

    def to_ranks(copies: float, share: float) -> float:
        """Each copy goes straight to its rank, evenly spread over all n."""
        inside = at(0, copies * (first.outer - 1) / n, share)
        beyond = [at(i, copies * (n - level.inner) / n, share) for i, level in enumerate(levels) if i > 0]
        return max([inside, *beyond])

    def to_units(limit: float) -> float:
        """One copy to each unit hit, and from there over the first level to the ranks."""
        slowest = at(0, places_hit(n, k) * (first.outer - 1) / first.outer, c.link_dispatch)
        for i, level in enumerate(levels[1:], start=1):
            units = n / level.inner
            hit = places_hit(min(limit, n / first.outer, units), k)
            slowest = max(slowest, at(i, hit * (units - 1) / units, c.link_dispatch))
        return slowest

    ways = {
        "flat": to_ranks(k, c.link_dispatch),
        "rank_dedup": to_ranks(places_hit(n, k), c.link_dispatch),
        "node_dedup": to_units(math.inf),
        "node_limited": to_units(routed.group_limit if routed.group_limit > 0 else math.inf),
    }
    name = DISPATCHES[mode]
    wire = min(ways.values()) if name == "auto" else ways[name]
    copies = larger(places_hit(n, k), c.combine_least if back else c.dispatch_least, ROUND)
    hands = sent * copies * (c.combine_copy if back else c.dispatch_copy) / c.dispatch_sms
    start = crossing(levels) + (c.combine_base + c.combine_token * token_bytes if back else c.dispatch_base)
    times = [start + c.dispatch_fill + larger(hands, wire, ROUND), start + hands + wire]
    if name in ("auto", "flat"):
        direct = to_ranks(k, c.link_low_combine if back else c.link_low_dispatch)
        ready = 0.0 if back else tokens * c.low_latency_token / min(max(routed.experts, 1), 128)
        each = k * c.low_latency_copy if back else routed.experts * c.low_latency_expert
        times.append(c.low_latency_base + each + crossing(levels) + larger(ready, direct, ROUND))
    return min(times)
