"""A table's cells as arrays of numbers, with the first reason why a row cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from dse.errors import InputError

Array = np.ndarray


class Cells:
    """Reads columns once; `reason[i]` is "" while row i is usable. Names match whatever their case."""

    def __init__(self, table: pd.DataFrame, where: str) -> None:
        self.table, self.where = table, where
        self.n = len(table)
        self.reason: Array = np.full(self.n, "", dtype=object)
        self.notes: Array = np.full(self.n, "", dtype=object)  # what a priced row must be told all the same
        self._column = {str(name).lower(): name for name in reversed(table.columns)}

    def has(self, name: str) -> bool:
        return name.lower() in self._column

    def refuse(self, bad: Array, why: str | Callable[[int], str]) -> None:
        """Rows of the mask get this reason, unless they have one already."""
        for i in np.nonzero(np.asarray(bad) & (self.reason == ""))[0]:
            self.reason[i] = why if isinstance(why, str) else why(int(i))

    def text(self, *names: str) -> Array:
        """The first of these columns that exists, stripped; "" where a cell is empty."""
        for name in names:
            if self.has(name):
                column = self.table[self._column[name.lower()]]
                return np.array(["" if pd.isna(v) else str(v).strip() for v in column], dtype=object)
        return np.full(self.n, "", dtype=object)

    def number(
        self,
        *names: str,
        default: float | Array | None = None,
        low: float = 0.0,
        high: float = 1e15,
        above: bool = False,
        whole: bool = False,
        allowed: Sequence[float] = (),
    ) -> Array:
        """A column of finite numbers in [low, high] (`above`: not low itself), `default` where the cell is empty.

        Without a default, or where it is NaN, an empty cell is a reason; a required column that is missing altogether
        makes the file unusable.
        """
        name = next((n for n in names if self.has(n)), None)
        if name is None:
            if default is None:
                raise InputError(f"{self.where}: column {names[0]} missing (required)")
            values, text = np.full(self.n, np.nan), np.full(self.n, "", dtype=object)
        else:
            text = self.text(name)
            values = pd.to_numeric(pd.Series(text).replace("", np.nan), errors="coerce").to_numpy(float)
        empty = text == ""
        label = names[0] if name is None else str(self._column[name.lower()])
        self.refuse(~empty & np.isnan(values), lambda i: f"{label}: {text[i]!r} is not a number")
        values = np.where(empty, np.nan if default is None else default, values)
        self.refuse(np.isnan(values), f"{label}: is empty (required)")
        with np.errstate(invalid="ignore"):
            outside = ~((values > low) if above else (values >= low)) | ~(values <= high)
            if whole:
                outside |= values != np.round(values)
            if allowed:
                outside |= ~np.isin(values, allowed)
        self.refuse(
            outside, lambda i: f"{label}: {values[i]:g} is out of range ({_range(low, high, above, whole, allowed)})"
        )
        return values

    def flag(self, name: str, default: bool = False) -> Array:
        """Yes or no: true/false, yes/no, 1/0 in any case."""
        text = np.array([t.lower() for t in self.text(name)], dtype=object)
        yes, no = np.isin(text, ("true", "yes", "1", "1.0")), np.isin(text, ("false", "no", "0", "0.0"))
        self.refuse(~yes & ~no & (text != ""), lambda i: f"{name}: {text[i]!r} is neither true nor false")
        return np.where(text == "", default, yes).astype(float)

    @property
    def usable(self) -> Array:
        return self.reason == ""


def _range(low: float, high: float, above: bool, whole: bool, allowed: Sequence[float]) -> str:
    if allowed:
        return "allowed: " + ", ".join(f"{v:g}" for v in allowed)
    kind = "whole numbers " if whole else ""
    return f"allowed: {kind}{'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < 1e15 else "")


def looked_up(names: Array, find: Callable[[str], Any], fields: Sequence[str]) -> tuple[dict[str, Array], Array]:
    """Numbers of named things as columns (NaN where the name is empty or unknown), and why a name is unknown."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        try:
            found[name] = find(name) if name else None
        except InputError as error:
            found[name] = str(error)
    columns = {
        field: np.array(
            [np.nan if (x := found[name]) is None or isinstance(x, str) else float(getattr(x, field)) for name in names]
        )
        for field in fields
    }
    why = np.array([found[name] if isinstance(found[name], str) else "" for name in names], dtype=object)
    return columns, why
