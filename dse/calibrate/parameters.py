"""What is fitted: coefficients as a base and factors by level, in logs, with priors that pool the levels partially.

log c = log base + sum over levels (generation, GPU, engine, version, model, deployment) of an offset ~ N(0, spread of
the level).
The base's prior is the cited physics. So a GPU or an engine with few rows leans on the others, and one with none is the
pooled value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from dse.catalog.coefficients import BOUNDS, LEVELS, CoefficientSet
from dse.cost.coefficients import Coefficients

Array = np.ndarray


@dataclass(frozen=True)
class Kind:
    """Standard deviations of the log of a coefficient and of each level's offsets, as shares of its `doubt`."""

    base: float
    generation: float
    gpu: float
    engine: float
    version: float
    model: float
    deployment: float = 0.0


# What single kernels and data sheets tell already, serving runs may move but little: a loose fit explains the models
# and GPUs that it saw by efficiencies which are wrong for others (a model left out: 19% instead of 14%). What is
# particular to a model, or to a version of an engine, has offsets of its own. What nobody records of a run (its
# host, how the engine was told to schedule) is learnt for each deployment.
KINDS = {
    "rate": Kind(base=0.1, generation=0.03, gpu=0.03, engine=0.03, version=0.3, model=0.3, deployment=0.2),
    "launch": Kind(base=0.3, generation=0.08, gpu=0.05, engine=0.1, version=0.2, model=0.2, deployment=0.2),
    "schedule": Kind(base=0.5, generation=0.05, gpu=0.05, engine=0.5, version=0.5, model=0.05),
    "admission": Kind(base=0.5, generation=0.0, gpu=0.0, engine=0.7, version=0.3, model=0.0),
    "setting": Kind(base=0.5, generation=0.05, gpu=0.05, engine=0.5, version=0.5, model=0.05, deployment=1.0),
    "network": Kind(base=0.5, generation=0.3, gpu=0.15, engine=0.1, version=0.2, model=0.2),
}
LEAST = 1e-3  # a standard deviation so small that the offset is no parameter


@dataclass(frozen=True)
class Free:
    """A fitted coefficient. `doubt`: how far, as a standard deviation of its log, its cited default may be off."""

    name: str
    doubt: float
    kind: str

    def spread(self, level: str) -> float:
        """Standard deviation of the log of the base, or of a level's offsets."""
        return max(self.doubt * float(getattr(KINDS[self.kind], level)), LEAST)


FREE = (
    Free("flops_per_joule", 0.3, "rate"),
    Free("gemm_bf16", 0.15, "rate"),
    Free("gemm_fp8", 0.15, "rate"),
    Free("gemm_fp4", 0.15, "rate"),
    Free("gemm_m_half", 0.7, "rate"),
    Free("gemm_walk", 0.4, "rate"),
    Free("quantise_passes", 0.4, "rate"),
    Free("quantise_kernels", 0.5, "launch"),
    Free("memory", 0.15, "rate"),
    Free("grouped_gemm", 0.1, "rate"),
    Free("expert_half", 0.3, "rate"),
    Free("expert_half_fp8", 0.3, "rate"),
    Free("expert_half_fp4", 0.4, "rate"),
    Free("expert_m_half", 0.4, "rate"),
    Free("expert_memory", 0.1, "rate"),
    Free("expert_each", 0.7, "rate"),
    Free("expert_each_fp8", 0.5, "rate"),
    Free("expert_each_fp4", 0.7, "rate"),
    Free("expert_walk", 0.4, "rate"),
    Free("permute_passes", 0.4, "rate"),
    Free("core_prefill", 0.4, "rate"),
    Free("core_decode", 0.4, "rate"),
    Free("core_memory", 0.25, "rate"),
    Free("kernel_prefill", 0.7, "launch"),
    Free("kernel_decode", 0.7, "launch"),
    Free("elementwise_passes", 0.5, "launch"),
    Free("step_overhead", 0.7, "launch"),
    Free("request_overhead", 1.0, "launch"),
    Free("arrival_overhead", 1.0, "setting"),
    Free("first_wave", 0.6, "schedule"),
    Free("cohort", 0.7, "setting"),
    Free("turns", 0.5, "setting"),
    Free("idle_seats", 1.5, "setting"),
    Free("collective_base", 0.7, "network"),
    Free("collective_ll128", 0.7, "network"),
    Free("collective_simple", 0.7, "network"),
    Free("hop_ll", 0.7, "network"),
    Free("hop_ll128", 0.7, "network"),
    Free("hop_simple", 0.7, "network"),
    Free("link_ll", 0.3, "network"),
    Free("link_ll128", 0.2, "network"),
    Free("link_simple", 0.2, "network"),
    Free("link_multicast", 0.2, "network"),
    Free("own_copy", 0.5, "network"),
    Free("multicast_base", 0.7, "network"),
    Free("one_shot_base", 0.7, "network"),
    Free("one_shot_peer", 0.7, "network"),
    Free("link_one_shot", 0.3, "network"),
    Free("all_to_all_base", 0.7, "network"),
    Free("all_to_all_simple", 0.7, "network"),
    Free("channel_ll", 0.7, "network"),
    Free("dispatch_base", 0.7, "network"),
    Free("dispatch_fill", 1.0, "network"),
    Free("dispatch_copy", 0.2, "network"),
    Free("dispatch_least", 0.5, "network"),
    Free("combine_base", 0.7, "network"),
    Free("combine_token", 0.7, "network"),
    Free("combine_copy", 0.2, "network"),
    Free("combine_least", 0.5, "network"),
    Free("link_dispatch", 0.2, "network"),
    Free("low_latency_base", 0.7, "network"),
    Free("low_latency_expert", 0.7, "network"),
    Free("low_latency_copy", 0.7, "network"),
    Free("low_latency_token", 0.7, "network"),
    Free("link_low_dispatch", 0.2, "network"),
    Free("link_low_combine", 0.2, "network"),
    Free("imbalance", 0.3, "rate"),
    Free("reserved_output", 0.5, "admission"),
)


