"""Coefficients of single kernels: by operator, then precision, then level: base -> family -> generation -> GPU.

A level holds what differs from the level above it. A GPU nobody measured has its generation's values, a generation
nobody measured those of the one it descends from (`PARENTS`), and last of all the base. A precision that a GPU was not
measured with falls down the same path in that precision's own table: the generation's, the family's, the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dse.cost.attention_kernels import (
    ContextAttentionKernel,
    ContextMlaKernel,
    GenerationAttentionKernel,
    GenerationMlaKernel,
)
from dse.cost.kernels import ExpertsKernel, GemmKernel
from dse.errors import InputError, unknown
from dse.files import load_yaml, yaml_text

KERNELS: Mapping[str, type] = MappingProxyType(
    {
        "gemm": GemmKernel,
        "context_attention": ContextAttentionKernel,
        "generation_attention": GenerationAttentionKernel,
        "context_mla": ContextMlaKernel,
        "generation_mla": GenerationMlaKernel,
        "moe": ExpertsKernel,
    }
)
BASE = "base"
# Kernels split a long reduction over thread blocks, and copy asynchronously, from Hopper on; other vendors' chips of
# those years are taken to.
PARENTS: Mapping[str, str] = MappingProxyType(
    {
        "before_hopper": BASE,
        "hopper_on": BASE,
        "ampere": "before_hopper",
        "ada": "before_hopper",
        "hopper": "hopper_on",
        "blackwell": "hopper_on",
        "blackwell-ultra": "blackwell",
        "rubin": "blackwell",
        "cdna3": "hopper_on",
        "cdna4": "hopper_on",
    }
)
Values = Mapping[str, float]
Tables = Mapping[str, Mapping[str, Mapping[str, Values]]]  # operator -> precision -> level -> coefficient


def path_of(generation: str, gpu: str) -> tuple[str, ...]:
    """Levels that speak for a GPU, the most general first; a level that nobody measured is passed over."""
    levels = [gpu, generation]
    while levels[-1] in PARENTS:
        levels.append(PARENTS[levels[-1]])
    if levels[-1] != BASE:
        levels.append(BASE)
    return tuple(reversed(levels))


@dataclass(frozen=True)
class KernelSet:
    """Tables of coefficients in SI (latencies inside a kernel in cycles), and what they were fitted to."""

    name: str
    tables: Tables
    about: Mapping[str, Any] = field(default_factory=dict)

    def of(self, op: str, precision: str, generation: str = "", gpu: str = "") -> Any:
        """The coefficients of one GPU: a `KERNELS[op]` of floats."""
        table = self.tables[op][precision]
        merged = {name: value for level in path_of(generation, gpu) for name, value in table.get(level, {}).items()}
        return KERNELS[op](**merged)

    def known(self, op: str, precision: str, generation: str, gpu: str) -> str:
        """The most particular level that speaks for a GPU."""
        table = self.tables[op][precision]
        return next(level for level in reversed(path_of(generation, gpu)) if level in table)

    def rows(self, op: str, keys: Iterable[tuple[str, str, str]]) -> Any:
        """Coefficients of (precision, generation, gpu) rows: a `KERNELS[op]` of arrays."""
        keys = list(keys)
        distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        code = np.array([distinct[key] for key in keys], dtype=int)
        found = [self.of(op, *key) for key in distinct]
        names = [f.name for f in fields(KERNELS[op])]
        return KERNELS[op](**{name: np.array([getattr(c, name) for c in found], float)[code] for name in names})


def kernel_set(path: str | Path | None = None) -> KernelSet:
    """The set that comes with dse, or one from a YAML file."""
    return _shipped() if path is None else read(Path(path).stem, str(path), yaml_text(Path(path)))


@cache
def _shipped() -> KernelSet:
    name = "kernels.yaml"
    return read("kernels", name, (files("dse.catalog") / "coefficients" / name).read_text(encoding="utf-8"))


def read(name: str, where: str, text: str) -> KernelSet:
    """Parse a set; one InputError names all problems."""
    data = load_yaml(text, where)
    if not isinstance(data, dict) or not isinstance(data.get("kernels"), dict):
        raise InputError(f"{where}: holds no `kernels:` by operator; catalog/coefficients/kernels.yaml is such a file")
    problems = [problem for op, tables in data["kernels"].items() for problem in _problems(op, tables)]
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))
    return KernelSet(name=name, tables=data["kernels"], about=data.get("about", {}))


def _problems(op: str, tables: Any) -> list[str]:
    if op not in KERNELS:
        return [str(unknown("operator", op, KERNELS))]
    if not isinstance(tables, dict):
        return [f"{op}: {tables!r} is no mapping by precision"]
    wanted = {f.name for f in fields(KERNELS[op])}
    problems = []
    for precision, levels in tables.items():
        place = f"{op}.{precision}"
        if not isinstance(levels, dict) or not all(isinstance(values, dict) for values in levels.values()):
            problems.append(f"{place}: is no mapping by level of `name: value` lines")
            continue
        missing = wanted - set(levels.get(BASE, {}))
        if missing:
            problems.append(f"{place}.{BASE}: lacks {', '.join(sorted(missing))}")
        for level, values in levels.items():
            for key, value in values.items():
                if key not in wanted:
                    problems.append(str(unknown("coefficient", key, wanted, f"{place}.{level}")))
                elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    problems.append(f"{place}.{level}.{key}: {value!r} is not a number")
    return problems


__all__ = ["BASE", "KERNELS", "PARENTS", "KernelSet", "kernel_set", "path_of", "read"]
