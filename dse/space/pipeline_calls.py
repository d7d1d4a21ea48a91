"""What a request brings to each stage of a pipeline: kinds of call with their tokens and how often they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dse.cost import lengths as dist
from dse.cost.lengths import Lengths
from dse.space.pipeline import LARGE_MODELS, PipelineSpec, StageSpec

Array = np.ndarray
STRATA = 16  # of the prompt, once the stages' tokens are added
LATER, CACHED = 8, 4  # of a turn's new tokens, and each by what is cached
TAIL = 1.6  # strata become narrower towards the longest: the last one holds STRATA^-TAIL of the requests, 1.2%


@dataclass(frozen=True)
class Kinds:
    """The calls of a stage, by kind (leaves (K,)): sequences of `tokens` new tokens behind `cached` ones.

    `weight` sums to 1 over all calls, `first` over those of the first turn. `calls` a request; `share` of the requests
    call it in their first turn; `output`: tokens that a call hands on, mean.
    """

    sequences: Array
    tokens: Array
    cached: Array
    weight: Array
    first: Array
    calls: float
    share: float
    output: float

    @property
    def prompt(self) -> Array:
        return self.tokens + self.cached


def _strata(mean: float, cv: float) -> tuple[Array, Array]:
    """Values and weights of a lognormal amount."""
    nodes = dist.lognormal(mean, 1.0, isl_cv=cv)
    values, of = np.unique(np.asarray(nodes.isl), return_inverse=True)
    return values, np.bincount(of.ravel(), weights=np.asarray(nodes.weight))


def _few(mean: float, cv: float) -> tuple[Array, Array]:
    """The same in three values."""
    if cv == 0.0:
        return np.array([mean]), np.ones(1)
    sigma = np.sqrt(np.log1p(cv**2))
    values = np.exp(sigma * np.array(dist.DEVIATES))
    weight = np.array(dist.SHARES)
    return values * mean / float(weight @ values), weight


def _cells(key: Array, weight: Array, most: int) -> Array:
    """Each kind's stratum, 0..most-1, in order of `key`."""
    order = np.argsort(key, kind="stable")
    share = weight[order] / weight.sum()
    cuts = 1.0 - (1.0 - np.arange(1, most) / most) ** TAIL
    cell = np.empty(len(key), int)
    cell[order] = np.searchsorted(cuts, np.cumsum(share) - 0.5 * share)
    return cell


def merged(weight: Array, columns: tuple[Array, ...], *by: tuple[Array, int]) -> tuple[Array, tuple[Array, ...]]:
    """(weights, columns) of fewer kinds, each the mean of those it stands for: strata by the first of `by` (key, at
    most so many), then within each by the next. Few kinds are kept as they are."""
    if len(weight) <= np.prod([most for _, most in by]):
        return weight, columns
    cell = np.zeros(len(weight), int)
    for key, most in by:
        inside = np.zeros(len(weight), int)
        for one in np.unique(cell):
            rows = cell == one
            inside[rows] = _cells(key[rows], weight[rows], most)
        cell = cell * most + inside
    total = np.bincount(cell, weights=weight)
    some = total > 0
    sums = (np.bincount(cell, weights=weight * c) for c in columns)
    return total[some], tuple(x[some] / total[some] for x in sums)


def _crossed(*amounts: tuple[Array, Array]) -> tuple[list[Array], Array]:
    """All combinations of independent amounts (values, weights), flat."""
    values = [x.ravel() for x in np.meshgrid(*(a for a, _ in amounts), indexing="ij")]
    weights = np.prod([x.ravel() for x in np.meshgrid(*(w for _, w in amounts), indexing="ij")], axis=0)
    return values, weights


def kinds(spec: PipelineSpec) -> dict[str, Kinds]:
    """What each stage meets of a request: its own tokens; of the language model, the prompts of all turns.

    A prompt is the request's own tokens, what the stages before add, and the encoders' tokens merged: independent
    amounts, so kinds of prompt are their sums.
    """
    turns, result = spec.loop.turns, {}
    prompt, weight = _strata(spec.request.isl, spec.request.isl_cv)
    for stage in spec.pipeline:
        often = float(turns if stage.every_turn else 1)
        if stage.kind in LARGE_MODELS and not stage.writes:
            continue
        if stage.writes:
            called = 1.0 if stage.tokens is None else stage.tokens.share
            own, each = (prompt, weight) if stage.tokens is None else _strata(stage.tokens.mean, stage.tokens.cv)
            none = np.zeros_like(own)
            result[stage.name] = Kinds(none + 1.0, own, none, each, each, often * called, called, stage.adds)
        elif stage.tokens is None:
            one = np.ones(1)
            result[stage.name] = Kinds(one, one, 0 * one, one, one, often, 1.0, stage.adds)
        else:
            t = stage.tokens
            amount, share = _strata(t.mean, t.cv)
            each = np.minimum(amount, t.each)
            result[stage.name] = Kinds(
                sequences=amount / each,
                tokens=each,
                cached=np.zeros_like(each),
                weight=share,
                first=share,
                calls=often * t.share,
                share=t.share,
                output=t.mean / stage.merge if stage.kind == "encoder" else stage.adds,
            )
            if stage.kind == "encoder":
                some = np.append(amount / stage.merge, 0.0), np.append(share * t.share, 1.0 - t.share)
                (a, b), both = _crossed((prompt, weight), some)
                sums = (a + b)[both > 0]
                weight, (prompt,) = merged(both[both > 0], (sums,), (sums, STRATA))
        prompt = prompt + stage.adds
    large = _turns(spec, prompt, weight)
    return {**result, **{s.name: large for s in spec.pipeline if s.kind in LARGE_MODELS and not s.writes}}