@dataclass(frozen=True)
class Layout:
    """The parameter vector: bases, then the offsets of each key of each level (one block of coefficients a key)."""

    keys: tuple[tuple[str, ...], ...]  # by level
    # Coefficient -> (centre, spread) of its base's log, where other measurements (kernel tables) know it better
    priors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        labels: Sequence[Mapping[str, Sequence[str]]],
        priors: Mapping[str, tuple[float, float]] | None = None,
    ) -> Layout:
        """Keys of every level that any source of observations names ("" is nobody's)."""
        keys = tuple(tuple(sorted({k for table in labels for k in table[level]} - {""})) for level in LEVELS)
        return cls(keys=keys, priors=priors or {})

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """(level, key) of each block, the base first."""
        named = [(level, key) for level, keys in zip(LEVELS, self.keys, strict=True) for key in keys]
        return [("base", ""), *named]

    @property
    def size(self) -> int:
        return len(FREE) * (1 + sum(len(keys) for keys in self.keys))

    def codes(self, labels: Mapping[str, Sequence[str]]) -> list[Array]:
        """Row numbers of the offsets of each observation by level; the last row (zeros) for an unknown key."""
        result = []
        for level, keys in zip(LEVELS, self.keys, strict=True):
            place = {key: i for i, key in enumerate(keys)}
            result.append(np.array([place.get(key, len(keys)) for key in labels[level]], np.int64))
        return result

    def centre(self) -> Array:
        """The prior's mean: physics (or what `priors` know), no offsets."""
        base = [self.priors.get(f.name, (np.log(getattr(Coefficients(), f.name)), 0.0))[0] for f in FREE]
        return np.concatenate([base, np.zeros(self.size - len(FREE))])

    def spread(self) -> Array:
        """The prior's standard deviations."""
        parts = [np.array([self.priors.get(f.name, (0.0, f.spread("base")))[1] for f in FREE])]
        for level, keys in zip(LEVELS, self.keys, strict=True):
            parts += [np.array([f.spread(level) for f in FREE])] * len(keys)
        return np.concatenate(parts)

    def design(self, codes: Sequence[Array]) -> Array:
        """Which offsets each observation adds: (n, 1 + keys of all levels) of 0 and 1; the first column is the base.

        log c of observation i = sum over blocks b of design[i, b] * theta[b], a block being one number a coefficient.
        """
        rows = len(codes[0])
        columns = [np.ones((rows, 1))]
        for keys, code in zip(self.keys, codes, strict=True):
            columns.append(np.eye(len(keys) + 1)[code][:, : len(keys)])
        return np.concatenate(columns, axis=1)

    def to_set(self, theta: Array, name: str, about: dict[str, Any]) -> CoefficientSet:
        """The fitted vector as a named set: base values, factors (offsets of less than 0.1% left out)."""
        count = len(FREE)
        base = {f.name: _digits(np.exp(theta[i])) for i, f in enumerate(FREE)}
        factors: dict[str, dict[str, dict[str, float]]] = {}
        start = count
        for level, keys in zip(LEVELS, self.keys, strict=True):
            for key in keys:
                block = theta[start : start + count]
                start += count
                found = {f.name: _digits(np.exp(x)) for f, x in zip(FREE, block, strict=True) if abs(x) > 1e-3}
                factors.setdefault(level, {})[key] = found
        return CoefficientSet(name=name, base=base, factors=factors, about=about)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def apply(logs: Any, physics: Coefficients) -> Coefficients:
    """The coefficients of one observation from the logs of the fitted ones; `physics` has the others."""
    values = {}
    for i, f in enumerate(FREE):
        low, high = BOUNDS.get(f.name, (0.0, jnp.inf))
        values[f.name] = jnp.clip(jnp.exp(logs[i]), low, high)
    return replace(physics, **values)
