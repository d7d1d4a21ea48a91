"""What a person may write for a number, a list of numbers or a range, as plain values.

Every function takes the raw YAML value and returns clean ones, or raises `ValueError` with the value, what is allowed
and the remedy; the place is added by whoever called.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dse.errors import InputError
from dse.space.traces import read_trace
from dse.units import GIB

MOST_VALUES = 1_000_000
LARGEST = 10**12
AUTO = "auto"
ALL = "all"

# Spellings of a unit -> how many of the axis's natural unit one of it is.
UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "ms": {"ms": 1.0, "s": 1e3, "us": 1e-3, "min": 6e4},
        "GiB": {"gib": 1.0, "mib": 1 / 1024, "tib": 1024.0, "gb": 1e9 / GIB, "mb": 1e6 / GIB, "tb": 1e12 / GIB},
        "tokens/s": {u: 1.0 for u in ("tok/s", "tokens/s")} | {u: 1e3 for u in ("tok/ms", "tokens/ms")},
        "requests/s": {u: 1.0 for u in ("req/s", "requests/s")},
        "USD": {"usd": 1.0, "$": 1.0, "cent": 0.01, "cents": 0.01},
        "fraction": {"%": 0.01},
        "GPUs": {"gpu": 1.0, "gpus": 1.0},
        "tokens": {"tokens": 1.0, "tok": 1.0, "token": 1.0},
        "": {},
    }
)
_QUANTITY = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\S.*?)?\s*")


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, on one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def listed(values: Sequence[Any], most: int = 12) -> str:
    """`1, 2, 4, ...`: the values an error message allows."""
    head = ", ".join(str(v) for v in values[:most])
    return head + (", ..." if len(values) > most else "")


def nearest(name: object, known: Sequence[str], kind: str) -> str:
    """`unknown key 'tpp' (nearest: tp, pp)`."""
    near = difflib.get_close_matches(str(name).lower(), known, n=3, cutoff=0.4)
    label = "nearest" if near else "allowed"
    return f"unknown {kind} {shown(name)} ({label}: {listed(near or list(known), 20)})"


def number(value: Any, unit: str = "", low: float = 0.0, high: float = LARGEST, open_low: bool = False) -> float:
    """A finite number within [low, high], written plainly or as a string with a unit: 2000, "2 s", "90 %"."""
    span = f"{low:g} to {high:g}" if not open_low else f"more than {low:g}, up to {high:g}"
    allowed = f"(allowed: {span}{' ' + unit if unit not in ('', 'fraction') else ''})"
    quoted = shown(value)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{shown(value)} is not a number {allowed}")
    scale = 1.0
    if isinstance(value, str):
        match = _QUANTITY.fullmatch(value)
        if match is None:
            raise ValueError(f"{shown(value)} is not a number {allowed}")
        written = (match[2] or "").lower().replace(" ", "").replace("µ", "u")
        scales = UNITS[unit]
        if written and written not in scales:
            units = listed(list(scales), 20) or "none, write a plain number"
            raise ValueError(f"{shown(value)}: unit {match[2]!r} does not belong here (allowed: {units})")
        scale, value = scales.get(written, 1.0), float(match[1].replace("_", ""))
    try:
        result = float(value) * scale
    except OverflowError:
        raise ValueError(f"{quoted} is too large {allowed}") from None
    if not math.isfinite(result):
        raise ValueError(f"{quoted} is not a finite number {allowed}")
    if not low <= result <= high or (open_low and result == low):
        raise ValueError(f"{quoted} is out of range {allowed}")
    return result


def integer(value: Any, unit: str = "", low: int = 1, high: int = LARGEST) -> int:
    """A whole number within [low, high]."""
    result = number(value, unit, low, high)
    if not result.is_integer():
        raise ValueError(f"{shown(value)} is not a whole number (allowed: whole numbers from {low})")
    return int(result)


def numbers(value: Any, one: Callable[[Any], float]) -> tuple[float, ...]:
    """The values of an axis: one value, a list, or a range {min, max} with `step`, `factor`, or of powers of two."""
    if isinstance(value, Mapping):
        return _range(value, one)
    if not isinstance(value, list | tuple):
        return (one(value),)
    if not value:
        raise ValueError("an empty list has no values; name at least one, or leave the axis out for its default")
    if len(value) > MOST_VALUES:
        raise ValueError(f"{len(value)} values are more than {MOST_VALUES}; use fewer, or a range with a larger step")
    return distinct(tuple(one(v) for v in value))


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values as given; one that is listed twice is refused, for its plans would count twice."""
    if len(set(values)) < len(values):
        seen: set[Any] = set()
        again = next(v for v in values if v in seen or seen.add(v))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(again)} is listed twice; name each value once")
    return values


