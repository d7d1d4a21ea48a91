"""A machine that nobody measured, from about ten runs: two or three numbers of it, everything else as the set says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from dse.calibrate.parameters import FREE
from dse.calibrate.read import Tables
from dse.calibrate.run import sources_of
from dse.calibrate.sources import Source
from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.errors import InputError, unknown

Array = np.ndarray
# What differs most between machines: how fast memory really is, the gaps between kernels, what a step waits for.
# How far a new machine may differ from what is known, as shares of what was doubtful before any run: far more than the
# machines of a joint fit, whose rows are many and whose models differ too.
NEW_MACHINE = {"rate": 0.9, "launch": 0.3, "schedule": 0.3, "network": 0.5, "admission": 0.7, "setting": 1.0}
USUAL = ("memory", "kernel_decode", "step_overhead")


def few_shot(
    tables: Tables | pd.DataFrame, known: CoefficientSet, only: Sequence[str] = USUAL, name: str = "few-shot"
) -> CoefficientSet:
    """`known` with the coefficients `only` fitted anew for each GPU of the tables, as factors at the GPU's level.

    Their prior is what `known` says of the case, as wide as machines may differ. Robust as the whole fit is.
    InputError: a coefficient that is not fitted, rows that cannot serve.
    """
    names = [f.name for f in FREE]
    for one in only:
        if one not in names:
            raise unknown("coefficient", one, names, "--only")
    if not only:
        raise InputError(f"--only: is empty; name coefficients such as {','.join(USUAL)}")
    sources = sources_of(tables, rest=known)
    gpus = sorted({gpu for s in sources for gpu in s.labels["gpu"]})
    place = np.array([names.index(one) for one in only])
    spread = np.array([NEW_MACHINE[FREE[i].kind] * FREE[i].doubt for i in place])
    logs = [_logs(s, known, names) for s in sources]
    which = [np.array([gpus.index(gpu) for gpu in s.labels["gpu"]]) for s in sources]

    def moved(i: int, x: Array) -> Array:
        shifted = logs[i].copy()
        shifted[:, place] += (x.reshape(len(gpus), -1) * spread)[which[i]]
        return shifted

    def residuals(x: Array) -> Array:
        parts = [x]
        for i, s in enumerate(sources):
            error = (s.log_seconds(moved(i, x)) - s.measured) / s.scale * np.sqrt(s.weight)
            parts.append(error[np.isfinite(s.measured)])
        return np.concatenate(parts)

    def jacobian(x: Array) -> Array:
        parts = [np.eye(len(x))]
        for i, s in enumerate(sources):
            slope = s.slopes(moved(i, x))[:, :, place] * (spread / s.scale[:, None]) * np.sqrt(s.weight)
            blocks = slope[:, :, None, :] * np.eye(len(gpus))[which[i]][:, None, :, None]
            parts.append(blocks.reshape(*slope.shape[:2], -1)[np.isfinite(s.measured)])
        return np.concatenate(parts)

    found = least_squares(residuals, np.zeros(len(gpus) * len(place)), jac=jacobian, loss="soft_l1")
    factors = np.exp(found.x.reshape(len(gpus), -1) * spread)
    rows = sum(len(s) for s in sources)
    return replace(
        known,
        name=name,
        factors={**known.factors, "gpu": _times(known.factors.get("gpu", {}), gpus, only, factors)},
        about={
            "date": date.today().isoformat(),
            "from": known.name,
            "rows": rows,
            "fitted": {gpu: dict(zip(only, np.round(f, 4).tolist(), strict=True)) for gpu, f in zip(gpus, factors)},
        },
    )


def _logs(s: Source, known: CoefficientSet, names: Sequence[str]) -> Array:
    """What the set says of each row: log coefficients (n, F)."""
    keys = [tuple(s.labels[level][i] for level in LEVELS) for i in range(len(s))]
    table = {key: np.log([float(getattr(known.of(*key), name)) for name in names]) for key in set(keys)}
    return np.stack([table[key] for key in keys])


def _times(
    old: Mapping[str, Mapping[str, float]], gpus: Sequence[str], only: Sequence[str], factors: Array
) -> dict[str, dict[str, float]]:
    result = {gpu: dict(table) for gpu, table in old.items()}
    for gpu, values in zip(gpus, factors, strict=True):
        table = result.setdefault(gpu, {})
        for name, value in zip(only, values, strict=True):
            table[name] = float(f"{table.get(name, 1.0) * value:.5g}")
    return result


__all__ = ["USUAL", "few_shot"]
