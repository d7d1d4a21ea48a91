"""Runs to measure, as people run them: the published profiles as candidates, inference-perf files, vllm bench lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dse.calibrate.experiments import REQUESTS_A_CLIENT, Experiments
from dse.catalog import hardware
from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.catalog.models import model as model_of
from dse.published.workloads import SECONDS, TRAINING, VALIDATION, Run, Server, Workload, as_yaml, configuration
from dse.space.cases import estimate_cases

TPS = (1, 2, 4)  # of W5
MOST_IN_FLIGHT = 256.0
URL = "http://localhost:8000"
SCRIPT = "vllm_bench.sh"
_SERVERS = ("vllm", "sglang")  # that inference-perf knows by name; others speak the same API
_COLUMNS = ("model", "gpu", "engine", "engine_version", "weights", "kv")


def profiles(
    model: str,
    gpu: str,
    engine: str = "vllm",
    weights: str = "native",
    tps: Sequence[int] = TPS,
    known: CoefficientSet | None = None,
) -> pd.DataFrame:
    """W1 to W5 and V1 for one model, GPU and engine as candidates: 120 s at a rate, at each TP.

    `concurrency`: the requests that the rate keeps in flight by the model (Little's law). A rate that 256 in flight do
    not serve has no steady state; it becomes one closed loop of 256, without a rate.
    """
    entry = model_of(model)
    hardware.gpu(gpu)
    base = {"model": entry.name, "gpu": gpu, "engine": engine, "weights": weights}
    rows = [
        {**base, "tp": tp, "isl": w.isl, "osl": w.osl, "profile": w.name, "rate": float(w.rate)}
        for tp in tps
        for w in dict.fromkeys((*TRAINING, *VALIDATION))
    ]
    flight = _in_flight(rows, known or coefficient_set())
    steady = flight < MOST_IN_FLIGHT
    table = pd.DataFrame(rows).assign(concurrency=np.maximum(np.round(flight), 1.0).astype(int))
    table["rate"] = table["rate"].where(steady)
    table["seconds"] = np.where(steady, float(SECONDS), np.nan)
    return table.drop_duplicates(ignore_index=True)


def _in_flight(rows: Sequence[Mapping[str, Any]], known: CoefficientSet) -> np.ndarray:
    """The concurrency (n,) at which each row's closed loop serves its rate; `MOST_IN_FLIGHT` where none does."""
    tried = 2.0 ** np.arange(int(np.log2(MOST_IN_FLIGHT)) + 1)
    every = pd.DataFrame([{**row, "concurrency": int(c)} for row in rows for c in tried])
    seconds = pd.to_numeric(estimate_cases(every, known)["e2e_ms"]).to_numpy(float).reshape(len(rows), -1) * 1e-3
    served = np.maximum.accumulate(np.nan_to_num(tried / seconds), axis=1)
    return np.array([np.interp(row["rate"], rate, tried) for row, rate in zip(rows, served, strict=True)])


def files_of(found: Experiments, base_url: str = URL) -> dict[str, str]:
    """File name -> text: an inference-perf configuration a run, and one shell file of `vllm bench serve` lines."""
    rows: list[dict[str, Any]] = [{str(k): v for k, v in row.items()} for row in found.table.to_dict("records")]
    texts = {f"{_name(row)}.yaml": as_yaml(_run(row, base_url)) for row in rows}
    return texts | {SCRIPT: _script(rows, base_url)}


def _hub(name: str) -> str:
    """A model as servers are given it: with its organisation."""
    entry = model_of(name)
    return name if "/" in name or not entry.organisation else f"{entry.organisation}/{entry.name}"


def _number(row: Mapping[str, Any], name: str) -> float | None:
    """A cell as a number; None where it is missing or empty."""
    text = str(row.get(name, "")).strip()
    return None if text in ("", "nan", "None") else float(text)


def _whole(row: Mapping[str, Any], name: str, default: int) -> int:
    value = _number(row, name)
    return default if value is None else round(value)


def _rate(row: Mapping[str, Any]) -> float | None:
    return _number(row, "rate")


def _requests(row: Mapping[str, Any]) -> int:
    rate = _rate(row)
    if rate is not None:
        return max(1, round(rate * SECONDS))
    return _whole(row, "requests", REQUESTS_A_CLIENT * _whole(row, "concurrency", 1))


def _server(row: Mapping[str, Any]) -> str:
    return f"{model_of(str(row['model'])).name}-{row['gpu']}-tp{_whole(row, 'tp', 1)}".lower()


def _name(row: Mapping[str, Any]) -> str:
    """`01-llama-3.1-8b-h100-tp2-1024-512-c64`; the number keeps the order and makes names differ."""
    rate = _rate(row)
    load = f"c{_whole(row, 'concurrency', 1)}" if rate is None else f"r{rate:g}"
    return f"{row['run']:02d}-{_server(row)}-{_whole(row, 'isl', 1)}-{_whole(row, 'osl', 1)}-{load}"


def _run(row: Mapping[str, Any], base_url: str) -> Run:
    rate, requests = _rate(row), _requests(row)
    server = Server(_hub(str(row["model"])), _whole(row, "tp", 1))
    load = Workload(str(row.get("profile", "run")), _whole(row, "isl", 1), _whole(row, "osl", 1), rate or 1.0)
    data = configuration(server, load, base_url)
    if row.get("engine") in _SERVERS:
        data["server"]["type"] = row["engine"]
    if rate is None:
        stage = {"num_requests": requests, "concurrency_level": _whole(row, "concurrency", 1)}
        data["load"] = {"type": "concurrent", "stages": [stage]}
        for name in ("input_distribution", "output_distribution"):
            data["data"][name]["total_count"] = requests
    return replace(Run("", "training", server, load, data), name=_name(row))


def _script(rows: Sequence[Mapping[str, Any]], base_url: str) -> str:
    """`sh vllm_bench.sh SERVER`: that server's runs, best first. Results say what they are of (`--metadata`)."""
    servers: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        servers.setdefault(_server(row), []).append(row)
    lines = [
        "#!/bin/sh",
        "# Runs that tell most about the coefficients, by server: sh vllm_bench.sh SERVER",
        *(f"#   {name}: {_serve(some[0])}" for name, some in servers.items()),
        "# Then: dse calibrate *.json -o NAME.yaml",
        "set -eu",
        f"URL=${{URL:-{base_url}}}",
        'case "${1:-}" in',
    ]
    for name, some in servers.items():
        lines += [f"{shlex.quote(name)})", *(_bench(row) for row in some), ";;"]
    return "\n".join([*lines, f"*) echo 'give a server: {', '.join(servers)}' >&2; exit 2 ;;", "esac", ""])


def _serve(row: Mapping[str, Any]) -> str:
    return f"vllm serve {shlex.quote(_hub(str(row['model'])))} --tensor-parallel-size {_whole(row, 'tp', 1)}"


def _bench(row: Mapping[str, Any]) -> str:
    rate, tp = _rate(row), _whole(row, "tp", 1)
    said = {name: str(row[name]) for name in _COLUMNS if str(row.get(name) or "nan") != "nan"}
    said |= {"weights": said.get("weights", "native"), "tp": str(tp)}
    said |= {name: f"{_whole(row, name, 1)}" for name in ("moe_tp", "moe_ep") if _whole(row, name, 0)}
    load = ["--request-rate", "inf" if rate is None else f"{rate:g}"]
    if rate is None:
        load += ["--max-concurrency", str(_whole(row, "concurrency", 1))]
    words = [
        *("--backend", "openai", "--model", _hub(str(row["model"]))),
        *("--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(_whole(row, "isl", 1)), "--random-output-len", str(_whole(row, "osl", 1))),
        *("--num-prompts", str(_requests(row)), *load),
        *("--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--result-filename", f"{_name(row)}.json"),
        *("--metadata", *(f"{name}={value}" for name, value in said.items())),
    ]
    return 'vllm bench serve --base-url "$URL" ' + shlex.join(words)


__all__ = ["MOST_IN_FLIGHT", "SCRIPT", "TPS", "files_of", "profiles"]