def _range(spec: Mapping[Any, Any], one: Callable[[Any], float]) -> tuple[float, ...]:
    known = ("min", "max", "step", "factor")
    for key in spec:
        if key not in known:
            raise ValueError(nearest(key, known, "key of a range"))
    for key in ("min", "max"):
        if key not in spec:
            raise ValueError(
                f"a range needs {key!r} (write {{min: 1, max: 64, step: 1}} or {{min: 1, max: 64, factor: 2}})"
            )
    low, high = one(spec["min"]), one(spec["max"])
    if low > high:
        raise ValueError(f"min {low:g} is more than max {high:g}, which leaves no values; swap them")
    if "step" in spec and "factor" in spec:
        raise ValueError("a range takes 'step' or 'factor', not both")
    whole = isinstance(low, int) and isinstance(high, int)
    if "step" in spec:
        values = _stepped(low, high, number(spec["step"], low=0.0, open_low=True), whole)
    elif "factor" in spec:
        values = _scaled(low, high, number(spec["factor"], low=1.0, open_low=True), whole)
    else:
        if low <= 0 or not whole:
            raise ValueError("a range of powers of two starts at 1 or more; give 'step' or 'factor' for other ranges")
        values = tuple(2**k for k in range(int(high).bit_length()) if low <= 2**k <= high)
    if not values:
        raise ValueError(f"no value lies between min {low:g} and max {high:g}; widen the range")
    return values


def _fits(count: float) -> None:
    if count > MOST_VALUES:
        raise ValueError(f"a range of {count:.3g} values is more than {MOST_VALUES}; use a larger step or factor")


def _stepped(low: float, high: float, step: float, whole: bool) -> tuple[float, ...]:
    if whole and not float(step).is_integer():
        raise ValueError(f"step {step:g} is not a whole number, as this axis's values are")
    _fits((high - low) / step + 1)
    if whole:
        return tuple(range(int(low), int(high) + 1, int(step)))
    return tuple(round(low + i * step, 12) for i in range(int((high - low) / step + 1e-9) + 1))


def _scaled(low: float, high: float, factor: float, whole: bool) -> tuple[float, ...]:
    if low <= 0:
        raise ValueError("a range with 'factor' starts above 0; give 'step' instead")
    _fits(math.log(high / low) / math.log(factor) + 1)
    values, x = [], float(low)
    while x <= high * (1 + 1e-9):
        values.append(min(round(x), int(high)) if whole else min(x, high))
        x *= factor
    return tuple(dict.fromkeys(values))


def choices(value: Any, known: Sequence[str], aliases: Mapping[str, str], kind: str) -> tuple[str, ...]:
    """The values of an axis of names: one, a list, or `all`."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if items == [ALL]:
        return tuple(known)
    if not items:
        raise ValueError(f"an empty list has no values (allowed: {listed(known, 20)})")
    result = []
    for item in items:
        name = str(item).strip().lower() if isinstance(item, str) else ""
        name = aliases.get(name, name)
        if name not in known:
            raise ValueError(nearest(item, known, kind))
        result.append(name)
    return distinct(tuple(result))


def trace_means(path: str) -> dict[str, float]:
    """Mean lengths of a trace, whole tokens, and the share of prompt tokens that its prefixes are."""
    try:
        trace = read_trace(path)
    except InputError as error:
        raise ValueError(f".trace: {error}") from None
    prompt, answer = float(trace.input_tokens.mean()), float(trace.output_tokens.mean())
    return {
        "isl": max(round(prompt), 1),
        "osl": max(round(answer), 1),
        "prefix_hit": float(trace.prefix_tokens.mean()) / prompt,
    }


def lengths(data: Mapping[str, Any], names: Sequence[str] = ("isl", "osl")) -> dict[str, Any]:
    """A workload's keys with every `isl: {mean, cv}` told apart: `isl`, `isl_cv`."""
    out = dict(data)
    for name in names:
        given = out.get(name)
        if isinstance(given, Mapping):
            for key in given:
                if key not in ("mean", "cv"):
                    raise ValueError(f".{name}: {nearest(key, ('mean', 'cv'), 'key of a distribution')}")
            if "mean" not in given:
                raise ValueError(f".{name}: a distribution needs its 'mean'; write {{mean: 1000, cv: 0.8}}")
            out |= {name: given["mean"], f"{name}_cv": given.get("cv", 0.0)}
    return out


def switches(value: Any) -> tuple[bool, ...]:
    """The values of an on/off axis."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    if items == [ALL]:
        return (False, True)
    if not items or any(not isinstance(item, bool) for item in items):
        raise ValueError(f"{shown(value)} is not true or false (allowed: true, false, [false, true])")
    return distinct(tuple(items))