def _turns(spec: PipelineSpec, prompt: Array, weight: Array) -> Kinds:
    """Turn j has a context of prompt + j answers + j tool results, of which a share `hit` of all but the last result is
    still cached. Answers and results vary independently; the last result, all of it new, has its own strata."""
    r, loop = spec.request, spec.loop
    parts = []
    for j in range(loop.turns):
        if j == 0:
            (context,), share = [prompt], weight
            cached = r.prefix_hit * context
        else:
            before = j * r.osl + (j - 1) * loop.growth
            deviation = np.sqrt(j * (r.osl * r.osl_cv) ** 2 + (j - 1) * (loop.growth * loop.growth_cv) ** 2)
            last = _strata(loop.growth, loop.growth_cv) if loop.growth else (np.zeros(1), np.ones(1))
            (own, grown, new), share = _crossed((prompt, weight), _few(before, deviation / before), last)
            context, cached = own + grown + new, loop.hit * (own + grown)
        cached = np.minimum(cached, context - 1.0)
        new = context - cached
        share, (tokens, cached) = merged(share, (new, cached), (new, LATER), (cached, CACHED))
        parts.append((tokens, cached, share / loop.turns, share if j == 0 else 0.0 * share))
    tokens, cached, share, first = (np.concatenate(x) for x in zip(*parts, strict=True))
    return Kinds(
        sequences=np.ones_like(tokens),
        tokens=tokens,
        cached=cached,
        weight=share,
        first=first,
        calls=float(loop.turns),
        share=1.0,
        output=float(share @ (tokens + cached)),
    )


@dataclass(frozen=True)
class Common:
    """An amount that drives several stages: an encoder's tokens of a request, 0 for those that have none.

    `merge`: of them become one prompt token. Mean, standard deviation and skewness over requests.
    """

    stage: str
    merge: float
    mean: float
    deviation: float
    skewness: float


def commons(spec: PipelineSpec, found: dict[str, Kinds]) -> tuple[Common, ...]:
    """The amounts that an encoder and the language model behind it both see; only those that vary."""
    result = []
    for stage in spec.pipeline:
        if stage.kind != "encoder" or not any(s.kind == "prefill" for s in spec.pipeline):
            continue
        k = found[stage.name]
        mean, square, cube = (k.share * float(k.first @ (k.sequences * k.tokens) ** n) for n in (1, 2, 3))
        deviation = float(np.sqrt(max(square - mean**2, 0.0)))
        if deviation > 1e-9 * mean:
            skewness = (cube - 3.0 * mean * square + 2.0 * mean**3) / deviation**3
            result.append(Common(stage.name, stage.merge, mean, deviation, skewness))
    return tuple(result)


def answer(spec: PipelineSpec, stage: StageSpec) -> tuple[float, float]:
    """Tokens that a language model answers a call with: mean and coefficient of variation."""
    return (stage.osl, stage.osl_cv) if stage.osl is not None else (spec.request.osl, spec.request.osl_cv)


def call_lengths(spec: PipelineSpec, stage: StageSpec, k: Kinds) -> tuple[Lengths, Array | None]:
    """The calls of an aggregated language model as `dist.NODES` nodes, and the weights of the first turn's over them
    (None: there is no other turn).

    Of one turn and a lognormal prompt they are the nodes of `dist.lognormal`: what `dse goodput` is asked with.
    """
    mean, cv = answer(spec, stage)
    nodes = dist.lognormal(1.0, mean, osl_cv=cv)
    answers, of = np.unique(np.asarray(nodes.osl), return_inverse=True)
    often = np.bincount(of.ravel(), weights=np.asarray(nodes.weight))
    weight, (tokens, cached, first) = merged(
        k.weight, (k.tokens, k.cached, k.first / k.weight), (k.tokens, dist.NODES // len(answers))
    )
    (prompt, osl), share = _crossed((tokens, weight), (answers, often))
    hit, ahead = np.repeat(cached, len(answers)), np.repeat(first, len(answers))
    found = dist.padded(Lengths(isl=prompt + hit, osl=osl, cached=hit, weight=share), dist.NODES)
    some = np.append(share * ahead, np.zeros(dist.NODES - len(share)))
    return found, some if spec.loop.turns > 1 and not stage.writes else None


def contexts(k: Kinds, most: int) -> tuple[Array, Array]:
    """(tokens, weights) of the contexts that answers begin at, in at most `most` values."""
    weight, (prompt,) = merged(k.weight, (k.prompt,), (k.prompt, most))
    return prompt, weight


__all__ = ["Common", "Kinds", "answer", "call_lengths", "commons", "contexts", "kinds", "merged"]
