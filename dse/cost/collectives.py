"""Collectives on a topology of any number of levels, as straight lines in the message size.

Whatever a plan is, each algorithm of a collective costs `fixed + per_byte * bytes`, where both numbers depend on the
plan and the network only. So the search over algorithms is done on lines, once a plan, and a batch pays one
multiply-add and one minimum an algorithm. Sources: Thakur, Rabenseifner & Gropp 2005 (alpha-beta costs), NCCL 2.30's
tuning model (protocol latencies), DeepEP (deduplicated dispatch). Ignored: contention between groups that share a
link beyond `oversubscription`, and ranks of one group split unevenly over units.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.types import Level, Number, Routed, Topology, pytree
from dse.numerics import ceil_ratio, least, pick


@pytree
class Line:
    """fixed + per_byte * bytes (seconds)."""

    fixed: Number
    per_byte: Number

    def __call__(self, size: Number) -> Number:
        return self.fixed + self.per_byte * size


Lines = tuple[Line, ...]


ABSENT = 1e9  # seconds: an algorithm that this group cannot run


def seconds(lines: Lines, size: Number) -> Number:
    """Least over the algorithms at this message size (bytes).

    A hard minimum: a rounded one would let two equal algorithms, or one that does not exist, cheapen the best.
    """
    return least([line(size) for line in lines])


@pytree
class Group:
    """The shape of a communicator: `n` ranks, of which `within[l]` share one unit of level l (Eq. prod g_l = n)."""

    n: Number
    within: tuple[Number, ...]

    def factors(self) -> list[Number]:
        """g_l: how many units of level l-1 meet at level l. Their product is n."""
        inner = (1.0, *self.within[:-1])
        return [outer / i for outer, i in zip(self.within, inner, strict=True)]


def group(topology: Topology, n: Number, stride: Number) -> Group:
    """The subgroup's shape for n ranks `stride` GPUs apart, balanced over the fewest units at every level."""
    capacity: Number = 1.0
    within = []
    for level in topology.levels:
        capacity = capacity * level.size
        units = jnp.clip(ceil_ratio(n * stride, capacity), 1.0, n)
        within.append(n / units)
    within[-1] = n * jnp.ones_like(within[-1])  # the outermost level holds everything
    return Group(n=n, within=tuple(within))


def bandwidth(level: Level) -> Number:
    return level.bandwidth / level.oversubscription


def _hierarchical(topology: Topology, g: Group, hops: Callable[[Number], Number], hop: Number, share: Number) -> Line:
    """Reduce-scatter (or all-gather) level by level: at level l, g_l units exchange S / within[l-1] bytes.

    sum_l hops(g_l) alpha_l + S/within[l-1] (g_l - 1)/g_l beta_l.
    """
    fixed: Number = 0.0
    per_byte: Number = 0.0
    inner: Number = 1.0
    for level, factor, outer in zip(topology.levels, g.factors(), g.within, strict=True):
        fixed = fixed + hops(factor) * level.latency * hop
        per_byte = per_byte + (factor - 1.0) / (factor * inner) / (bandwidth(level) * share)
        inner = outer
    return Line(fixed=fixed, per_byte=per_byte)


def _only_if(n: Number, base: Number) -> Number:
    """A base latency that a group of one does not pay."""
    return jnp.where(n > 1, base, 0.0)


def _scatter_lines(topology: Topology, g: Group, c: Coefficients, passes: float) -> list[Line]:
    """Ring (Simple) and recursive halving/doubling (LL), `passes` 1 for a reduce-scatter or all-gather, 2 for both."""
    ring = _hierarchical(topology, g, lambda f: f - 1.0, c.hop_simple, c.link_simple)
    doubling = _hierarchical(topology, g, jnp.log2, c.hop_ll, c.link_ll)
    base = _only_if(g.n, c.collective_base)
    simple = _only_if(g.n, c.collective_base + c.collective_simple)
    return [
        Line(fixed=simple + passes * ring.fixed, per_byte=passes * ring.per_byte),
        Line(fixed=base + passes * doubling.fixed, per_byte=passes * doubling.per_byte),
    ]


def _top_latency(topology: Topology, g: Group) -> Number:
    """Latency of crossing every level the group uses once."""
    total: Number = 0.0
    for level, factor in zip(topology.levels, g.factors(), strict=True):
        total = total + jnp.where(factor > 1, level.latency, 0.0)
    return total


def _flat_bytes(topology: Topology, g: Group, share: Number) -> Number:
    """Seconds a byte of a uniform all-to-all: level 1 carries what stays inside, level l what leaves a unit of l-1.

    max_l of (within[l] - within[l-1])/n beta_1 at l = 1 and (n - within[l-1])/n beta_l beyond (levels run at once).
    """
    worst: Number = 0.0
    inner: Number = 1.0
    for i, (level, outer) in enumerate(zip(topology.levels, g.within, strict=True)):
        leaving = (outer if i == 0 else g.n) - inner
        worst = jnp.maximum(worst, leaving / g.n / (bandwidth(level) * share))
        inner = outer
    return worst


