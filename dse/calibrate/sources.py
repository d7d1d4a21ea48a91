"""A source of observations: what was measured, whose rows they are, and the compiled model that predicts them.

Serving runs, engine steps and collectives differ only in the function that prices one row; a fit takes any number of
them over one parameter vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from dse.programs import LARGE, derivative, program

Array = np.ndarray
# Rows of a source count as at most this many: 899 serving rows are what people ask about, and thousands of single
# steps or messages, alike and little noisy, would otherwise drown what they say of the coefficients they share.
MOST_ROWS = 400.0


@dataclass(frozen=True)
class Refusal:
    """A row that cannot serve the fit, and why. Listed, never dropped silently."""

    row: int
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Source:
    """n rows of k measured times.

    `measured` (n, k) log seconds, NaN where a row has not measured one; `scale` (k,): log residuals that a good model
    leaves; `predict`: log coefficients (n, F) -> (n, k) log seconds; `gradient` -> (n, k, F); `labels`: level of a
    coefficient set -> key of each row; `weight`: of each row's squared residual beside other sources'.
    """

    name: str
    frame: pd.DataFrame
    labels: dict[str, list[str]]
    metrics: tuple[str, ...]
    measured: Array
    scale: Array
    predict: Callable[[Any], Any]
    gradient: Callable[[Any], Any]
    weight: float = 1.0
    refused: tuple[Refusal, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.measured)

    def log_seconds(self, logs: Array) -> Array:
        """Predictions (n, k) in float64."""
        with jax.enable_x64(True):
            return np.asarray(self.predict(logs))

    def slopes(self, logs: Array) -> Array:
        """d log seconds / d log coefficient: (n, k, F)."""
        with jax.enable_x64(True):
            return np.asarray(self.gradient(logs))


class Compiled(TypedDict):
    """The model's part of a source."""

    predict: Callable[[Any], Any]
    gradient: Callable[[Any], Any]


def compiled(one: Callable[..., Any], inputs: Any, *shared: Any) -> Compiled:
    """`predict` and `gradient` of a source: `one` prices a row, (log coefficients (F,), a row of `inputs`) -> (k,).

    `shared`: further arguments of `one`, the same for all rows.

    A row has a few dozen coefficients however many levels there are, so its gradient is taken by those; `fit` spreads
    it over the levels.
    """
    with jax.enable_x64(True):
        rows = jax.tree.map(jnp.asarray, inputs)
    axes = (0, 0, *(None for _ in shared))
    batched = program(one, in_axes=axes)
    slopes = program(derivative, one, in_axes=axes, options=LARGE)
    return {"predict": lambda logs: batched(logs, rows, *shared), "gradient": lambda logs: slopes(logs, rows, *shared)}


def row_weight(rows: int, most: float = MOST_ROWS) -> float:
    """A row's weight so that a source counts as at most `most` rows."""
    return min(1.0, most / max(rows, 1))


def series(frame: pd.DataFrame, columns: Sequence[str]) -> Array:
    """A number for each group of rows that must share a fold."""
    known = [name for name in columns if name in frame]
    return np.asarray(frame[known].astype(str).agg("|".join, axis=1).factorize()[0])


__all__ = ["MOST_ROWS", "Refusal", "Source", "compiled", "row_weight", "series"]
