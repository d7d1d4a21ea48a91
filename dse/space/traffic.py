"""The traffic that deployments make: what a GPU sends over each level of its network, one deployment a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet
from dse.cost.evaluate import Scenario, estimate_one
from dse.cost.serving import accepted_of
from dse.cost.traffic import KINDS, Traffic, traffic_of
from dse.cost.types import Number
from dse.errors import InputError
from dse.programs import program
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.units import GB


def _one(x: Scenario) -> tuple[Traffic, Number]:
    """At the rate that the closed loop of `concurrency` requests reaches; its tokens/s, with rejected drafts."""
    load = x.load
    rate = estimate_one(x).request_rate / x.plan.replicas
    draft, accepted = load.drafted, accepted_of(load)
    tokens = rate * (load.isl * (1.0 - load.prefix_hit) + (load.osl - 1.0) * (1.0 + draft) / accepted)
    return traffic_of(x, tokens / x.plan.attention_dp), tokens


@lru_cache(maxsize=1)
def _batched() -> Any:
    return program(_one, in_axes=0)


def traffic_cases(cases: pd.DataFrame, coefficients: CoefficientSet) -> pd.DataFrame:
    """The input columns, `computed_tok_s` of a replica, and GB/s that its mean GPU sends over each level.

    `reduce_l0_gb_s`, `exchange_l0_gb_s`, `pipeline_l0_gb_s` stay inside the innermost unit (a node's NVLink); `_l1`
    leave it, `_l2` leave that unit's unit, and so on (the same byte counts in every level it passes). At the rate that
    the row's `concurrency` reaches, as `estimate` has it. Bad rows have a `reason`, and so do split deployments and
    those with cp > 1. Raises InputError where required columns are missing.
    """
    rows = [_countable(row) for row in parse_cases(cases)]
    valid = [i for i, row in enumerate(rows) if isinstance(row, Case)]
    result: dict[str, Any] = {}
    if valid:
        with jax.enable_x64(True):
            batch = scenarios_of([row for row in rows if isinstance(row, Case)], coefficients)
            sent, tokens = jax.tree.map(np.asarray, _batched()(batch))
        found = {"computed_tok_s": tokens}
        for level in range(sent.reduce.shape[1]):
            found |= {f"{kind}_l{level}_gb_s": getattr(sent, kind)[:, level] / GB for kind in KINDS}
        for name, values in found.items():
            result[name] = np.full(len(rows), np.nan)
            result[name][valid] = values
    result["reason"] = [row if isinstance(row, str) else "" for row in rows]
    kept = cases.drop(columns=[name for name in result if name in cases.columns])
    return pd.concat([kept.reset_index(drop=True), pd.DataFrame(result)], axis=1)


def _countable(row: Case | str) -> Case | str:
    if isinstance(row, Case) and row.plan["cp"] > 1:
        return f"cp: {row.plan['cp']:g}; the traffic of a sharded sequence is not counted (allowed: 1)"
    return row


def traffic(row: Mapping[str, Any], coefficients: CoefficientSet) -> dict[str, float]:
    """The traffic of one deployment, by column of `traffic_cases`. Raises InputError with its reason."""
    found = traffic_cases(pd.DataFrame([dict(row)]), coefficients).iloc[0]
    if found["reason"]:
        raise InputError(f"row: {found['reason']}")
    return {str(name): float(found[name]) for name in found.index if str(name).endswith(("_gb_s", "computed_tok_s"))}


__all__ = ["traffic", "traffic_cases"]
