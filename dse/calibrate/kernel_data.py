"""Tables of single kernels as rows to fit, the times that the formulas say, and the least that hardware allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dse.batches import at_rows
from dse.catalog.kernel_coefficients import KERNELS, KernelSet
from dse.cost.attention_kernels import context_attention, context_mla, generation_attention, generation_mla
from dse.cost.kernels import experts, gemm
from dse.errors import InputError
from dse.programs import program
from dse.space.kernel_cases import COLUMNS, LABELS, KernelCases, read_cases
from dse.units import MS

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray


def _experts(c: Any, case: Any, device: Any, warm: Any) -> Any:
    return experts(c, case, device)


FORMULAS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "gemm": gemm,
        "context_attention": context_attention,
        "generation_attention": generation_attention,
        "context_mla": context_mla,
        "generation_mla": generation_mla,
        "moe": _experts,
    }
)
TOO_FAST = 0.5  # of the least time the hardware allows


@dataclass(frozen=True)
class KernelData:
    """Rows to fit: cases, log seconds, and what was refused with its reason by row of the table."""

    cases: KernelCases
    log_time: Array
    refused: Mapping[int, str]

    @property
    def op(self) -> str:
        return self.cases.op

    def __len__(self) -> int:
        return len(self.cases)


# ------------------------------------------------------------------------------------------------ reading


def read_kernels(op: str, table: pd.DataFrame) -> KernelData:
    """Rows that can serve a fit; the others are listed with their reason, never dropped silently.

    Refused: what cannot be priced (see `read_cases`), a latency (ms) that is absent or not positive, one under half of
    what the data sheet allows (cached reads considered), and all but the first row of the same case.
    """
    import pandas as pd

    cases = read_cases(op, table)
    if "latency" not in table:
        raise InputError(f"{op}: the table has no column latency (ms); a fit needs it")
    reasons = cases.reasons.copy()
    measured = pd.to_numeric(table["latency"], errors="coerce").to_numpy(float, na_value=np.nan)[cases.rows] * MS
    usable = np.isfinite(measured) & (measured > 0)
    reasons[cases.rows[~usable]] = "latency: missing, or not above 0"
    least = floor(cases)
    fast = usable & (measured < TOO_FAST * least)
    for i in np.flatnonzero(fast):
        said, allowed = f"{measured[i] / MS:.3g} ms", f"{least[i] / MS:.3g} ms"
        reasons[cases.rows[i]] = f"latency: {said}, under half of the {allowed} that the data sheet allows"
    again = table.iloc[cases.rows][_said(table, op)].duplicated().to_numpy(bool) & usable & ~fast
    reasons[cases.rows[again]] = "an earlier row says the same"
    keep = usable & ~fast & ~again
    refused = {int(i): str(reasons[i]) for i in np.flatnonzero(reasons != "")}
    return KernelData(cases=subset(cases, keep), log_time=np.log(measured[keep]), refused=refused)


def floor(cases: KernelCases) -> Array:
    """Seconds that no kernel can beat: a GPU that reaches its data sheet and launches at once.

    Of experts, which the routing may touch or not, one a rank and the mean number of tokens are sure.
    """
    if cases.op == "moe":
        cases = replace(cases, case=replace(cases.case, skew=np.zeros(len(cases)), experts=cases.case.ep))
    return times(cases.op, _ideal(cases.op, len(cases)), cases, warm=1.0)


def _ideal(op: str, n: int) -> Any:
    """Coefficients of a perfect machine: all shares 1, no latency, no waste."""
    ones = {"peak_share", "memory_share", "bytes_share", "query_passes"}
    divisors = {"split", "plain_split", "resident", "plain_resident", "wave_ratio", "split_keys", "most_splits"}
    divisors |= {"wave_heads", "full_rows"}
    values = {f.name: 1.0 if f.name in ones | divisors else 0.0 for f in fields(KERNELS[op])}
    values |= {name: 16384.0 for name in ("flops", "plain_flops") if name in values}  # twice any tensor core's
    values |= {"l2_rate": 64.0, "l2_share": 3.0} if "l2_rate" in values else {}
    return KERNELS[op](**{name: np.full(n, value) for name, value in values.items()})


def _said(table: pd.DataFrame, op: str) -> list[str]:
    """Columns that tell one measurement from another."""
    names = ("gpu", "engine", "version", "tp_size", *(c.name for c in COLUMNS[op]), *LABELS[op])
    return [name for name in dict.fromkeys((*names, "kernel_source")) if name in table]


def shapes(cases: KernelCases) -> Array:
    """A number for each distinct shape: equal ones, on whatever GPU and in whatever precision, share it."""
    import pandas as pd

    numbers = [getattr(cases.case, f.name) for f in fields(cases.case) if not f.name.endswith("bytes")]
    return pd.DataFrame(dict(enumerate(n for n in numbers))).groupby(list(range(len(numbers)))).ngroup().to_numpy()


def subset(cases: KernelCases, keep: Array) -> KernelCases:
    part = at_rows((cases.case, cases.device), keep)
    labels = {name: getattr(cases, name)[keep] for name in ("gpu", "generation", "precision", "rows")}
    return replace(cases, case=part[0], device=part[1], **labels)


# ----------------------------------------------------------------------------------------------- predicting


@cache
def _timing(op: str) -> Callable[..., Any]:
    return program(FORMULAS[op], in_axes=(0, 0, 0, None))


def times(op: str, coefficients: Any, cases: KernelCases, warm: float) -> Array:
    """Seconds of every case by coefficients of every row."""
    with jax.enable_x64(True):
        return np.asarray(_timing(op)(coefficients, cases.case, cases.device, float(warm)))


def predict(coefficients: KernelSet, cases: KernelCases, warm: float = 1.0) -> Array:
    """Seconds of every case; `warm` 1 as benchmarks measure, 0 as serving runs."""
    return times(cases.op, coefficients.rows(cases.op, cases.keys()), cases, warm)


__all__ = ["FORMULAS", "KernelData", "floor", "predict", "read_kernels", "shapes", "subset", "times"]
