"""Coefficient sets: the cited physics, and sets fitted to measurements, as factors on it by level.

A coefficient of a case is the base value times one factor for each level that knows the case: GPU generation, GPU,
engine, engine version, model (how well engines run its architecture), deployment (what its runs were set up like, which
nobody records). What nobody measured has no factor of its own and keeps what the levels above say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dse.catalog.uncertainty import Uncertainty, read_uncertainty
from dse.cost.coefficients import Coefficients
from dse.errors import InputError, unknown
from dse.files import load_yaml, yaml_text

PHYSICS = "physics"  # the cited defaults of `cost.coefficients`
BEST = "measured"  # the set used where none is named
KERNELS = "kernels"  # the file of `kernel_coefficients`, which is no such set
LEVELS = ("generation", "gpu", "engine", "version", "model", "deployment")
_NAMES = tuple(f.name for f in fields(Coefficients))
# What an engine does by default where the set's numbers are of another's kernels, by (generation, engine). TensorRT-LLM
# exchanges MoE tokens inside an NVLink domain of Blackwell from all SMs, one-sidedly, where DeepEP has twenty SMs and
# a handshake (blog 18 of its documentation, "Optimizing MoE Communication with One-Sided AlltoAll Over NVLink").
ONE_SIDED = {
    "dispatch_sms": 148.0,
    "link_dispatch": 0.80,
    "dispatch_base": 12e-6,
    "dispatch_fill": 1e-7,
    "combine_base": 2e-6,  # and 18 us for a token's way
}
ENGINE_DEFAULTS = {(generation, "trtllm"): ONE_SIDED for generation in ("blackwell", "blackwell-ultra")}
# From a prefill worker to a decode worker of a served engine: routed once more, blocks agreed upon, taken in between
# two steps. No microbenchmark shows it: seconds beyond prefill and queue of lightly loaded split deployments under
# Dynamo (0.08 TensorRT-LLM to 0.25 vLLM; one number, for the series of one engine differ as much).
HANDOFF = {"transfer_base": 0.1}
HANDED_ON = frozenset(("trtllm", "sglang", "vllm"))
# Where physics sets a limit, whatever the data say and the factors multiply to.
BOUNDS = {
    "memory": (0.2, 1.0),
    "expert_memory": (0.2, 1.0),
    "cohort": (0.001, 1.0),
    "turns": (0.3, 10.0),
    "idle_seats": (0.0, 1.0),
    "arrival_overhead": (0.0, 0.5),  # seconds; what waits longer was compiled or queued, which no request brings along
    "core_memory": (0.2, 1.0),
    "imbalance": (1.0, 4.0),
    "reserved_output": (0.02, 1.0),
    "utilisation": (0.0, 1.0),
    "partial_overlap": (0.0, 1.0),
}


@dataclass(frozen=True)
class CoefficientSet:
    """A base, and factors: level -> key (hopper, h100, vllm) -> coefficient -> factor."""

    name: str
    base: Mapping[str, float] = field(default_factory=dict)
    factors: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    uncertainty: Uncertainty | None = None

    def of(
        self,
        generation: str = "",
        gpu: str = "",
        engine: str = "",
        version: str = "",
        model: str = "",
        deployment: str = "",
    ) -> Coefficients:
        """The coefficients of one case; unknown keys have no factor. See `version_key`, `deployment_key`."""
        values = {name: getattr(Coefficients(), name) for name in _NAMES} | dict(self.base)
        keys = dict(zip(LEVELS, (generation, gpu, engine, version, model, deployment), strict=True))
        for level, key in keys.items():
            for name, factor in self.factors.get(level, {}).get(key, {}).items():
                values[name] = values[name] * factor
        defaults = ENGINE_DEFAULTS.get((generation, engine), {}) | (HANDOFF if engine in HANDED_ON else {})
        values |= {name: value for name, value in defaults.items() if not self._says(name, keys)}
        for name, (low, high) in BOUNDS.items() if self.factors else ():
            values[name] = min(max(values[name], low), high)
        return Coefficients(**values)

    def _says(self, name: str, keys: Mapping[str, str]) -> bool:
        """Whether the set speaks of a coefficient under this engine: at its levels, or in a base that is not pooled."""
        pooled = bool(self.factors) and name in ONE_SIDED
        own = (self.factors.get(level, {}).get(keys[level], {}) for level in ("engine", "version", "deployment"))
        return (name in self.base and not pooled) or any(name in table for table in own)

    def known(self, **keys: str) -> str:
        """The set and the levels that spoke (arguments of `of`): `measured: hopper, h100, vllm, vllm 0.15.1`."""
        spoke = [keys[level] for level in LEVELS if keys.get(level, "") in self.factors.get(level, {})]
        return self.name + (f": {', '.join(spoke)}" if spoke else "")


def version_key(engine: str, version: str) -> str:
    """An engine's version as a level's key: `vllm 0.15.1` of v0.15.1.post2; "" where it is not a number.

    With the third number, since SGLang counts its releases in it: eight of them, and as many months, are all 0.5.
    """
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version.strip().lower())
    return f"{engine} {found[1]}.{found[2]}.{found[3] or 0}" if found and engine else ""


def deployment_key(engine: str, version: str, model: str, gpu: str) -> str:
    """A model under one (version of an) engine on one GPU type: `vllm 0.12.0 Qwen3-32B h100`; "" without an engine."""
    return " ".join((version or engine, model, gpu)) if engine else ""


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
    return read(path.stem, str(path), yaml_text(path))


@cache
def shipped() -> tuple[str, ...]:
    """Names of the sets that come with dse."""
    folder = files("dse.catalog") / "coefficients"
    if not folder.is_dir():
        return ()
    names = (item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))
    return tuple(sorted(name for name in names if name != KERNELS))


@cache
def _shipped(name: str) -> CoefficientSet:
    return read(name, name, (files("dse.catalog") / "coefficients" / f"{name}.yaml").read_text())


def read(name: str, where: str, text: str) -> CoefficientSet:
    """Parse a set: `base` and `factors` by level, or plain `name: value` lines. One InputError names all problems."""
    data = load_yaml(text, where)
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
    uncertainty = read_uncertainty(data["uncertainty"], _NAMES, problems) if whole and "uncertainty" in data else None
    if problems:
        raise InputError(f"{where}: " + "; ".join(problems))
    return CoefficientSet(
        name=name, base=_floats(base), factors=factors, about=data.get("about", {}), uncertainty=uncertainty
    )


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
