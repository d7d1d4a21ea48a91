"""A machine that nobody measured, from about ten runs: two or three numbers of it, everything else as the set says.

Each number is the machine's and, within narrower bounds, each deployment's own (a model under an engine): what one
model's runs show beside the others' stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.read import Tables
from dse.calibrate.run import sources_of
from dse.calibrate.sources import Source
from dse.catalog.coefficients import LEVELS, CoefficientSet
from dse.errors import InputError, unknown

Array = np.ndarray
# What differs most between machines: how fast memory really is, the gaps between kernels, what a step waits for.
USUAL = ("memory", "kernel_decode", "step_overhead")
# How far a new machine may differ from what is known, as shares of what was doubtful before any run: far more than the
# machines of a joint fit, whose rows are many and whose models differ too.
NEW_MACHINE = {"rate": 0.9, "launch": 0.3, "schedule": 0.3, "network": 0.5, "admission": 0.7, "setting": 1.0}
SPREAD = {"gpu": 1.0, "deployment": 0.7}  # of that, at each level


def few_shot(
    tables: Tables | pd.DataFrame, known: CoefficientSet, only: Sequence[str] = USUAL, name: str = "few-shot"
) -> CoefficientSet:
    """`known` with the coefficients `only` fitted anew for each GPU of the tables and each deployment on it.

    They are factors at these two levels. Their prior is what `known` says of the case, as wide as machines may
    differ. Robust as the whole fit is.
    InputError: a coefficient that is not fitted, rows that cannot serve.
    """
    names = [f.name for f in FREE]
    for one in only:
        if one not in names:
            raise unknown("coefficient", one, names, "--only")
    if not only:
        raise InputError(f"--only: is empty; name coefficients such as {','.join(USUAL)}")
    sources = sources_of(tables, rest=known)
    place = np.array([names.index(one) for one in only])
    logs = [_logs(s, known, names) for s in sources]
    labels = [{level: s.labels[level] if level in SPREAD else [""] * len(s) for level in LEVELS} for s in sources]
    layout = Layout.of(labels)
    blocks = layout.blocks[1:]  # the base is as it was
    doubt = np.array([NEW_MACHINE[FREE[i].kind] * FREE[i].doubt for i in place])
    wide = np.array([SPREAD[level] for level, _ in blocks])[:, None] * doubt  # (blocks, only)
    own = [layout.design(layout.codes(table))[:, 1:] for table in labels]

    def moved(i: int, x: Array) -> Array:
        shifted = logs[i].copy()
        shifted[:, place] += own[i] @ (x.reshape(wide.shape) * wide)
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
            slope = s.slopes(moved(i, x))[:, :, place] / s.scale[:, None] * np.sqrt(s.weight)
            whole = slope[:, :, None, :] * (own[i][:, :, None] * wide)[:, None]
            parts.append(whole.reshape(*slope.shape[:2], -1)[np.isfinite(s.measured)])
        return np.concatenate(parts)

    best = least_squares(residuals, np.zeros(wide.size), jac=jacobian, loss="soft_l1").x
    fitted = dict(zip(blocks, np.exp(best.reshape(wide.shape) * wide), strict=True))
    factors = {
        level: _times(known.factors.get(level, {}), only, {key: fitted[at, key] for at, key in blocks if at == level})
        for level in SPREAD
    }
    rows = sum(len(s) for s in sources)
    return replace(
        known,
        name=name,
        factors={**known.factors, **factors},
        about={
            "date": date.today().isoformat(),
            "from": known.name,
            "rows": rows,
            "fitted": {key: dict(zip(only, np.round(f, 4).tolist(), strict=True)) for (_, key), f in fitted.items()},
        },
    )


def _logs(s: Source, known: CoefficientSet, names: Sequence[str]) -> Array:
    """What the set says of each row: log coefficients (n, F)."""
    keys = [tuple(s.labels[level][i] for level in LEVELS) for i in range(len(s))]
    table = {key: np.log([float(getattr(known.of(*key), name)) for name in names]) for key in set(keys)}
    return np.stack([table[key] for key in keys])


def _times(
    old: Mapping[str, Mapping[str, float]], only: Sequence[str], factors: Mapping[str, Array]
) -> dict[str, dict[str, float]]:
    result = {key: dict(table) for key, table in old.items()}
    for key, values in factors.items():
        table = result.setdefault(key, {})
        for name, value in zip(only, values, strict=True):
            table[name] = float(f"{table.get(name, 1.0) * value:.5g}")
    return result


__all__ = ["USUAL", "few_shot"]
