"""Tables of single kernels as cases: what each column means, and why a row cannot be priced.

Columns are those of the public operator tables: heads and kv heads are one rank's, `step` counts cached tokens,
`num_tokens` those of the whole expert-parallel group, `inter_size` is undivided. `latency` is never read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from dse.batches import at_rows
from dse.catalog.hardware import gpu, gpus, to_device
from dse.catalog.kernel_coefficients import KERNELS
from dse.catalog.schema import GpuEntry
from dse.cost.attention_kernels import AttentionCase
from dse.cost.kernels import ExpertsCase, GemmCase
from dse.cost.types import Device, stack
from dse.errors import InputError, unknown
from dse.units import BYTES_PER_ELEMENT, RATES

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
VENDORS = ("nvidia", "amd")  # the formulas are of thread blocks on SMs; a TPU has none


@dataclass(frozen=True)
class Precision:
    """Operands of a kernel, and the precision whose fitted coefficients it uses."""

    fitted: str
    rate: str
    weight: float  # bytes an element
    act: float


def _precision(fitted: str, weight: str, act: str, rate: str = "") -> Precision:
    return Precision(fitted, rate or act, BYTES_PER_ELEMENT[weight], BYTES_PER_ELEMENT[act])


_COMMON = {
    "bfloat16": _precision("bfloat16", "bf16", "bf16"),
    "fp8": _precision("fp8", "fp8", "fp8"),
    "fp8_block": _precision("fp8_block", "fp8", "fp8"),
}
# Precisions that nobody measured use the fitted values of their nearest kin; bytes and rate are their own.
PRECISIONS: Mapping[str, Mapping[str, Precision]] = MappingProxyType(
    {
        "gemm": _COMMON
        | {
            "nvfp4": _precision("nvfp4", "fp4", "fp4"),
            "sq": _precision("sq", "int8", "int8"),
            "int8_wo": _precision("int8_wo", "int8", "bf16"),
            "int4_wo": _precision("int4_wo", "int4", "bf16"),
            "w4a16_mxfp4": _precision("int4_wo", "mxfp4", "bf16"),
            "w4a8_mxfp4_mxfp8": _precision("fp8", "mxfp4", "fp8"),
            "w4afp8": _precision("fp8", "int4", "fp8"),
        },
        "moe": _COMMON
        | {
            "w4a16_mxfp4": _precision("w4a16_mxfp4", "mxfp4", "bf16"),
            "w4a8_mxfp4_mxfp8": _precision("w4a8_mxfp4_mxfp8", "mxfp4", "fp8"),
            "w4a8_mxfp4_fp8": _precision("w4a8_mxfp4_mxfp8", "mxfp4", "fp8"),
            "nvfp4": _precision("w4a8_mxfp4_mxfp8", "fp4", "fp4"),
            "w4afp8": _precision("fp8", "int4", "fp8"),
            "int8_wo": _precision("bfloat16", "int8", "bf16"),
            "int4_wo": _precision("w4a16_mxfp4", "int4", "bf16"),
        },
        "attention": {  # the cache, or the operands
            "bfloat16": _precision("bfloat16", "bf16", "bf16"),
            "fp8": _precision("fp8", "fp8", "fp8"),
            "int8": _precision("fp8", "int8", "fp8"),
            "nvfp4": _precision("fp8", "fp4", "fp8"),
        },
    }
)
_SPELLINGS = {"bf16": "bfloat16", "float16": "bfloat16", "fp16": "bfloat16", "half": "bfloat16", "fp8_static": "fp8"}


@dataclass(frozen=True)
class Column:
    """A whole number of a table: its least value, and what stands in where the column or the cell is absent."""

    name: str
    least: int = 1
    default: int | None = None


_ATTENTION = (Column("batch_size"), Column("num_heads"), Column("step", 0, 0))
COLUMNS: Mapping[str, tuple[Column, ...]] = MappingProxyType(
    {
        "gemm": (Column("m"), Column("n"), Column("k")),
        "context_attention": (
            *_ATTENTION,
            Column("isl"),
            Column("num_key_value_heads"),
            Column("head_dim"),
            Column("window_size", 0, 0),
            Column("beam_width", 1, 1),
        ),
        "generation_attention": (
            *_ATTENTION,
            Column("isl", 1, 1),
            Column("num_key_value_heads"),
            Column("head_dim"),
            Column("window_size", 0, 0),
            Column("beam_width", 1, 1),
        ),
        "context_mla": (*_ATTENTION, Column("isl")),
        "generation_mla": (*_ATTENTION, Column("isl", 1, 1)),
        "moe": (
            Column("num_tokens"),
            Column("hidden_size"),
            Column("inter_size"),
            Column("topk"),
            Column("num_experts"),
            Column("moe_tp_size", 1, 1),
            Column("moe_ep_size", 1, 1),
        ),
    }
)
LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType(  # text columns; the first is needed
    {
        "gemm": ("gemm_dtype",),
        "context_attention": ("kv_cache_dtype", "attn_dtype"),
        "generation_attention": ("kv_cache_dtype", "attn_dtype"),
        "context_mla": ("kv_cache_dtype", "mla_dtype"),
        "generation_mla": ("kv_cache_dtype", "mla_dtype"),
        "moe": ("moe_dtype", "distribution", "kernel_source"),
    }
)


@dataclass(frozen=True)
class KernelCases:
    """The rows of a table that can be priced, as arrays; `rows` their positions, `reasons` of all rows ("" priced)."""

    op: str
    case: Any  # GemmCase, AttentionCase or ExpertsCase
    device: Device
    gpu: Array
    generation: Array
    precision: Array  # whose fitted coefficients are used
    rows: Array
    reasons: Array

    def __len__(self) -> int:
        return len(self.rows)

    def keys(self) -> list[tuple[str, str, str]]:
        """(precision, generation, gpu) of each row, as `KernelSet.rows` asks."""
        return list(zip(self.precision, self.generation, self.gpu))


def read_cases(op: str, table: pd.DataFrame) -> KernelCases:
    """Read a table of an operator. InputError where a needed column is absent; a bad row gets a reason."""
    if op not in KERNELS:
        raise unknown("operator", op, KERNELS)
    needed = ["gpu", *(c.name for c in COLUMNS[op] if c.default is None), LABELS[op][0]]
    missing = [name for name in needed if name not in table]
    if missing:
        raise InputError(f"{op}: the table has no column {', '.join(missing)}; it needs {', '.join(needed)}")
    reasons = np.full(len(table), "", dtype=object)
    numbers = {c.name: _whole(table, c, reasons) for c in COLUMNS[op]}
    _relations(op, numbers, reasons)
    machine = _each(_text(table, ["gpu"]), _machine, reasons)
    operand = _each(_text(table, LABELS[op]), lambda *labels: _operands(op, *labels), reasons)
    rows = np.flatnonzero(reasons == "")
    machines, operands = machine[rows], operand[rows]
    distinct = {id(found): found for found in machines}
    place = {key: i for i, key in enumerate(distinct)}
    code = np.array([place[id(found)] for found in machines], dtype=int)
    devices = stack([to_device(found) for found in distinct.values()] or [to_device(gpus()[0])])
    return KernelCases(
        op=op,
        case=_case(op, {name: values[rows] for name, values in numbers.items()}, operands),
        device=at_rows(devices, code),
        gpu=np.array([found.name for found in machines], dtype=object),
        generation=np.array([found.generation for found in machines], dtype=object),
        precision=np.array([found.fitted for found in operands], dtype=object),
        rows=rows,
        reasons=reasons,
    )


# ------------------------------------------------------------------------------------------------- cells


def _refuse(reasons: Array, where: Array, reason: Any) -> None:
    """The first thing wrong with a row is its reason. `reason`: a text, or one a row of the table."""
    free = where & (reasons == "")
    reasons[free] = reason if isinstance(reason, str) else np.asarray(reason, dtype=object)[free]


def _whole(table: pd.DataFrame, column: Column, reasons: Array) -> Array:
    """A column of whole numbers as floats; absent cells take the default."""
    import pandas as pd

    if column.name not in table:
        return np.full(len(table), float(column.default or 0))
    cells = table[column.name]
    values = pd.to_numeric(cells, errors="coerce").to_numpy(float, na_value=np.nan)
    if column.default is not None:
        values = np.where(cells.isna().to_numpy(bool), float(column.default), values)
    good = np.isfinite(values) & (values >= column.least) & (values == np.floor(values)) & (values < 1e12)
    shown = np.array([f"{column.name}: {cell!r} is no whole number from {column.least} on" for cell in cells[~good]])
    text = np.full(len(table), "", dtype=object)
    text[~good] = shown
    _refuse(reasons, ~good, text)
    return np.where(good, values, 1.0)


def _text(table: pd.DataFrame, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Cells of text columns, row by row; "" where a column or a cell is absent."""
    columns = [
        table[name].astype(object).where(table[name].notna(), "").map(str).str.strip() if name in table else None
        for name in names
    ]
    return list(zip(*([""] * len(table) if column is None else column for column in columns)))


