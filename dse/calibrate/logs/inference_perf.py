"""`stage_N_lifecycle_metrics.json` and `summary_lifecycle_metrics.json` of inference-perf: seconds throughout.

Fields as written by kubernetes-sigs/inference-perf, inference_perf/reportgen/base.py at 010d12f. `load_summary` has
`concurrency` where a stage was a closed loop, else `requested_rate`; a summary mixes stages and has neither. Lengths
are `prompt_tokens`/`output_tokens` (as the server counts; `prompt_len`/`output_len` before). `time_per_output_token` is
over tokens, but earlier versions counted a streamed chunk's tokens with a BOS each (about twice, their issue 564), so
it is checked against latency, TTFT and length. Model and server stand in the `config.yaml` beside the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dse.calibrate.logs.run import Run, Stats
from dse.errors import InputError
from dse.files import read_yaml

_ENGINES = ("vllm", "sglang")  # `server.type`; tgi and mock are none of ours


def is_inference_perf(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("successes"), Mapping) and "failures" in data


def inference_perf(data: Mapping[str, Any], path: Path) -> Run:
    done, load = data["successes"], data.get("load_summary") or {}
    latency = done.get("latency") or {}
    rate = (done.get("throughput") or {}).get("requests_per_sec")
    summary = "concurrency" not in load and "requested_rate" not in load
    cap = load.get("concurrency")
    return Run(
        tool="inference-perf",
        said=_said(path),
        isl=_length(done, "prompt_tokens", "prompt_len"),
        osl=_length(done, "output_tokens", "output_len"),
        completed=float(done.get("count") or 0),
        failed=float((data["failures"] or {}).get("count") or 0),
        ttft=_milliseconds(latency, "time_to_first_token"),
        tpot=_milliseconds(latency, "time_per_output_token"),
        e2e=_milliseconds(latency, "request_latency"),
        chunk_ms=math.nan,  # intervals inside a chunk count as zero there
        max_concurrency=None if cap is None else float(cap),
        request_rate=None if cap is not None else float(load.get("requested_rate") or math.nan),
        throughput=float(rate) if rate else math.nan,
        unusable="a summary over stages has no one load; give its stage_N_lifecycle_metrics.json" if summary else "",
    )


def _said(path: Path) -> dict[str, str]:
    """What the run's own `config.yaml`, written beside the reports, says of model and server."""
    beside = path.parent / "config.yaml"
    if not beside.is_file():
        return {}
    whole = read_yaml(beside) or {}
    server = (whole.get("server") or {}) if isinstance(whole, Mapping) else whole
    if not isinstance(server, Mapping):
        raise InputError(f"{beside}: server: {server!r} is not keys with values; write server: {{type: vllm}}")
    said = {"model": server.get("model_name"), "engine": server.get("type") if server.get("type") in _ENGINES else None}
    return {name: str(value) for name, value in said.items() if value}


def _length(done: Mapping[str, Any], *names: str) -> float:
    for name in names:
        block = done.get(name)
        if isinstance(block, Mapping) and isinstance(block.get("mean"), (int, float)):
            return float(block["mean"])
    return math.nan


def _milliseconds(latency: Mapping[str, Any], name: str) -> Stats:
    block = latency.get(name)
    if not isinstance(block, Mapping):
        return {}
    return {key: float(value) * 1e3 for key, value in block.items() if isinstance(value, (int, float))}


__all__ = ["inference_perf", "is_inference_perf"]
