"""Numbers as people write them in plans ("~0.5 GB", "4000-5000 tokens/ms", "<5%", "8GB (fixed)"), and back to text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from dse.audit.types import Quantity, Span
from dse.space.values import shown

_KILO, _KIBI = 1e3, 1024.0
_BYTES = {f"{p}b": _KILO ** (i + 1) for i, p in enumerate("kmgt")}
_BYTES |= {f"{p}ib": _KIBI ** (i + 1) for i, p in enumerate("kmgt")} | {"bytes": 1.0, "byte": 1.0}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "second": 1.0, "seconds": 1.0, "min": 60.0}
_TOKENS = ("tokens", "token", "tok")

# dimension -> spellings -> SI
UNITS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "bytes": _BYTES,
        "seconds": _SECONDS,
        "share": {"%": 0.01, "percent": 0.01},
        "tokens/s": {f"{t}/{s}": 1.0 / v for t in _TOKENS for s, v in _SECONDS.items() if s != "min"},
        "bytes/s": {f"{b}/s": v for b, v in _BYTES.items()} | {f"{b}ps": v for b, v in _BYTES.items()},
        "FLOP/s": {f"{p}{f}": 1e9 * k for p, k in (("g", 1), ("t", 1e3), ("p", 1e6)) for f in ("flop/s", "flops")},
        "parameters": {
            f"{p}{w}": k
            for p, k in (("b", 1e9), ("m", 1e6), ("t", 1e12))
            for w in ("", " params", " parameters", "-parameter", "-param")
        }
        | {"billion": 1e9, "million": 1e6, "parameters": 1.0, "params": 1.0},
        "ratio": {"x": 1.0, "×": 1.0},
        "GPUs": {"gpus": 1.0, "gpu": 1.0},
        "tokens": dict.fromkeys(_TOKENS, 1.0),
        "count": {"layers": 1.0, "experts": 1.0, "sequences": 1.0, "operations": 1.0, "heads": 1.0},
    }
)
# "GB" may have been meant in binary units.
_LOOSE = {f"{p}b": (_KIBI / _KILO) ** (i + 1) for i, p in enumerate("kmgt")}
_OF_UNIT = {unit: (dimension, scale) for dimension, units in UNITS.items() for unit, scale in units.items()}
_NUMBER = r"\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?"
_UNIT = "|".join(re.escape(u) for u in sorted(_OF_UNIT, key=len, reverse=True))
QUANTITY = re.compile(
    rf"(?P<sign><=|>=|[<>≤≥~≈]|\babout\b|\bunder\b|\bover\b|\bmore than\b|\bless than\b)?\s*"
    rf"(?<![\w.])(?P<low>{_NUMBER})(?:\s*(?:-|–|—|to)\s*(?P<high>{_NUMBER}))?"
    rf"\s*(?:(?P<unit>{_UNIT})(?![\w])(?P<per>\s*(?:/|per\s+|an?\s+)gpu\b)?)?",
    re.IGNORECASE,
)
_SIGNS = {"<": "<", "<=": "<", "≤": "<", "under": "<", "less than": "<", "~": "~", "≈": "~", "about": "~"}
_SIGNS |= {">": ">", ">=": ">", "≥": ">", "over": ">", "more than": ">"}


def find(text: str) -> Iterator[tuple[Quantity, re.Match[str]]]:
    """Every quantity of a text, in order. A bare number has the dimension ""."""
    for match in QUANTITY.finditer(text.replace("µ", "u").replace("μ", "u")):
        unit = (match["unit"] or "").lower()
        dimension, scale = _OF_UNIT.get(unit, ("", 1.0))
        if dimension == "bytes/s" and re.match(r"[KMGT]b", match["unit"]):  # "400 Gb/s" is bits
            scale /= 8.0
        low = _plain(match["low"]) * scale
        high = low if match["high"] is None else _plain(match["high"]) * scale
        sign = _SIGNS.get((match["sign"] or "").lower(), "")
        yield (
            Quantity(
                low=min(low, high),
                high=max(low, high),
                dimension=dimension,
                sign=sign,
                per_gpu=match["per"] is not None and dimension == "tokens/s",
                loose=_LOOSE.get(unit, 1.0),
            ),
            match,
        )


def _plain(text: str) -> float:
    return float(text.replace(",", "").replace("_", ""))


def quantity(value: Any, dimension: str) -> Quantity:
    """A value of one dimension: "8 GB", [20 ms, 25 ms], "<5%", or a plain number where no unit is needed."""
    if isinstance(value, list) and len(value) == 2:
        ends = [quantity(v, dimension) for v in value]
        return Quantity(
            low=min(e.low for e in ends), high=max(e.high for e in ends), dimension=dimension, loose=ends[1].loose
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if dimension in ("bytes", "seconds", "tokens/s", "bytes/s", "FLOP/s"):
            raise ValueError(f"{shown(value)} has no unit; write it with one of {_some(dimension)}")
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{shown(value)} is out of range (allowed: numbers from 0)")
        return Quantity(low=float(value), high=float(value), dimension=dimension)
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not a quantity; write a number with one of {_some(dimension)}")
    found = [q for q, _ in find(value)]
    if len(found) != 1:
        raise ValueError(f"{shown(value)} is not one quantity; write a number with one of {_some(dimension)}")
    one = found[0]
    if one.dimension == "" and dimension in ("parameters", "ratio", "GPUs", "tokens", "count"):
        return Quantity(low=one.low, high=one.high, dimension=dimension, sign=one.sign)
    if one.dimension == "" and dimension == "share" and one.high <= 1.0:
        return Quantity(low=one.low, high=one.high, dimension=dimension, sign=one.sign)
    if one.dimension != dimension:
        raise ValueError(f"{shown(value)} is not in {dimension} (allowed units: {_some(dimension)})")
    return one


def amount(value: Any, dimension: str, high: float = math.inf) -> float:
    """One number > 0 of a dimension: hardware and sizes are not ranges."""
    q = quantity(value, dimension)
    if q.low != q.high or q.sign or not 0 < q.low <= high:
        span = "above 0" if math.isinf(high) else f"above 0, up to {high:g}"
        raise ValueError(f"{shown(value)} is not one number (allowed: {span}, in {_some(dimension)})")
    return q.low


def _some(dimension: str) -> str:
    """A few spellings of a dimension's units."""
    usual = {
        "bytes": "MB, GB, MiB, GiB, TB",
        "seconds": "us, ms, s",
        "share": "%",
        "tokens/s": "tokens/s, tokens/ms, tokens/ms/GPU",
        "bytes/s": "GB/s, TB/s",
        "FLOP/s": "TFLOP/s",
        "parameters": "B, M",
        "ratio": "x",
    }
    return usual.get(dimension, dimension)