def _each(cells: list[tuple[str, ...]], meaning: Callable[..., Any], reasons: Array) -> Array:
    """What each row's labels mean; `meaning` is asked once for each distinct text, and its InputError is the reason."""
    found: dict[tuple[str, ...], Any] = {}
    wrong: dict[tuple[str, ...], str] = {}
    for labels in dict.fromkeys(cells):
        try:
            found[labels] = meaning(*labels)
        except InputError as error:
            wrong[labels] = str(error)
    _refuse(reasons, np.array([labels in wrong for labels in cells], bool), [wrong.get(labels, "") for labels in cells])
    result = np.full(len(cells), None, dtype=object)
    for i, labels in enumerate(cells):
        result[i] = found.get(labels)
    return result


def _machine(name: str) -> GpuEntry:
    if not name:
        raise InputError("gpu: missing; `dse gpus` lists them")
    entry = gpu(name)
    if entry.vendor not in VENDORS:
        raise InputError(f"gpu: {entry.name} has no kernel formulas (they are of GPUs: {', '.join(VENDORS)})")
    return entry


def _relations(op: str, n: Mapping[str, Array], reasons: Array) -> None:
    """What must hold between the columns of a row."""
    if "num_key_value_heads" in n:
        uneven = n["num_heads"] % n["num_key_value_heads"] > 0
        _refuse(reasons, uneven, "num_heads is no multiple of num_key_value_heads")
        _refuse(reasons, n["beam_width"] > 1, "beam_width: only 1 is priced")
    if op == "moe":
        _refuse(reasons, n["topk"] > n["num_experts"], "topk exceeds num_experts")
        _refuse(reasons, n["moe_ep_size"] > n["num_experts"], "moe_ep_size exceeds num_experts")
        _refuse(reasons, n["moe_tp_size"] > n["inter_size"], "moe_tp_size exceeds inter_size")


