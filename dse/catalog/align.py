"""Several models as one tree structure, so that one compiled program serves a batch that mixes them.

Each model's kinds of layer go to slots. A slot has the union of the optional parts (core, indexer, state, routed
experts, number of GEMMs) of the kinds in it, and the compiled program grows with that union: kinds are matched to slots
so that it stays small (an assignment problem, solved model by model, the widest first). What a model lacks is padded
with numbers that add nothing: layers counted 0, GEMMs of 0 columns, attention that sees no keys, experts nobody picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dse.cost.types import Architecture, Core, FeedForward, Gemm, Indexer, Mixer, Routed, State, replace

Kind = TypeVar("Kind", Mixer, FeedForward)

# What a part adds to the program, in units of about one GEMM; only the order of slots' costs matters.
_CORE, _INDEXER, _STATE, _ROUTED, _SLOT = 4.0, 2.0, 1.0, 6.0, 3.0

_NO_GEMM = Gemm(k=0.0, n=0.0)
_NO_CORE = Core(
    heads=0.0,
    kv_heads=1.0,
    score_dim=0.0,
    value_dim=0.0,
    score_dim_decode=0.0,
    value_dim_decode=0.0,
    kv_elements=0.0,
    window=0.0,
    window_fill=1.0,
    ratio=0.0,
    top_k=0.0,
    rematerialise=0.0,
)
_NO_INDEXER = Indexer(heads=0.0, dim=0.0)
_NO_STATE = State(state_bytes=0.0, flops_per_token=0.0)
_NO_EXPERTS = Routed(experts=1.0, top_k=0.0, d_in=1.0, width=1.0, matrices=0.0)


@dataclass(frozen=True)
class _Shape:
    """The optional parts of a slot; 0 and 1 count them. `routed` is of feed-forward layers, the rest of mixers."""

    gemms: int = 0
    core: bool = False
    indexer: bool = False
    state: bool = False
    routed: bool = False

    def union(self, other: _Shape) -> _Shape:
        return _Shape(
            max(self.gemms, other.gemms),
            self.core or other.core,
            self.indexer or other.indexer,
            self.state or other.state,
            self.routed or other.routed,
        )

    def cost(self) -> float:
        parts = self.core * _CORE + self.indexer * _INDEXER + self.state * _STATE + self.routed * _ROUTED
        return _SLOT + self.gemms + parts


@dataclass
class _Slots:
    """The slots so far, and which of them each model's kinds took."""

    shapes: list[_Shape]
    taken: dict[int, list[int]]


def align(architectures: Sequence[Architecture]) -> list[Architecture]:
    """The same models with one tree structure, in the same order; parameters, FLOPs and cache are unchanged."""
    mixers = _assign([a.mixers for a in architectures], _mixer_shape)
    ffns = _assign([a.ffns for a in architectures], _ffn_shape)
    return [
        replace(
            a,
            mixers=_placed(a.mixers, mixers.taken[i], mixers.shapes, _padded_mixer, _empty_mixer),
            ffns=_placed(a.ffns, ffns.taken[i], ffns.shapes, _padded_ffn, _empty_ffn),
        )
        for i, a in enumerate(architectures)
    ]


def _assign(models: Sequence[Sequence[Kind]], shape: Callable[[Kind], _Shape]) -> _Slots:
    """Each model's kinds to slots of their own, at the least growth of the slots' costs."""
    from scipy.optimize import linear_sum_assignment

    slots: _Slots = _Slots([], {i: [] for i in range(len(models))})
    widest_first = sorted(range(len(models)), key=lambda i: -sum(shape(kind).cost() for kind in models[i]))
    for i in widest_first:
        shapes = [shape(kind) for kind in models[i]]
        if not shapes:
            continue
        old = [[slot.union(s).cost() - slot.cost() for slot in slots.shapes] for s in shapes]
        new = [[s.cost()] * len(shapes) for s in shapes]
        _, columns = linear_sum_assignment([a + b for a, b in zip(old, new, strict=True)])
        for s, column in zip(shapes, columns, strict=True):
            if column < len(old[0]):
                slots.shapes[column] = slots.shapes[column].union(s)
                slots.taken[i].append(int(column))
            else:
                slots.taken[i].append(len(slots.shapes))
                slots.shapes.append(s)
    return slots


def _placed(
    kinds: Sequence[Kind],
    taken: Sequence[int],
    shapes: Sequence[_Shape],
    padded: Callable[[Kind, _Shape], Kind],
    empty: Callable[[], Kind],
) -> tuple[Kind, ...]:
    at = dict(zip(taken, kinds, strict=True))
    return tuple(padded(at[i] if i in at else empty(), shape) for i, shape in enumerate(shapes))


# ---------------------------------------------------------------------------------------------- parts


def _mixer_shape(mixer: Mixer) -> _Shape:
    return _Shape(len(mixer.gemms), mixer.core is not None, mixer.indexer is not None, mixer.state is not None)


def _ffn_shape(ffn: FeedForward) -> _Shape:
    return _Shape(routed=ffn.routed is not None)


def _empty_mixer() -> Mixer:
    return Mixer(count=0.0, gemms=(), extra_params=0.0)


def _empty_ffn() -> FeedForward:
    return FeedForward(count=0.0, width=0.0, matrices=0.0, extra_params=0.0)


def _padded_mixer(mixer: Mixer, shape: _Shape) -> Mixer:
    return replace(
        mixer,
        gemms=mixer.gemms + (_NO_GEMM,) * (shape.gemms - len(mixer.gemms)),
        core=mixer.core if mixer.core is not None or not shape.core else _NO_CORE,
        indexer=mixer.indexer if mixer.indexer is not None or not shape.indexer else _NO_INDEXER,
        state=mixer.state if mixer.state is not None or not shape.state else _NO_STATE,
    )


def _padded_ffn(ffn: FeedForward, shape: _Shape) -> FeedForward:
    return replace(ffn, routed=ffn.routed if ffn.routed is not None or not shape.routed else _NO_EXPERTS)


__all__ = ["align"]
