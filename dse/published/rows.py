"""The one place where the published models are batched and compiled: scalar functions over rows of a table."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from dse.programs import program


@lru_cache(maxsize=64)
def over_rows(one: Callable[..., Any]) -> Callable[..., Any]:
    """`one` of single cases -> the same of batches: every leaf of every argument has one leading axis of length N."""
    return program(one, in_axes=0)


__all__ = ["over_rows"]