# ---------------------------------------------------------------------------------------------- operands


@dataclass(frozen=True)
class Operands:
    """The labels of a row as numbers. Attention: `weight` is an element of the cache."""

    fitted: str
    rate: float
    weight: float
    act: float
    skew: float = 0.0
    matrices: float = 3.0


def _operands(op: str, first: str, *others: str) -> Operands:
    """Of (dtype), (cache, operands), or (dtype, distribution, kernel)."""
    kind = op if op in PRECISIONS else "attention"
    precision = _known(kind, first)
    fitted, rate = precision.fitted, precision.rate
    if op.startswith(("context", "generation")):
        multiplies = _known(kind, others[0] or "bfloat16")
        rate = multiplies.rate
        if op == "context_attention":  # 8-bit products go with an 8-bit cache in every kernel measured
            fitted = "fp8/fp8" if multiplies.fitted == "fp8" else f"bfloat16/{precision.fitted}"
    moe = {"skew": _skew(others[0]), "matrices": 2.0 if "nongated" in others[1] else 3.0} if op == "moe" else {}
    return Operands(fitted, float(RATES.index(rate)), precision.weight, precision.act, **moe)


def _known(kind: str, name: str) -> Precision:
    key = _SPELLINGS.get(name.lower(), name.lower())
    if key not in PRECISIONS[kind]:
        raise unknown("precision", name, PRECISIONS[kind])
    return PRECISIONS[kind][key]


def _skew(distribution: str) -> float:
    """The exponent of a power law of expert loads; 0 where they are balanced."""
    name = distribution.lower()
    if name in ("", "balanced", "uniform"):
        return 0.0
    found = re.fullmatch(r"power_law_(\d+(?:\.\d+)?)", name)
    if not found or not 0 < float(found[1]) <= 5:
        raise InputError(f"distribution: {distribution!r} is neither balanced nor power_law_x with 0 < x <= 5")
    return float(found[1])


def _case(op: str, n: Mapping[str, Array], operands: Array) -> Any:
    """The operator's case of arrays."""
    rate = np.array([o.rate for o in operands], float)
    weight, act = np.array([o.weight for o in operands], float), np.array([o.act for o in operands], float)
    if op == "gemm":
        return GemmCase(m=n["m"], n=n["n"], k=n["k"], weight_bytes=weight, act_bytes=act, rate=rate)
    if op == "moe":
        return ExpertsCase(
            tokens=n["num_tokens"],
            hidden=n["hidden_size"],
            width=n["inter_size"] / n["moe_tp_size"],
            matrices=np.array([o.matrices for o in operands], float),
            top_k=n["topk"],
            experts=n["num_experts"],
            ep=n["moe_ep_size"],
            skew=np.array([o.skew for o in operands], float),
            weight_bytes=weight,
            act_bytes=act,
            rate=rate,
        )
    none = np.zeros_like(rate)
    return AttentionCase(
        batch=n["batch_size"],
        heads=n["num_heads"],
        kv_heads=n.get("num_key_value_heads", n["num_heads"]),
        head_dim=n.get("head_dim", none),
        tokens=n["isl"],
        cached=n["step"],
        window=n.get("window_size", none),
        kv_bytes=weight,
        rate=rate,
    )


__all__ = ["COLUMNS", "LABELS", "PRECISIONS", "KernelCases", "read_cases"]
