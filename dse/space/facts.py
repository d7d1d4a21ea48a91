"""What a model's shape allows, as arrays over the models of a space: which degrees divide what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dse.catalog.model_schema import ModelEntry

IntArray = np.ndarray
NO_LIMIT = 2**31


@dataclass(frozen=True)
class Facts:
    """Divisibility of each model. `*_of` are greatest common divisors; 0 where the model has no such part."""

    names: tuple[str, ...]
    heads_of: IntArray  # query heads of every attention layer, inner widths of every linear-attention layer
    widths_of: IntArray  # dense and shared-expert widths
    kv_heads: tuple[tuple[int, ...], ...]  # of every kind of attention layer
    least_kv: IntArray
    layers: IntArray
    experts_of: IntArray
    expert_width_of: IntArray
    limited: IntArray  # 1: the router limits a token to some groups of experts
    has_mtp: IntArray
    context: IntArray

    @property
    def moe(self) -> IntArray:
        return self.experts_of > 0

    def tp(self, values: IntArray) -> IntArray:
        """(models, values): TP splits heads and widths evenly, and KV heads evenly or into whole copies."""
        ok = (self.heads_of[:, None] % values == 0) & (self.widths_of[:, None] % values == 0)
        for i, kinds in enumerate(self.kv_heads):
            for kv in kinds:
                ok[i] &= (values % kv == 0) | (kv % values == 0)
        return ok

    def pp(self, values: IntArray, uneven: bool) -> IntArray:
        """(models, values): PP gives every stage the same number of layers, or at least one where `uneven`."""
        layers = self.layers[:, None]
        return layers >= values if uneven else layers % values == 0

    def ep(self, values: IntArray) -> IntArray:
        return self.moe[:, None] & (self.experts_of[:, None] % values == 0)

    def moe_tp(self, values: IntArray) -> IntArray:
        return self.moe[:, None] & (self.expert_width_of[:, None] % values == 0)


def facts(entries: Sequence[ModelEntry]) -> Facts:
    """The facts of some models, in their order."""
    kv_heads = tuple(tuple(sorted({m.core.kv_heads for m in e.mixers if m.core is not None})) for e in entries)
    return Facts(
        names=tuple(e.name for e in entries),
        heads_of=_array(_heads(e) for e in entries),
        widths_of=_array(math.gcd(*(f.width for f in e.ffns)) for e in entries),
        kv_heads=kv_heads,
        least_kv=_array(min(kinds, default=NO_LIMIT) for kinds in kv_heads),
        layers=_array(e.layers for e in entries),
        experts_of=_array(math.gcd(*(f.routed.experts for f in e.ffns if f.routed is not None)) for e in entries),
        expert_width_of=_array(math.gcd(*(f.routed.width for f in e.ffns if f.routed is not None)) for e in entries),
        limited=_array(any(f.routed is not None and f.routed.group_limit > 0 for f in e.ffns) for e in entries),
        has_mtp=_array(e.mtp_depth > 0 or e.mtp_params > 0 for e in entries),
        context=_array(e.max_context for e in entries),
    )


def _heads(entry: ModelEntry) -> int:
    """Heads of softmax attention; linear attention has no such count, so the rows of its split matrices stand in."""
    heads = [m.core.heads for m in entry.mixers if m.core is not None]
    inner = [g.k for m in entry.mixers if m.core is None for g in m.gemms if g.split == "k"]
    return math.gcd(*heads, *inner)


def _array(items: object) -> IntArray:
    return np.array(list(items), dtype=np.int64)  # type: ignore[call-overload]


__all__ = ["Facts", "facts"]
