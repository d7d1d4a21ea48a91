"""Collectives on a topology of any number of levels, as straight lines in the message size.

Whatever a plan is, each algorithm of a collective costs `fixed + per_byte * bytes`, where both numbers depend on the
plan and the network only. So the search over algorithms is done on lines, once a plan, and a batch pays one
multiply-add and one minimum an algorithm. Sources: Thakur, Rabenseifner & Gropp 2005 (alpha-beta costs), NCCL 2.30's
tuning model (its protocols LL, LL128 and Simple, ring and tree, NVLS), DeepEP (deduplicated dispatch, copies by SMs,
low-latency mode). Ignored: contention between groups that share a link beyond `oversubscription`, and ranks of one
group split unevenly over units.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.types import Level, Number, Routed, Topology, pytree
from dse.numerics import ceil_ratio, least, pick, smooth_max


@pytree
class Line:
    """fixed + per_byte * bytes (seconds)."""

    fixed: Number
    per_byte: Number

    def __call__(self, size: Number) -> Number:
        return self.fixed + self.per_byte * size


Lines = tuple[Line, ...]


ABSENT = 1e9  # seconds: an algorithm that this group cannot run
CORNER = 0.2  # rounding where SMs copy while links carry (DeepEP tables by SMs: up to 10% above the slower one)
LOW_LATENCY_SMS = 128.0  # experts that have an SM to themselves


def seconds(lines: Lines, size: Number) -> Number:
    """Least over the algorithms at this message size (bytes).

    A hard minimum: a rounded one would let two equal algorithms, or one that does not exist, cheapen the best.
    """
    return least([line(size) for line in lines])


@pytree
class Fastest:
    """The fastest of several algorithms at each size."""

    lines: Lines

    def __call__(self, size: Number) -> Number:
        return seconds(self.lines, size)


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


def _busy(topology: Topology, share: Number, c: Coefficients) -> list[Number]:
    """Bytes/s that each level really moves: `share` of an innermost link, `link_network` times that share beyond."""
    first, *beyond = [bandwidth(level) * share for level in topology.levels]
    return [first, *[rate * c.link_network for rate in beyond]]


def _hierarchical(topology: Topology, g: Group, hops: Callable[[Number], Number], rates: list[Number]) -> Line:
    """Reduce-scatter (or all-gather) level by level: at level l, g_l units exchange S / within[l-1] bytes.

    sum_l hops(g_l) alpha_l + S/within[l-1] (g_l - 1)/g_l beta_l. Where a level has no rails, one flow carries the ring
    out of a unit, however many ranks it holds: S (g_l - 1)/g_l beta_l.
    """
    fixed: Number = 0.0
    per_byte: Number = 0.0
    inner: Number = 1.0
    for level, rate, factor, outer in zip(topology.levels, rates, g.factors(), g.within, strict=True):
        fixed = fixed + hops(factor) * level.latency
        ways = jnp.where(level.rails > 0, inner, 1.0)
        per_byte = per_byte + (factor - 1.0) / (factor * ways) / rate
        inner = outer
    return Line(fixed=fixed, per_byte=per_byte)


def _only_if(n: Number, base: Number) -> Number:
    """A base latency that a group of one does not pay."""
    return jnp.where(n > 1, base, 0.0)


def _scatter_lines(topology: Topology, g: Group, c: Coefficients, passes: float, own: Number) -> list[Line]:
    """The three protocols, `passes` 1 for a reduce-scatter or all-gather, 2 for both.

    Simple and LL128 run as rings; LL as a ring or by recursive halving and doubling, whichever has the shorter way at
    each level. `own`: share of a link's time a byte of the rank's own S/n, which it copies locally.
    """

    def ring(hop: Number, share: Number) -> Line:
        return _hierarchical(topology, g, lambda f: (f - 1.0) * hop, _busy(topology, share, c))

    def shorter(f: Number) -> Number:
        return jnp.minimum((f - 1.0) * c.hop_ll, jnp.log2(f) * c.hop_tree)

    copy = _only_if(g.n, own / g.n / (bandwidth(topology.levels[0]) * c.link_simple))
    protocols = (
        (ring(c.hop_simple, c.link_simple), c.collective_simple, copy),
        (ring(c.hop_ll128, c.link_ll128), c.collective_ll128, 0.0),
        (_hierarchical(topology, g, shorter, _busy(topology, c.link_ll, c)), 0.0, 0.0),
    )
    return [
        Line(
            fixed=_only_if(g.n, c.collective_base + extra) + passes * line.fixed,
            per_byte=passes * line.per_byte + more,
        )
        for line, extra, more in protocols
    ]


def _top_latency(topology: Topology, g: Group) -> Number:
    """Latency of crossing every level the group uses once."""
    total: Number = 0.0
    for level, factor in zip(topology.levels, g.factors(), strict=True):
        total = total + jnp.where(factor > 1, level.latency, 0.0)
    return total


def _flat_bytes(topology: Topology, g: Group, rates: list[Number]) -> Number:
    """Seconds a byte of a uniform all-to-all: level 1 carries what stays inside, level l what leaves a unit of l-1.

    max_l of (within[l] - within[l-1])/n beta_1 at l = 1 and (n - within[l-1])/n beta_l beyond (levels run at once).
    """
    worst: Number = 0.0
    inner: Number = 1.0
    for i, (rate, outer) in enumerate(zip(rates, g.within, strict=True)):
        leaving = (outer if i == 0 else g.n) - inner
        worst = jnp.maximum(worst, leaving / g.n / rate)
        inner = outer
    return worst


def nccl_all_reduce(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """NCCL's: Simple, LL128, LL and, where the switch under all ranks reduces, multicast (NVLS, S (1 + 1/n) bytes).

    `bytes` is the whole buffer S.
    """
    busy = bandwidth(topology.levels[0]) * c.link_multicast
    absent = jnp.where(g.within[0] < g.n, ABSENT, 0.0)
    absent = absent + jnp.where(topology.multicast > 0, 0.0, ABSENT) * jnp.where(g.n > 1, 1.0, 0.0)
    multicast = Line(fixed=_only_if(g.n, c.multicast_base) + absent, per_byte=_only_if(g.n, (1.0 + 1.0 / g.n) / busy))
    return (*_scatter_lines(topology, g, c, passes=2.0, own=0.0), multicast)


def all_reduce(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """What engines choose from: NCCL's algorithms and, inside level 1, the one-shot kernel.

    One-shot: every rank reads all others' buffers, (n-1) S bytes, between two barriers over n-1 flags.
    """
    first = topology.levels[0]
    start = c.one_shot_base + 2.0 * c.hop_ll * first.latency + (g.n - 1.0) * c.one_shot_peer
    one_shot = Line(
        fixed=_only_if(g.n, start) + jnp.where(g.within[0] < g.n, ABSENT, 0.0),
        per_byte=(g.n - 1.0) / (bandwidth(first) * c.link_one_shot),
    )
    return (*nccl_all_reduce(topology, g, c), one_shot)


def all_gather(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """`bytes`: the whole gathered buffer. A reduce-scatter costs the same, mirrored."""
    return tuple(_scatter_lines(topology, g, c, passes=1.0, own=c.own_copy))


def all_to_all(topology: Topology, g: Group, c: Coefficients) -> Lines:
    """`bytes`: what one rank sends. Flat (levels at once), hierarchical pairwise, Bruck (log2 n steps of S/2).

    NCCL has no Bruck: its sends of short messages (LL) take its place at about its latency, but go through one channel
    a peer, S/n bytes each.
    """
    base = _only_if(g.n, c.all_to_all_base)
    simple = _only_if(g.n, c.all_to_all_base + c.all_to_all_simple)
    rates, rates_ll = _busy(topology, c.link_simple, c), _busy(topology, c.link_ll, c)
    copy = _only_if(g.n, c.own_copy / g.n / rates[0])
    flat = Line(
        fixed=simple + _top_latency(topology, g) * c.hop_simple,
        per_byte=_flat_bytes(topology, g, rates) + copy,
    )
    fixed, per_byte, bruck = simple, copy, _only_if(g.n, c.channel_ll / g.n)
    for level, rate, rate_ll, factor in zip(topology.levels, rates, rates_ll, g.factors(), strict=True):
        fixed = fixed + (factor - 1.0) * level.latency * c.hop_ll
        per_byte = per_byte + (factor - 1.0) / factor / rate
        bruck = bruck + jnp.log2(factor) * 0.5 / rate_ll
    doubling = _hierarchical(topology, g, lambda f: jnp.log2(f) * c.hop_ll, rates_ll)
    return (flat, Line(fixed=fixed, per_byte=per_byte), Line(fixed=base + doubling.fixed, per_byte=bruck))


def point_to_point(topology: Topology, g: Group, c: Coefficients) -> Line:
    """One neighbour to the next in a group; the slowest level that the group crosses sets the pace."""
    per_byte: Number = 0.0
    for rate, factor in zip(_busy(topology, c.link_simple, c), g.factors(), strict=True):
        per_byte = jnp.maximum(per_byte, jnp.where(factor > 1, 1.0 / rate, 0.0))
    return Line(fixed=_only_if(g.n, c.all_to_all_base) + _top_latency(topology, g) * c.hop_simple, per_byte=per_byte)


def distinct(places: Number, choices: Number) -> Number:
    """Expected distinct places among `places` hit by `choices` uniform choices: p (1 - (1 - 1/p)^k); 1 for p = 1."""
    miss = jnp.where(places > 1, 1.0 - 1.0 / jnp.maximum(places, 1.0 + 1e-6), 0.0)
    safe = jnp.where(miss > 0, miss, 1.0)
    return places * (1.0 - jnp.where(miss > 0, safe**choices, 0.0))


@pytree
class ExchangeKernel:
    """One direction of the MoE exchange: what its kernels cost beside the links."""

    base: Number  # s, throughput mode: layout, notification, start, one token's way
    copy: Number  # s a byte: one SM copying one token to one rank
    least_copies: Number  # copies a token that its walk through the channels costs, however few there are
    low_latency_base: Number  # s
    ready: Number  # s: one SM making one token ready to leave in low-latency mode
    link_low_latency: Number  # share of the innermost link


def _volume(topology: Topology, g: Group, routed: Routed, mode: Number, rates: list[Number]) -> Number:
    """Seconds a byte of a token on the busiest level, by how copies are made; see `dispatch`."""
    nodes = g.n / g.within[0]
    to_ranks = distinct(g.n, routed.top_k)

    def by_node(limit: Number) -> Number:
        m = jnp.minimum(limit, nodes)
        worst = to_ranks * (g.within[0] - 1.0) / g.within[0] / rates[0]
        for rate, inner in zip(rates[1:], g.within[:-1], strict=True):
            units = g.n / inner
            leaving = distinct(jnp.minimum(m, units), routed.top_k) * (units - 1.0) / units
            worst = jnp.maximum(worst, leaving / rate)
        return worst

    flat = _flat_bytes(topology, g, rates)
    limit = jnp.where(routed.group_limit > 0, routed.group_limit, 1e9)
    options = [routed.top_k * flat, to_ranks * flat, by_node(jnp.asarray(1e9)), by_node(limit)]
    return pick(mode, [least(options), *options])


def _exchange(
    topology: Topology,
    g: Group,
    routed: Routed,
    mode: Number,
    token_bytes: Number,
    kernel: ExchangeKernel,
    c: Coefficients,
) -> Fastest:
    """Lines in tokens a rank: throughput mode with its stages in series (few tokens) or pipelined, low-latency mode.

    Throughput (DeepEP's normal mode): SMs copy each token once to each destination rank, copy_bytes * copy / SMs, and
    links carry it. Low latency: k copies a token straight to and from the experts; one SM an expert (at most
    `LOW_LATENCY_SMS`) makes tokens ready.
    """
    live = jnp.where(g.n > 1, 1.0, 0.0)
    network = [bandwidth(level) * c.link_simple * c.link_network for level in topology.levels[1:]]
    first = bandwidth(topology.levels[0])
    link = _volume(topology, g, routed, mode, [first * c.link_dispatch, *network])
    copies = smooth_max(distinct(g.n, routed.top_k), kernel.least_copies, CORNER)
    sm = live * copies * kernel.copy / c.dispatch_sms
    way = _top_latency(topology, g)
    start = _only_if(g.n, kernel.base) + way
    pipelined = Line(fixed=start + _only_if(g.n, c.dispatch_fill), per_byte=smooth_max(sm, link, CORNER) * token_bytes)
    series = Line(fixed=start, per_byte=(sm + link) * token_bytes)

    flat = routed.top_k * _flat_bytes(topology, g, [first * kernel.link_low_latency, *network])
    ready = live * kernel.ready / jnp.clip(routed.experts, 1.0, LOW_LATENCY_SMS)
    direct = jnp.where(mode > 1, ABSENT, 0.0) * live  # deduplicated by rank or node: not its way
    low_latency = Line(
        fixed=_only_if(g.n, kernel.low_latency_base) + way + direct,
        per_byte=smooth_max(ready, flat * token_bytes, CORNER),
    )
    return Fastest(lines=(pipelined, series, low_latency))


def dispatch(
    topology: Topology, g: Group, routed: Routed, mode: Number, token_bytes: Number, c: Coefficients
) -> Fastest:
    """MoE dispatch of tokens of `token_bytes`, as lines in tokens a rank sends.

    flat: k copies a token; rank_dedup: one copy a destination rank; node_dedup: one copy a node over the network, then
    copies to ranks over level 1 (both at once); node_limited: the same with at most `group_limit` nodes a token. The
    fastest for long messages is taken under `auto` (node-limited routing only where the model routes so).
    """
    kernel = ExchangeKernel(
        base=c.dispatch_base,
        copy=c.dispatch_copy,
        least_copies=c.dispatch_least,
        low_latency_base=c.low_latency_base + routed.experts * c.low_latency_expert,
        ready=c.low_latency_token,
        link_low_latency=c.link_low_dispatch,
    )
    return _exchange(topology, g, routed, mode, token_bytes, kernel, c)


def combine(
    topology: Topology, g: Group, routed: Routed, mode: Number, token_bytes: Number, c: Coefficients
) -> Fastest:
    """The dispatch's mirror image: expert outputs return to their tokens' ranks and are added there.

    Its latency grows with what one token's sum takes: its bytes (throughput mode), its k parts (low latency).
    """
    kernel = ExchangeKernel(
        base=c.combine_base + token_bytes * c.combine_token,
        copy=c.combine_copy,
        least_copies=c.combine_least,
        low_latency_base=c.low_latency_base + routed.top_k * c.low_latency_copy,
        ready=0.0,
        link_low_latency=c.link_low_combine,
    )
    return _exchange(topology, g, routed, mode, token_bytes, kernel, c)


__all__ = [
    "Fastest",
    "Group",
    "Line",
    "Lines",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "combine",
    "dispatch",
    "distinct",
    "group",
    "nccl_all_reduce",
    "point_to_point",
    "seconds",
]
