"""Coefficient sets: the cited physics, and sets fitted to measurements, as factors on it by level.

A coefficient of a case is the base value times one factor for each level that knows the case: GPU generation, GPU,
engine. A GPU or engine that nobody measured has no factor of its own and keeps what the levels above say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dse.cost.coefficients import Coefficients
from dse.errors import InputError, unknown

PHYSICS = "physics"  # the cited defaults of `cost.coefficients`
BEST = "measured"  # the set used where none is named
LEVELS = ("generation", "gpu", "engine")
_NAMES = tuple(f.name for f in fields(Coefficients))
# Shares: never above one, whatever the factors multiply to.
_AT_MOST_ONE = frozenset(("reserved_output", "utilisation", "partial_overlap"))


@dataclass(frozen=True)
class CoefficientSet:
    """A base, and factors: level -> key (hopper, h100, vllm) -> coefficient -> factor."""

    name: str
    base: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def of(self, generation: str = "", gpu: str = "", engine: str = "") -> Coefficients:
        """The coefficients of one case; unknown keys have no factor."""
        values = {name: getattr(Coefficients(), name) for name in _NAMES} | dict(self.base)
        for level, key in zip(LEVELS, (generation, gpu, engine), strict=True):
            for name, factor in self.factors.get(level, {}).get(key, {}).items():
                values[name] = values[name] * factor
        for name in _AT_MOST_ONE:
            values[name] = min(values[name], 1.0)
        return Coefficients(**values)

    def known(self, generation: str = "", gpu: str = "", engine: str = "") -> str:
        """The set and the levels that spoke: `measured: hopper, h100, vllm`."""
        keys = [
            key
            for level, key in zip(LEVELS, (generation, gpu, engine), strict=True)
            if key in self.factors.get(level, {})
        ]
        return self.name + (f": {', '.join(keys)}" if keys else "")


def coefficient_set(name: str | Path | None = None) -> CoefficientSet:
    """A set by name ("physics", "measured") or from a YAML file; by default the best one that is shipped."""
    if name is None:
        name = BEST if BEST in shipped() else PHYSICS
    if name == PHYSICS:
        return CoefficientSet(PHYSICS)
    if name in shipped():
        return _shipped(str(name))
    path = Path(name)
    if not path.suffix and not path.exists():
        raise unknown("coefficient set", str(name), [PHYSICS, *shipped()], "--coefficients", "or give a YAML file")
    return read(path.stem, str(path), _text(path))


@cache
def shipped() -> tuple[str, ...]:
    """Names of the sets that come with dse."""
    folder = files("dse.catalog") / "coefficients"
    if not folder.is_dir():
        return ()
    return tuple(sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml")))


@cache
def _shipped(name: str) -> CoefficientSet:
    return read(name, name, (files("dse.catalog") / "coefficients" / f"{name}.yaml").read_text())


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({_first_line(error)}); give a YAML file") from None


def read(name: str, where: str, text: str) -> CoefficientSet:
    """Parse a set: `base` and `factors` by level, or plain `name: value` lines. One InputError names all problems."""
    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: cannot be read as YAML ({_first_line(error)}); write `name: value` lines") from None
    if not isinstance(data, dict) or not data:
        raise InputError(f"{where}: holds no coefficients; write `name: value` lines such as `gemm_bf16: 0.75`")
    whole = "base" in data or "factors" in data
    base = data.get("base", {}) if whole else data
    factors = data.get("factors", {}) if whole else {}
    problems = _wrong(base, "") if isinstance(base, dict) else ["base: is not `name: value` lines"]
    for level, table in factors.items():
        if level not in LEVELS:
            problems.append(str(unknown("level", level, LEVELS, "factors")))
            continue
        for key, values in table.items():
            problems += _wrong(values, f"factors.{level}.{key}.")
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))
    return CoefficientSet(name=name, base=_floats(base), factors=factors, about=data.get("about", {}))


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _wrong(values: Mapping[str, Any], place: str) -> list[str]:
    problems = []
    for key, value in values.items():
        if key not in _NAMES:
            problems.append(str(unknown("coefficient", key, _NAMES, place.rstrip("."))))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            problems.append(f"{place}{key}: {value!r} is not a number from 0 on")
    return problems


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
