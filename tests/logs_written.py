"""Result files of benchmark tools, written as each tool writes them from requests whose times are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dse.calibrate.logs import read_log

GIVEN = {"gpu": "h100", "tp": "1", "weights": "bf16", "engine": "vllm", "model": "meta-llama/Llama-3.1-8B"}
CONCURRENCY = 16


@dataclass(frozen=True)
class Requests:
    """Seconds and tokens of each request, as a client saw them; the truth that every format must give back."""

    ttft: np.ndarray
    e2e: np.ndarray
    isl: np.ndarray
    osl: np.ndarray
    failed: int = 0

    @property
    def tpot(self) -> np.ndarray:
        some = self.osl > 1
        return (self.e2e[some] - self.ttft[some]) / (self.osl[some] - 1)

    @property
    def duration(self) -> float:
        return float(self.e2e.sum() / CONCURRENCY)


def some_requests() -> Requests:
    """160 answered requests, the same at every call."""
    rng = np.random.default_rng(0)
    isl, osl = rng.integers(820, 1025, 160), rng.integers(205, 257, 160)
    ttft = rng.lognormal(np.log(0.08), 0.3, 160)
    return Requests(ttft, ttft + (osl - 1) * rng.lognormal(np.log(0.011), 0.05, 160), isl, osl)


def vllm_json(r: Requests, **changes: Any) -> dict[str, Any]:
    """vllm/benchmarks/serve.py: setup, traffic, then the results, ms."""
    stats: dict[str, float] = {}
    itl = np.repeat(r.tpot, r.osl[r.osl > 1] - 1)
    for name, values in (("ttft", r.ttft), ("tpot", r.tpot), ("itl", itl)):
        ms = values * 1000
        stats |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
        stats[f"p99_{name}_ms"] = np.percentile(ms, 99)
    return {
        "date": "20260101-000000",
        "endpoint_type": "vllm",
        "backend": "vllm",
        "label": None,
        "model_id": "meta-llama/Llama-3.1-8B",
        "tokenizer_id": "meta-llama/Llama-3.1-8B",
        "num_prompts": len(r.osl) + r.failed,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": CONCURRENCY,
        "duration": r.duration,
        "completed": len(r.osl),
        "failed": r.failed,
        "total_input_tokens": int(r.isl.sum()),
        "total_output_tokens": int(r.osl.sum()),
        "request_throughput": len(r.osl) / r.duration,
        **stats,
    } | changes


def sglang_json(r: Requests, **changes: Any) -> dict[str, Any]:
    """python/sglang/bench_serving.py: arguments, then results, ms; `concurrency` is its own mean in flight."""
    bench = vllm_json(r)
    stats = {k: v for k, v in bench.items() if k.endswith("_ms")}
    return {
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": math.inf,
        "max_concurrency": CONCURRENCY,
        "sharegpt_output_len": None,
        "random_input_len": 1024,
        "random_output_len": 256,
        "random_range_ratio": 0.8,
        "duration": r.duration,
        "completed": len(r.osl),
        "total_input_tokens": int(r.isl.sum()),
        "total_output_tokens": int(r.osl.sum()),
        "total_output_tokens_retokenized": int(r.osl.sum()) - 3,
        **stats,
        "mean_e2e_latency_ms": r.e2e.mean() * 1000,
        "median_e2e_latency_ms": np.median(r.e2e) * 1000,
        "concurrency": r.e2e.sum() / r.duration,
        "accept_length": None,
    } | changes


def block(values: np.ndarray, unit: str) -> dict[str, Any]:
    points = {f"p{p}": np.percentile(values, p) for p in (25, 50, 90, 99)}
    return {"unit": unit, "avg": values.mean(), **points, "std": values.std(), "count": len(values)}


def aiperf_json(r: Requests, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """profile_export_aiperf.json, schema 1.5; GenAI-Perf's differs by `config` and has no versions."""
    return {
        "schema_version": "1.5",
        "aiperf_version": "0.13.0",
        "was_cancelled": False,
        "input_config": config
        or {
            "models": {"items": [{"name": "meta-llama/Llama-3.1-8B"}]},
            "phases": [{"name": "warmup", "concurrency": 2}, {"name": "profiling", "concurrency": CONCURRENCY}],
        },
        "request_count": {"unit": "requests", "avg": float(len(r.osl))},
        "error_request_count": {"unit": "requests", "avg": float(r.failed)},
        "request_throughput": {"unit": "requests/sec", "avg": len(r.osl) / r.duration},
        "request_latency": block(r.e2e * 1e3, "ms"),
        "time_to_first_token": block(r.ttft * 1e3, "ms"),
        "inter_token_latency": block(r.tpot * 1e3, "ms"),
        "input_sequence_length": block(r.isl, "tokens"),
        "output_sequence_length": block(r.osl, "tokens"),
    } | changes


def inference_perf_json(r: Requests, load: dict[str, Any] | None = None, tokens: float = 1.0) -> dict[str, Any]:
    """stage_0_lifecycle_metrics.json, seconds; `tokens` > 1: TPOT over that many times the tokens (issue 564)."""

    def summary(values: np.ndarray) -> dict[str, float]:
        return {
            "mean": values.mean(),
            "min": values.min(),
            "max": values.max(),
            "median": np.median(values),
            "p99": np.percentile(values, 99),
        }

    latency = {
        "request_latency": summary(r.e2e),
        "time_to_first_token": summary(r.ttft),
        "time_per_output_token": summary(r.tpot / tokens),
        "inter_token_latency": summary(r.tpot / tokens),
    }
    lengths = {"prompt_tokens": {"total": float(r.isl.sum()), **summary(r.isl)}, "output_tokens": summary(r.osl)}
    stage = {"count": len(r.osl), "requested_rate": 5.0, "achieved_rate": 5.0, "concurrency": CONCURRENCY}
    return {
        "load_summary": stage if load is None else load,
        "successes": {
            "count": len(r.osl),
            "latency": latency,
            "throughput": {"requests_per_sec": len(r.osl) / r.duration},
            **lengths,
        },
        "failures": {"count": r.failed, "request_latency": None},
    }


FORMATS = (vllm_json, sglang_json, aiperf_json, inference_perf_json)


def written(folder: Path, data: Any, name: str = "result.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data, default=float))
    return path


def only_row(path: Path, given: dict[str, str] | None = None) -> dict[str, Any]:
    result = read_log(path, GIVEN if given is None else given)
    assert not result.refused, result.refused
    (row,) = result.rows
    return dict(row)


def why_not(path: Path, given: dict[str, str] | None = None) -> str:
    result = read_log(path, GIVEN if given is None else given)
    assert not result.rows
    return result.refused[0][1]
