"""The files of a search: the front and the best plans as CSV, the report, and what is needed to repeat the run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd

from dse.files import atomic_write_all, output_directory
from dse.report.html import html
from dse.report.summary import Summary, summarise
from dse.search.result import SearchResult

DIGITS = 9  # significant, of a float in a CSV file


def write_outputs(result: SearchResult, out_dir: str | Path, summary: Summary | None = None) -> tuple[Path, ...]:
    """Write `pareto.csv`, `candidates.csv`, `report.html` and `run.json`: all of them, or none and an InputError."""
    from dse.search.run import describe_run

    folder = output_directory(out_dir)
    template = result.least if result.least is not None else result.candidates
    contents = {
        "pareto.csv": csv(result.front, template),
        "candidates.csv": csv(result.candidates, template),
        "report.html": html(summary or summarise(result)),
        "run.json": json.dumps(_plain(describe_run(result)), indent=2, ensure_ascii=False) + "\n",
    }
    files = {folder / name: text for name, text in contents.items()}
    atomic_write_all(files)
    return tuple(files)


def csv(frame: pd.DataFrame, template: pd.DataFrame | None = None) -> str:
    """A frame as CSV, columns in its order; where nothing was found, the header alone (of `template`)."""
    if not len(frame.columns) and template is not None and len(template.columns):
        frame = template.iloc[:0]
    if not len(frame.columns):
        return ""
    return str(frame.to_csv(index=False, float_format=f"%.{DIGITS}g", lineterminator="\n"))


def _plain(data: Any) -> Any:
    """Values that JSON has: NaN and infinities become null, NumPy numbers Python's."""
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if hasattr(data, "item"):
        data = data.item()
    return None if isinstance(data, float) and not math.isfinite(data) else data


__all__ = ["csv", "write_outputs"]
