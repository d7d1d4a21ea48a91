"""The values of the parallel axes: `auto` filled in, and values that no model and GPU count can ever use refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dse.space.facts import Facts
from dse.space.legal import Degrees
from dse.space.machines import Machine
from dse.space.schema import SpaceSpec
from dse.space.values import AUTO, listed

Array = np.ndarray
MOST_LISTED = 3


def degrees(spec: SpaceSpec, facts: Facts, machines: list[Machine]) -> tuple[Degrees, list[str]]:
    """The degrees of a space, and one line for each value that can be legal nowhere."""
    axes, problems = spec.axes, []
    gpus = np.array(spec.gpus, np.int64)
    largest = max(machines, key=lambda m: m.size)
    usable = gpus[gpus <= largest.size]
    for value in gpus[gpus > largest.size][:MOST_LISTED]:
        problems.append(
            f"gpus: {value} is more than the {largest.size} GPUs of cluster {largest.cluster.name}"
            f" (allowed: up to {largest.size})"
        )
    divisors = _divisors(usable)
    moe = bool(facts.moe.any())

    def axis(name: str, fits: Callable[[Array], Array], why: Callable[[int], str]) -> Array:
        """Explicit values are checked against the models and the GPU counts; `auto` is all that passes both."""
        given = getattr(axes, name)
        legal = divisors[fits(divisors)] if len(divisors) else divisors
        if given == AUTO:
            return legal if len(legal) else np.ones(1, np.int64)
        values = np.array(given, np.int64)
        allowed = f"(allowed: {listed([int(x) for x in legal]) or 'none'})"
        for value in values[~fits(values)][:MOST_LISTED]:
            problems.append(f"axes.{name}: {value} {why(int(value))} {allowed}")
        for value in values[fits(values) & ~np.isin(values, divisors)][:MOST_LISTED] if len(usable) else ():
            problems.append(f"axes.{name}: {value} divides none of gpus={listed(spec.gpus)} {allowed}")
        return values

    def anything(values: Array) -> Array:
        return np.ones(len(values), bool)

    def only_one(values: Array) -> Array:
        return np.isin(values, 1) | moe

    no_experts = f"needs experts, which {_of(facts)} {'has' if len(facts.names) == 1 else 'have'} not"
    derived_ep = axes.ep == AUTO and axes.moe_tp != AUTO
    result = Degrees(
        gpus=gpus,
        tp=axis("tp", lambda x: _any(facts.tp(x)), lambda x: _why_tp(facts, x)),
        pp=axis("pp", lambda x: _any(facts.pp(x, spec.options.uneven_pp)), lambda x: _why_pp(spec, facts, x)),
        attention_dp=axis("attention_dp", only_one, lambda x: f"{no_experts}; use dp for replicas"),
        cp=axis("cp", anything, str),
        moe_ep=None if derived_ep else _experts(axis, "ep", facts.ep, facts.experts_of, "experts", no_experts, facts),
        moe_tp=None
        if axes.moe_tp == AUTO
        else _experts(axis, "moe_tp", facts.moe_tp, facts.expert_width_of, "expert width", no_experts, facts),
        replicas=None if axes.dp == AUTO else axis("dp", anything, str),
    )
    return result, problems


def _experts(
    axis: Callable[..., Array],
    name: str,
    fits: Callable[[Array], Array],
    of: Array,
    what: str,
    no_experts: str,
    facts: Facts,
) -> Array:
    if not facts.moe.any():
        return axis(name, lambda x: np.isin(x, 1), lambda x: no_experts)
    i = int(np.flatnonzero(facts.moe)[0])
    return axis(
        name,
        lambda x: _any(fits(x)),
        lambda x: f"does not divide {what}={of[i]} of {_of(facts, i)}",
    )


def _any(of_models: Array) -> Array:
    """Whether some model allows each value."""
    return np.asarray(of_models.any(axis=0))


def _divisors(counts: Array) -> Array:
    """Every divisor of any of the counts."""
    if not len(counts):
        return np.ones(0, np.int64)
    present = np.zeros(int(counts.max()) + 1, bool)
    present[counts] = True
    return np.array([c for c in range(1, len(present)) if present[c::c].any()], np.int64)


def _of(facts: Facts, i: int = 0) -> str:
    return facts.names[i] if len(facts.names) == 1 else f"{facts.names[i]} (or any other model here)"


def _why_tp(facts: Facts, tp: int) -> str:
    if facts.heads_of[0] % tp:
        return f"does not divide n_heads={facts.heads_of[0]} of {_of(facts)}"
    if facts.widths_of[0] % tp:
        return f"does not divide the FFN width {facts.widths_of[0]} of {_of(facts)}"
    heads = listed(facts.kv_heads[0])
    return f"neither divides nor is a multiple of kv_heads={heads} of {_of(facts)}"


def _why_pp(spec: SpaceSpec, facts: Facts, pp: int) -> str:
    if spec.options.uneven_pp:
        return f"is more than layers={facts.layers[0]} of {_of(facts)}"
    return f"does not divide layers={facts.layers[0]} of {_of(facts)}; options.uneven_pp: true allows uneven stages"


__all__ = ["degrees"]
