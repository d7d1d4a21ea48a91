"""A benchmark tool's result file -> rows of a serving table; and what a person says beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dse.calibrate.logs.aiperf import aiperf, is_aiperf
from dse.calibrate.logs.bench import is_sglang, is_vllm, sglang, vllm
from dse.calibrate.logs.inference_perf import inference_perf, is_inference_perf
from dse.calibrate.logs.run import SAYABLE, Run, to_row
from dse.errors import InputError, unknown
from dse.files import read_yaml

FORMATS = (
    "vLLM `bench serve --save-result` or benchmark_serving.py (JSON)",
    "SGLang bench_serving --output-file (JSON lines)",
    "GenAI-Perf or AIPerf profile_export_*.json",
    "inference-perf stage_N_lifecycle_metrics.json",
)


@dataclass(frozen=True)
class LogRows:
    """Rows that can serve, and (number of the run in the file, reason) of those that cannot."""

    rows: tuple[dict[str, object], ...]
    refused: tuple[tuple[int, str], ...]


def is_log(data: Any) -> bool:
    """Whether a JSON value is a result of a benchmark tool that is read here."""
    return isinstance(data, Mapping) and any(test(data) for test in (is_vllm, is_sglang, is_aiperf, is_inference_perf))


def read_log(path: Path, given: Mapping[str, str] | None = None) -> LogRows:
    """Every run of a result file as a row (`run.to_row`), or why not.

    `given` holds for every file; a sidecar `<file>.yaml` for its own, and goes before it. Raises InputError where the
    file is none of FORMATS or a given column is not known.
    """
    runs = load_json(path)
    said = {**checked(given or {}, "--given"), **sidecar(path)}
    rows, refused = [], []
    for i, data in enumerate(runs):
        if not is_log(data):
            raise InputError(f"{path}: not a result of a benchmark tool (known: {'; '.join(FORMATS)})")
        try:
            rows.append(to_row(_run(data, path), said))
        except InputError as error:
            refused.append((i, str(error)))
    return LogRows(tuple(rows), tuple(refused))


def _run(data: Mapping[str, Any], path: Path) -> Run:
    if is_inference_perf(data):
        return inference_perf(data, path)
    if is_aiperf(data):
        return aiperf(data)
    return vllm(data) if is_vllm(data) else sglang(data)


def load_json(path: Path) -> list[Any]:
    """The objects of a JSON file, or of a file of one JSON object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from None
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        try:
            return [json.loads(line) for line in lines] if len(lines) > 1 else _broken(path, error)
        except (ValueError, RecursionError):
            return _broken(path, error)
    return list(whole) if isinstance(whole, list) else [whole]


def _broken(path: Path, error: Exception) -> list[Any]:
    raise InputError(f"{path}: not JSON ({error}); is the file whole?")


def sidecar(path: Path) -> dict[str, str]:
    """What `<file>.yaml` says of a log: columns and values."""
    beside = path.with_name(path.name + ".yaml")
    if not beside.is_file():
        return {}
    data = read_yaml(beside)
    if not isinstance(data, Mapping):
        raise InputError(f"{beside}: holds no columns; write one a line (gpu: h100)")
    return checked({str(key): str(value) for key, value in data.items() if value is not None}, str(beside))


def checked(given: Mapping[str, str], where: str) -> dict[str, str]:
    """The same with known columns only; an unknown one is an error that names the nearest."""
    for name in given:
        if name not in SAYABLE:
            raise unknown("column", name, SAYABLE, where)
    return {name: str(value).strip() for name, value in given.items() if str(value).strip()}


def parse_given(pairs: Sequence[str]) -> dict[str, str]:
    """`["gpu=h100", "tp=8"]` of a command line as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (equals and name.strip() and value.strip()):
            raise InputError(f"--given {pair!r}: write COLUMN=VALUE, as in --given gpu=h100")
        found[name.strip()] = value.strip()
    return checked(found, "--given")


__all__ = ["FORMATS", "LogRows", "checked", "is_log", "load_json", "parse_given", "read_log", "sidecar"]
