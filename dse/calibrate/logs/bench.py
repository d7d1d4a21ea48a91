"""Results of `vllm bench serve` (benchmark_serving.py) and of SGLang's bench_serving: one lineage, nearly one format.

Fields as written by vllm-project/vllm, vllm/benchmarks/serve.py at 009e6d4 (--save-result; --append-result: one object
a line) and sgl-project/sglang, python/sglang/bench_serving.py at 0033168 (--output-file: JSON lines). Times are in ms,
`duration` in s. TPOT is a request's (latency - TTFT)/(output tokens - 1), requests of one token left out; ITL the time
between chunks. Totals are of completed requests. `request_rate` is "inf" (vLLM) or Infinity (SGLang) where nothing but
`max_concurrency` holds requests back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dse.calibrate.logs.run import SAYABLE, Run, Stats
from dse.errors import InputError

_STAT = re.compile(r"(mean|median|std|p[\d.]+)_(ttft|tpot|itl|e2el|e2e_latency)_ms")
# The client's name for an API that one engine alone serves; "vllm", "openai", "sglang-oai" are any engine's.
_ENGINES = {"sglang-native": "sglang", "trt": "trtllm", "tensorrt-llm": "trtllm"}


def is_vllm(data: Mapping[str, Any]) -> bool:
    return {"model_id", "completed", "total_input_tokens"} <= data.keys()


def is_sglang(data: Mapping[str, Any]) -> bool:
    return {"backend", "completed", "mean_e2e_latency_ms"} <= data.keys() and "model_id" not in data


def vllm(data: Mapping[str, Any]) -> Run:
    """`--metadata KEY=VALUE` writes keys of the user's own: those with our columns' names are read (`version` too)."""
    backend = str(data.get("backend") or data.get("endpoint_type") or "").lower()
    said = {name: str(data[name]) for name in SAYABLE if data.get(name) not in (None, "")}
    said.setdefault("model", str(data["model_id"]))
    said.setdefault("engine", _ENGINES.get(backend, ""))
    said.setdefault("engine_version", str(data.get("version") or ""))
    if "mean_ttft_ms" not in data and "median_ttft_ms" not in data:
        return _run(
            data, "vllm bench serve", said, unusable="no TTFT: a pooling run, or --percentile-metrics without it"
        )
    failed = data.get("failed")  # older versions leave it out
    lost = float(data["num_prompts"]) - float(data["completed"]) if failed is None and "num_prompts" in data else 0.0
    return _run(
        data,
        "vllm bench serve",
        said,
        failed=max(lost, 0.0) if failed is None else float(failed),
        speculated=bool(data.get("spec_decode_acceptance_length")),
        unusable="a ramp of request rates: no one load" if data.get("ramp_up_strategy") else "",
    )


def sglang(data: Mapping[str, Any]) -> Run:
    """The model is not in the file; backend `sglang` is the engine's own API (so is `sglang-native`)."""
    backend = str(data["backend"]).lower()
    said = {"engine": "sglang" if backend == "sglang" else _ENGINES.get(backend, "")}
    random = str(data.get("dataset_name", "")).startswith("random")
    return _run(
        data,
        "sglang bench_serving",
        {name: value for name, value in said.items() if value},
        speculated=bool(data.get("accept_length")) and float(data["accept_length"]) > 1.0,
        asked_osl=float(data.get("random_output_len") or math.nan) if random else math.nan,
    )


def _run(data: Mapping[str, Any], tool: str, said: Mapping[str, str], **rest: Any) -> Run:
    found: dict[str, dict[str, float]] = {}
    for key, value in data.items():
        match = _STAT.fullmatch(key)
        if match and isinstance(value, (int, float)) and not isinstance(value, bool):
            found.setdefault(match[2], {})[match[1]] = float(value)
    e2e: Stats = found.get("e2el") or found.get("e2e_latency") or {}
    completed, seconds = _number(data, "completed"), _number(data, "duration")
    rate, cap = _float(data.get("request_rate")), _float(data.get("max_concurrency"))
    if data.get("request_rate") == "trace":
        rest["unusable"] = "arrivals of a trace: no closed loop"
    return Run(
        tool=tool,
        said=said,
        isl=_number(data, "total_input_tokens") / max(completed, 1.0),
        osl=_number(data, "total_output_tokens") / max(completed, 1.0),
        completed=completed,
        ttft=found.get("ttft", {}),
        tpot=found.get("tpot", {}),
        e2e=e2e,
        chunk_ms=found.get("itl", {}).get("mean", math.nan),
        max_concurrency=None if math.isnan(cap) else cap,
        request_rate=rate if math.isfinite(rate) else None,
        throughput=completed / seconds if seconds > 0 else math.nan,
        **{"failed": 0.0, **rest},
    )


def _number(data: Mapping[str, Any], name: str) -> float:
    value = _float(data.get(name))
    if math.isnan(value):
        raise InputError(f"{name}: {data.get(name)!r} is not a number; is the file whole?")
    return value


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


__all__ = ["is_sglang", "is_vllm", "sglang", "vllm"]