# ------------------------------------------------------------------------------------------------ to text


def digits(x: float, n: int = 3) -> str:
    """n significant digits without an exponent."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    places = max(0, n - 1 - math.floor(math.log10(abs(float(f"{x:.{n - 1}e}")))))
    text = f"{x:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def said(x: float, dimension: str) -> str:
    """A number in the unit that reads best."""
    if dimension == "bytes":
        return _scaled(x, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0)))
    if dimension == "seconds":
        return _scaled(x, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)))
    if dimension == "share":
        return f"{digits(100 * x)}%"
    if dimension == "tokens/s":
        return f"{digits(x / 1e3)} tokens/ms" if x >= 1e4 else f"{digits(x)} tokens/s"
    if dimension == "parameters":
        return f"{round(x)} parameters" if x < 1e9 else f"{digits(x / 1e9)}B parameters"
    if dimension == "FLOP":
        return _scaled(x, (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)))
    return f"{digits(x)}{'x' if dimension == 'ratio' else ' ' + dimension if dimension else ''}"


def _scaled(x: float, units: tuple[tuple[str, float], ...]) -> str:
    name, size = next(((n, s) for n, s in units if abs(x) >= s), units[-1])
    return f"{digits(x / size)} {name}"


def between(span: Span, dimension: str) -> str:
    """`67.4 to 84.1 MB`, or one number where both ends read the same."""
    low, high = said(span[0], dimension), said(span[1], dimension)
    if low == high:
        return low
    unit = high.partition(" ")[2]
    if dimension == "tokens/s" and unit == "tokens/ms" and not low.endswith(unit):
        low = f"{digits(span[0] / 1e3)} {unit}"
    same = unit and low.partition(" ")[2] == unit
    return f"{low.removesuffix(' ' + unit) if same else low} to {high}"


__all__ = ["QUANTITY", "UNITS", "amount", "between", "digits", "find", "quantity", "said"]
