"""Request traces: a CSV of arrivals and lengths, read whole or refused with the first row that is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dse.errors import InputError
from dse.files import read_csv

Array = np.ndarray

ARRIVAL = "arrival_s"
LENGTHS = ("input_tokens", "output_tokens")
PREFIX = ("prefix_tokens", "ideal_prefix_hit_tokens")  # either name; tokens of the prompt already in the cache
MOST_TOKENS = 100_000_000


@dataclass(frozen=True)
class Trace:
    """n requests, float64 arrays of shape (n,) that cannot be written to. `arrival_s` is None where none were given."""

    arrival_s: Array | None  # seconds, not decreasing
    input_tokens: Array
    output_tokens: Array
    prefix_tokens: Array  # 0 where the file has no such column

    def __len__(self) -> int:
        return len(self.input_tokens)

    @property
    def rate(self) -> float | None:
        """Mean requests a second; None without arrivals, or where all came at once."""
        if self.arrival_s is None or len(self) < 2:
            return None
        span = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span if span > 0 else None

    @property
    def cv(self) -> float | None:
        """Coefficient of variation of the gaps between arrivals (1: Poisson); None where there is no rate."""
        if self.rate is None or self.arrival_s is None:
            return None
        gaps = np.diff(self.arrival_s)
        return float(gaps.std() / gaps.mean())


def read_trace(path: str | Path) -> Trace:
    """The requests of a CSV with `input_tokens`, `output_tokens` and, where known, `arrival_s` (seconds, sorted) and
    `prefix_tokens` (or `ideal_prefix_hit_tokens`). Other columns are not read.

    Raises InputError naming the first bad row (the header is row 1): missing columns, no rows, text, NaN, infinite or
    negative values, no tokens, arrivals that go back, a prefix longer than its prompt.
    """
    table = _table(Path(path))
    missing = [name for name in LENGTHS if name not in table.columns]
    if missing:
        found = ", ".join(str(c) for c in table.columns[:8]) or "none"
        raise InputError(
            f"{path}: column{'s' if len(missing) > 1 else ''} {', '.join(missing)} missing (found: {found}); "
            f"a trace has {ARRIVAL}, {', '.join(LENGTHS)}"
        )
    if not len(table):
        raise InputError(f"{path}: has no requests; give at least one row below the header")
    prompt, answer = (_column(path, table, name, low=1.0) for name in LENGTHS)
    arrival = _column(path, table, ARRIVAL, low=0.0, high=np.inf, whole=False) if ARRIVAL in table.columns else None
    if arrival is not None:
        back = np.flatnonzero(np.diff(arrival) < 0)
        if len(back):
            i = int(back[0]) + 1
            raise InputError(
                f"{path}: row {i + 2}: {ARRIVAL} {arrival[i]:g} comes after {arrival[i - 1]:g} in the row before it;"
                " sort the rows by arrival"
            )
    name = next((n for n in PREFIX if n in table.columns), None)
    prefix = np.zeros(len(table)) if name is None else _column(path, table, name, low=0.0)
    longer = np.flatnonzero(prefix > prompt)
    if len(longer):
        i = int(longer[0])
        raise InputError(
            f"{path}: row {i + 2}: {name} {prefix[i]:g} is more than input_tokens {prompt[i]:g} (allowed: up to it)"
        )
    for values in (prompt, answer, prefix, *(() if arrival is None else (arrival,))):
        values.setflags(write=False)
    return Trace(arrival_s=arrival, input_tokens=prompt, output_tokens=answer, prefix_tokens=prefix)


def _table(path: Path) -> pd.DataFrame:
    """The file's cells as text; one message where the file itself is unusable."""
    what = f"a trace (CSV of {ARRIVAL}, {', '.join(LENGTHS)})"
    table = read_csv(path, what, dtype=str, keep_default_na=False, skip_blank_lines=False)
    blank = (table == "").all(axis=1).to_numpy()
    while len(blank) and blank[-1]:  # blank lines at the end are no requests
        blank = blank[:-1]
    return table.iloc[: len(blank)].rename(columns=str.strip)


def _column(
    path: str | Path, table: pd.DataFrame, name: str, low: float, high: float = MOST_TOKENS, whole: bool = True
) -> Array:
    """A column as numbers, every one finite and in range (whole where it counts tokens)."""
    values = np.array(pd.to_numeric(table[name].str.strip(), errors="coerce"), np.float64)
    bad = ~(np.isfinite(values) & (values >= low) & (values <= high))
    if whole:
        bad |= np.isfinite(values) & (values != np.round(values))
    if bad.any():
        i = int(np.argmax(bad))
        kind = "whole numbers" if whole else "finite numbers"
        span = f"from {low:g}" + ("" if np.isinf(high) else f" to {high:g}")
        written = table[name].iloc[i]
        shown = repr(written) if written else "an empty cell"
        raise InputError(f"{path}: row {i + 2}: {name} is {shown} (allowed: {kind} {span})")
    return values


__all__ = ["Trace", "read_trace"]