def all_reduce(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """Hierarchical ring and doubling; inside level 1 also one-shot (every rank reads all: n S bytes) and, where the
    switch reduces, multicast (S (1 + 1/n) bytes).

    `bytes` is the whole buffer S.
    """
    first = topology.levels[0]
    outside = jnp.where(g.within[0] < g.n, ABSENT, 0.0)  # one-shot needs all ranks under one switch
    busy = bandwidth(first) * c.link_simple
    one_shot = Line(
        fixed=_only_if(g.n, c.one_shot_base + 2.0 * c.hop_ll * first.latency) + outside,
        per_byte=(g.n - 1.0) / busy,
    )
    absent = outside + jnp.where(topology.multicast > 0, 0.0, ABSENT) * jnp.where(g.n > 1, 1.0, 0.0)
    multicast = Line(fixed=_only_if(g.n, c.multicast_base) + absent, per_byte=_only_if(g.n, (1.0 + 1.0 / g.n) / busy))
    return (*_scatter_lines(topology, g, c, passes=2.0), one_shot, multicast)


def all_gather(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """`bytes`: the whole gathered buffer. A reduce-scatter costs the same, mirrored."""
    return tuple(_scatter_lines(topology, g, c, passes=1.0))


def all_to_all(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """`bytes`: what one rank sends. Flat (levels at once), hierarchical pairwise, Bruck (log2 n steps of S/2)."""
    base = _only_if(g.n, c.collective_base)
    simple = _only_if(g.n, c.collective_base + c.collective_simple)
    flat = Line(
        fixed=simple + _top_latency(topology, g) * c.hop_simple,
        per_byte=_flat_bytes(topology, g, c.link_simple),
    )
    fixed, per_byte, bruck = simple, 0.0, 0.0
    for level, factor in zip(topology.levels, g.factors(), strict=True):
        beta = 1.0 / (bandwidth(level) * c.link_simple)
        fixed = fixed + (factor - 1.0) * level.latency * c.hop_ll
        per_byte = per_byte + (factor - 1.0) / factor * beta
        bruck = bruck + jnp.log2(factor) * 0.5 / (bandwidth(level) * c.link_ll)
    doubling = _hierarchical(topology, g, jnp.log2, c.hop_ll, c.link_ll)
    return (flat, Line(fixed=fixed, per_byte=per_byte), Line(fixed=base + doubling.fixed, per_byte=bruck))


def point_to_point(topology: Topology, g: Group, c: Coefficients) -> Line:
    """One neighbour to the next in a group; the slowest level that the group crosses sets the pace."""
    per_byte: Number = 0.0
    for level, factor in zip(topology.levels, g.factors(), strict=True):
        per_byte = jnp.maximum(per_byte, jnp.where(factor > 1, 1.0 / (bandwidth(level) * c.link_simple), 0.0))
    return Line(fixed=_only_if(g.n, c.collective_base) + _top_latency(topology, g) * c.hop_simple, per_byte=per_byte)


def distinct(places: Number, choices: Number) -> Number:
    """Expected distinct places among `places` hit by `choices` uniform choices: p (1 - (1 - 1/p)^k); 1 for p = 1."""
    miss = jnp.where(places > 1, 1.0 - 1.0 / jnp.maximum(places, 1.0 + 1e-6), 0.0)
    safe = jnp.where(miss > 0, miss, 1.0)
    return places * (1.0 - jnp.where(miss > 0, safe**choices, 0.0))


def dispatch(topology: Topology, g: Group, routed: Routed, mode: Number, token_bytes: Number, c: Coefficients) -> Line:
    """MoE dispatch (or combine, its mirror image) of tokens of `token_bytes`, as a line in tokens a rank sends.

    flat: k copies a token; rank_dedup: one copy a destination rank; node_dedup: one copy a node over the network, then
    copies to ranks over level 1 (both at once); node_limited: the same with at most `group_limit` nodes a token. The
    fastest for long messages is taken under `auto` (node-limited routing only where the model routes so).
    """
    nodes = g.n / g.within[0]
    to_ranks = distinct(g.n, routed.top_k)

    def by_node(limit: Number) -> Number:
        m = jnp.minimum(limit, nodes)
        forward = to_ranks * (g.within[0] - 1.0) / g.within[0] / (bandwidth(topology.levels[0]) * c.link_simple)
        worst = forward
        for level, inner in zip(topology.levels[1:], g.within[:-1], strict=True):
            units = g.n / inner
            leaving = distinct(jnp.minimum(m, units), routed.top_k) * (units - 1.0) / units
            worst = jnp.maximum(worst, leaving / (bandwidth(level) * c.link_simple))
        return worst

    flat = _flat_bytes(topology, g, c.link_simple)
    limit = jnp.where(routed.group_limit > 0, routed.group_limit, 1e9)
    options = [routed.top_k * flat, to_ranks * flat, by_node(jnp.asarray(1e9)), by_node(limit)]
    per_byte = pick(mode, [least(options), *options])
    fixed = _only_if(g.n, c.all_to_all_base) + _top_latency(topology, g)
    return Line(fixed=fixed, per_byte=per_byte * token_bytes)


__all__ = [
    "Group",
    "Line",
    "Lines",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "dispatch",
    "distinct",
    "group",
    "point_to_point",
    "seconds",
]
