"""`profile_export_genai_perf.json` and `profile_export_aiperf.json`: a block of statistics a metric, with its unit.

Fields as written by triton-inference-server/perf_analyzer, genai_perf/export_data/json_exporter.py at 09628cd
(statistics beside `input_config`, the command's arguments), and as ai-dynamo/aiperf documents its schema 1.5
(docs/reference/json-export-schema.md at 1554b47): `unit` says how a value is to be read. `inter_token_latency` is a
request's (latency - TTFT)/(output tokens - 1) in both, our TPOT. `input_config` has moved over the versions: model in
`model`, `endpoint.model_names` or `models.items[].name`; load in `concurrency`, `loadgen.concurrency` or the phase
`profiling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dse.calibrate.logs.run import Run, Stats
from dse.errors import InputError

_MS = {"ns": 1e-6, "us": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3, "seconds": 1e3}
_WORDS = {"avg": "mean", "p50": "median"}
_ENGINES = {"tensorrtllm": "trtllm", "vllm": "vllm"}  # of Triton's backends (service_kind triton)


def is_aiperf(data: Mapping[str, Any]) -> bool:
    return "input_config" in data and isinstance(data.get("request_latency"), Mapping)


def aiperf(data: Mapping[str, Any]) -> Run:
    config: Mapping[str, Any] = data["input_config"] or {}
    cap, rate = _load(config)
    osl, completed = _average(data, "output_sequence_length"), _average(data, "request_count")
    throughput = _average(data, "request_throughput")
    failed = _average(data, "error_request_count")
    asked = config.get("output_tokens_mean")
    kind = "AIPerf" if "aiperf_version" in data or "schema_version" in data else "GenAI-Perf"
    return Run(
        tool=f"{kind} {data.get('aiperf_version') or ''}".strip(),
        said=_said(config),
        isl=_average(data, "input_sequence_length"),
        osl=osl,
        completed=completed,
        failed=0.0 if math.isnan(failed) else failed,
        ttft=_milliseconds(data, "time_to_first_token"),
        tpot=_milliseconds(data, "inter_token_latency"),
        e2e=_milliseconds(data, "request_latency"),
        chunk_ms=_milliseconds(data, "inter_chunk_latency").get("mean", math.nan),
        asked_osl=float(asked) if isinstance(asked, (int, float)) and asked > 0 else math.nan,
        max_concurrency=cap,
        request_rate=rate,
        throughput=throughput,
        unusable="the run was cancelled" if data.get("was_cancelled") else "",
    )


def _said(config: Mapping[str, Any]) -> dict[str, str]:
    models = config.get("models")
    items = models.get("items") if isinstance(models, Mapping) else None
    named = [item.get("name") for item in items or [] if isinstance(item, Mapping)]
    endpoint = config.get("endpoint")
    named = named or (endpoint.get("model_names") if isinstance(endpoint, Mapping) else None) or []
    named = named or (config["model"] if isinstance(config.get("model"), list) else [config.get("model")])
    names = [str(name) for name in named if name]
    said = {"model": names[0]} if len(names) == 1 else {}
    if config.get("service_kind") == "triton" and config.get("backend") in _ENGINES:
        said["engine"] = _ENGINES[config["backend"]]
    return said


def _load(config: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """(cap on requests in flight, request rate) of the profiling phase."""
    places: list[Any] = [config, config.get("loadgen")]
    phases = config.get("phases")
    if isinstance(phases, list):
        places += [p for p in phases if isinstance(p, Mapping) and p.get("name") == "profiling"]
    cap = rate = None
    for place in places:
        if isinstance(place, Mapping):
            cap = place.get("concurrency") or cap
            rate = place.get("request_rate") or place.get("rate") or rate
    return (
        float(cap) if isinstance(cap, (int, float)) else None,
        float(rate) if isinstance(rate, (int, float)) else None,
    )


def _average(data: Mapping[str, Any], name: str) -> float:
    block = data.get(name)
    value = block.get("avg") if isinstance(block, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def _milliseconds(data: Mapping[str, Any], name: str) -> Stats:
    block = data.get(name)
    if not isinstance(block, Mapping):
        return {}
    unit = str(block.get("unit", "")).lower()
    if unit not in _MS:
        raise InputError(f"{name}: unit {block.get('unit')!r} is not a time (known: {', '.join(_MS)})")
    return {
        _WORDS.get(key, str(key)): float(value) * _MS[unit]
        for key, value in block.items()
        if isinstance(value, (int, float)) and key not in ("count", "sum")
    }


__all__ = ["aiperf", "is_aiperf"]
