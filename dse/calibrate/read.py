"""Files of measurements, told apart by what is in them, as the tables that a calibration takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dse.calibrate.logs import FORMATS, checked, is_log, load_json, read_log, sidecar
from dse.calibrate.sources import Refusal
from dse.errors import InputError
from dse.files import read_csv, read_parquet

SERVING, STEPS, COLLECTIVES, NCCL_TESTS = "serving", "steps", "collectives", "nccl_tests"
# Columns that tell a table: all of a set must be there. Of two that fit, the one with more columns counts.
TABLES: tuple[tuple[str, frozenset[str]], ...] = (
    (SERVING, frozenset({"model", "gpu", "isl", "osl", "measured_ttft_ms", "measured_tpot_ms"})),
    (STEPS, frozenset({"model", "tp", "cycle_us", "batch_prefill_tokens", "batch_decode_tokens"})),
    (COLLECTIVES, frozenset({"system", "op", "num_workers", "devices_per_node", "message_bytes", "median_ms"})),
    (COLLECTIVES, frozenset({"op", "gpu", "n_ranks", "n_nodes", "time_us"})),
    ("gemm", frozenset({"gpu", "gemm_dtype", "m", "n", "k", "latency"})),
    ("attention", frozenset({"gpu", "attn_dtype", "kv_cache_dtype", "batch_size", "isl", "step", "latency"})),
    ("mla", frozenset({"gpu", "mla_dtype", "num_heads", "batch_size", "isl", "step", "latency"})),
    ("moe", frozenset({"gpu", "moe_dtype", "num_tokens", "hidden_size", "inter_size", "latency"})),
    ("nccl", frozenset({"gpu", "nccl_dtype", "op_name", "num_gpus", "message_size", "latency"})),
    ("custom_allreduce", frozenset({"gpu", "allreduce_dtype", "num_gpus", "message_size", "latency"})),
    ("wideep_deepep_ll", frozenset({"gpu", "num_token", "dispatch_avg_t_us", "combine_avg_t_us"})),
    ("wideep_deepep_normal", frozenset({"gpu", "num_token", "dispatch_transmit_us", "combine_transmit_us"})),
)
TEXT = frozenset({SERVING})  # read as text cells, as `dse estimate` reads its cases
HEADINGS = ("nccl-tests", "out-of-place", "# Using devices")  # of what nccl-tests print


@dataclass(frozen=True)
class Tables:
    """What a set of files holds, one frame a kind or None; the column `file` names the file of each row.

    `collectives`: DGX tables (`num_workers`) and tables across nodes (`n_ranks`), the other's columns empty. `kernels`:
    tables of single operators by name, those of NCCL, custom all-reduce, DeepEP and nccl-tests (`nccl_tests`) among
    them. `refused`: rows that cannot serve, with the reason; `source` is the file's name, `row` counts from 0 in it.
    """

    serving: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    collectives: pd.DataFrame | None = None
    kernels: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    refused: tuple[Refusal, ...] = ()


def read_files(paths: Sequence[str | Path], given: Mapping[str, str] | None = None) -> Tables:
    """Read files of any kind that is known: tables (CSV, parquet), results of benchmark tools, nccl-tests' output.

    `given`: columns that files do not say (`{"gpu": "h100", "tp": "8"}`); a sidecar `<file>.yaml` goes before it. Rows
    that stand in another file (or the same) to the letter are listed, not used twice. Raises InputError for a file that
    is none of the known kinds, and where not one row is left.
    """
    found: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    refused: list[Refusal] = []
    for path in (Path(p) for p in paths):
        kind, frame, unfit = _read(path, given or {})
        refused += unfit
        if len(frame):
            found.setdefault(kind, []).append((path.name, frame))
    tables = {kind: _together(parts, refused) for kind, parts in found.items()}
    if SERVING in tables:  # a column that another file has is empty text here, as `estimate` reads it
        tables[SERVING] = tables[SERVING].astype(object).fillna("")
    if not tables:
        why = f": {refused[0].source}: {refused[0].reason}" if refused else ""
        raise InputError(f"no row of {', '.join(str(p) for p in paths) or 'nothing'} can serve{why}")
    return Tables(
        serving=tables.pop(SERVING, None),
        steps=tables.pop(STEPS, None),
        collectives=tables.pop(COLLECTIVES, None),
        kernels=tables,
        refused=tuple(refused),
    )


def _read(path: Path, given: Mapping[str, str]) -> tuple[str, pd.DataFrame, list[Refusal]]:
    """(kind, rows, refusals) of one file."""
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'does not exist'}; give a file")
    if path.suffix == ".parquet":
        return *_table(path, _filled(read_parquet(path), path, given)), []
    start = path.read_bytes()[:4096].decode("utf-8-sig", errors="replace").lstrip()
    if start[:1] in ("{", "["):
        return _log(path, given)
    if start.startswith("#") and any(heading in start for heading in HEADINGS):
        return NCCL_TESTS, _nccl_tests(path, given), []
    return *_table(path, _filled(_csv(path), path, given)), []


def _filled(frame: pd.DataFrame, path: Path, given: Mapping[str, str]) -> pd.DataFrame:
    """What a table does not say, as given: columns that it lacks."""
    said = {**checked(given, "--given"), **sidecar(path)}
    return frame.assign(**{name: value for name, value in said.items() if name not in frame})


def _log(path: Path, given: Mapping[str, str]) -> tuple[str, pd.DataFrame, list[Refusal]]:
    if not all(is_log(data) for data in load_json(path)):
        raise _cannot_tell(path, "a JSON file of another kind")
    result = read_log(path, given)
    frame = pd.DataFrame(list(result.rows)).astype(object)
    text = frame.map(lambda value: "" if pd.isna(value) else f"{value:.9g}" if isinstance(value, float) else str(value))
    return SERVING, text, [Refusal(row, reason, path.name) for row, reason in result.refused]


def _nccl_tests(path: Path, given: Mapping[str, str]) -> pd.DataFrame:
    from dse.calibrate.nccl_tests import read_nccl_tests

    try:
        return read_nccl_tests(path.read_text(encoding="utf-8", errors="replace"), gpu=given.get("gpu"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _table(path: Path, frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """(kind, frame) by the columns. Prefill and decode attention have the same ones: decode has one new token a row."""
    columns = set(frame.columns)
    fits = [(len(needed), kind) for kind, needed in TABLES if needed <= columns]
    if not fits:
        near = max(TABLES, key=lambda table: len(table[1] & columns) / len(table[1]))
        missing = ", ".join(sorted(near[1] - columns))
        raise _cannot_tell(path, f"its columns come nearest to {near[0]}, which needs {missing} as well")
    kind = max(fits)[1]
    if kind in ("attention", "mla"):
        one_token = bool((pd.to_numeric(frame["isl"], errors="coerce") == 1).all())
        kind = f"{'generation' if one_token else 'context'}_{kind}"
    if kind not in TEXT:
        return kind, frame
    return kind, frame.astype(object).where(frame.notna(), "").map(str)


def _csv(path: Path) -> pd.DataFrame:
    try:
        serving = "measured_tpot_ms" in read_csv(path, nrows=0).columns
        return read_csv(path, dtype=str if serving else None)
    except InputError as error:
        raise _cannot_tell(path, str(error).removeprefix(f"{path}: ")) from None


def _cannot_tell(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: cannot tell what it is: {why}. Known: serving runs (CSV in the columns of `dse estimate` with "
        "measured_ttft_ms and measured_tpot_ms), engine steps (CSV with cycle_us), collectives (CSV, or the text that "
        f"nccl-tests prints), kernel tables (CSV or parquet), {'; '.join(FORMATS)}"
    )


def _together(parts: Sequence[tuple[str, pd.DataFrame]], refused: list[Refusal]) -> pd.DataFrame:
    """One frame of several files; a row that was there already is listed with the file that had it first."""
    names = [name for name, frame in parts for _ in range(len(frame))]
    rows = [row for _, frame in parts for row in range(len(frame))]
    whole = pd.concat([frame for _, frame in parts], ignore_index=True)
    key = pd.util.hash_pandas_object(whole, index=False)
    first: dict[Any, int] = {}
    for i, value in enumerate(key):
        first.setdefault(value, i)
    again = [i for i, value in enumerate(key) if first[value] != i]
    refused += [
        Refusal(rows[i], f"the same row as row {rows[first[key[i]]]} of {names[first[key[i]]]}", names[i])
        for i in again
    ]
    return whole.assign(file=names).drop(index=again).reset_index(drop=True)


__all__ = ["COLLECTIVES", "SERVING", "STEPS", "TABLES", "Tables", "read_files"]
