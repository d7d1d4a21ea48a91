"""What is fitted: coefficients as a base and factors by level, in logs, with priors that pool the levels partially.

log c = log base + sum over levels (generation, GPU, engine) of an offset ~ N(0, spread of the level). The base's prior
is the cited physics. So a GPU or an engine with few rows leans on the others, and one with none is the pooled value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.cost.coefficients import Coefficients

Array = np.ndarray


@dataclass(frozen=True)
class Free:
    """A fitted coefficient: prior spreads (standard deviations of the log) of its base and of each level's offsets."""

    name: str
    base: float
    generation: float
    gpu: float
    engine: float


FREE = (
    Free("gemm_bf16", 0.3, 0.15, 0.1, 0.1),
    Free("gemm_fp8", 0.3, 0.15, 0.1, 0.1),
    Free("gemm_fp4", 0.3, 0.15, 0.1, 0.1),
    Free("gemm_m_half", 0.7, 0.2, 0.1, 0.2),
    Free("grouped_gemm", 0.15, 0.1, 0.05, 0.1),
    Free("expert_half", 0.5, 0.2, 0.1, 0.2),
    Free("expert_each", 0.7, 0.2, 0.1, 0.3),
    Free("memory", 0.15, 0.1, 0.1, 0.1),
    Free("core_prefill", 0.4, 0.2, 0.1, 0.2),
    Free("core_decode", 0.4, 0.2, 0.1, 0.2),
    Free("core_memory", 0.25, 0.15, 0.1, 0.15),
    Free("kernel_prefill", 0.7, 0.2, 0.1, 0.4),
    Free("kernel_decode", 0.7, 0.2, 0.1, 0.4),
    Free("elementwise_passes", 0.5, 0.1, 0.05, 0.2),
    Free("step_overhead", 0.7, 0.2, 0.1, 0.7),
    Free("request_overhead", 1.0, 0.2, 0.1, 0.7),
    Free("arrival_overhead", 1.5, 0.2, 0.1, 1.5),
    Free("first_wave", 1.0, 0.1, 0.05, 1.0),
    Free("collective_base", 0.5, 0.2, 0.2, 0.4),
    Free("one_shot_base", 0.5, 0.2, 0.2, 0.4),
    Free("link_simple", 0.25, 0.1, 0.1, 0.2),
    Free("link_ll", 0.25, 0.1, 0.1, 0.2),
    Free("imbalance", 0.3, 0.05, 0.05, 0.2),
    Free("reserved_output", 0.5, 0.05, 0.05, 0.3),
)
# Where physics sets a limit whatever the data say.
BOUNDS = {"memory": (0.2, 1.0), "core_memory": (0.2, 1.0), "imbalance": (1.0, 4.0), "reserved_output": (0.02, 1.0)}


@dataclass(frozen=True)
class Layout:
    """The parameter vector: bases, then the offsets of each key of each level (one block of coefficients a key)."""

    keys: tuple[tuple[str, ...], ...]  # by level

    @classmethod
    def of(cls, labels: Sequence[Mapping[str, Sequence[str]]]) -> Layout:
        """Keys of every level that any source of observations names ("" is nobody's)."""
        return cls(keys=tuple(tuple(sorted({k for table in labels for k in table[level]} - {""})) for level in LEVELS))

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
        """The prior's mean: physics, no offsets."""
        base = [np.log(getattr(Coefficients(), f.name)) for f in FREE]
        return np.concatenate([base, np.zeros(self.size - len(FREE))])

    def spread(self) -> Array:
        """The prior's standard deviations."""
        parts = [np.array([f.base for f in FREE])]
        for level, keys in zip(LEVELS, self.keys, strict=True):
            parts += [np.array([getattr(f, level) for f in FREE])] * len(keys)
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
