"""Coefficient sets: the built-in physics defaults, and YAML files of the same names."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from dse.cost.coefficients import Coefficients
from dse.errors import InputError, unknown

PHYSICS = "physics"  # the cited defaults of `cost.coefficients`


def coefficients(name: str | None = None) -> Coefficients:
    """A set by name ("physics") or from a YAML file of `name: value` lines (others keep their defaults)."""
    if name is None or name == PHYSICS:
        return Coefficients()
    path = Path(name)
    if not path.suffix and not path.exists():
        raise unknown("coefficient set", name, [PHYSICS], "--coefficients", "or give a YAML file")
    return load_coefficients(path)


def load_coefficients(path: Path) -> Coefficients:
    """Read a file; one InputError names every key that is wrong."""
    try:
        data: Any = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({_first_line(error)}); write `name: value` lines") from None
    values = data.get("coefficients", data) if isinstance(data, dict) else None
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds no coefficients; write `name: value` lines such as `gemm_bf16: 0.75`")
    names = [f.name for f in fields(Coefficients)]
    problems = []
    for key, value in values.items():
        if key not in names:
            problems.append(str(unknown("coefficient", key, names)))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            problems.append(f"{key}: {value!r} is not a number from 0 on")
    if problems:
        raise InputError(f"{path}: " + "; ".join(problems))
    return Coefficients(**{key: float(value) for key, value in values.items()})


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
