"""Figures that others published, priced by `estimate`'s own path with the default coefficients: none was fitted to."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet, coefficient_set
from dse.cost.evaluate import estimate
from dse.space.cases import Case, estimate_cases, parse_cases, scenarios_of

# ---------------------------------------------------------------------------------------------- headlines


@dataclass(frozen=True)
class Headline:
    """A published rate: tokens/s a GPU, of one step with `tokens` on each GPU (`counted` of them in the figure)."""

    name: str
    row: dict[str, object]
    step: str  # decode or prefill
    tokens: float
    published: float
    assumed: str
    counted: float = 1.0


_V3 = {"model": "DeepSeek-V3", "weights": "fp8", "kv": "bf16", "tp": 1}
_TBO = "two_batch"


def _wide(gpu: str, ep: int, isl: int, osl: int, each: int, **more: object) -> dict[str, object]:
    """One expert-parallel group of `ep` GPUs, attention data-parallel, `each` requests a GPU."""
    return _V3 | {"gpu": gpu, "attention_dp": ep, "moe_ep": ep, "isl": isl, "osl": osl, "concurrency": each * ep} | more


HEADLINES = (
    Headline(
        "DeepSeek-V3 H800 prefill EP32",
        _wide("h800", 32, 4096, 1000, 2, chunk=8192, overlap=_TBO),
        "prefill",
        8192,
        7839,
        "DeepSeek profile data: 4096 in, 8192 tokens a GPU, two-batch overlap, balanced routing there",
    ),
    Headline(
        "DeepSeek-V3 H800 decode EP128",
        _wide("h800", 128, 4096, 1000, 128, overlap=_TBO),
        "decode",
        128,
        2324,
        "128 requests a GPU, context 4096 to 5096, two-batch overlap",
    ),
    Headline(
        "the same, no overlap",
        _wide("h800", 128, 4096, 1000, 128),
        "decode",
        128,
        2324,
        "as above, one batch at a time",
    ),
    Headline(
        "Qwen3-30B-A3B H20 prefill",
        {"model": "Qwen3-30B-A3B", "gpu": "h20", "weights": "bf16", "isl": 4096, "osl": 1000, "concurrency": 4}
        | {"chunk": 16384},
        "prefill",
        16384,
        16594,
        "one GPU, four prompts of 4096 in a step of 16384",
    ),
    Headline(
        "Qwen3-30B-A3B H20 decode EP4",
        {"model": "Qwen3-30B-A3B", "gpu": "h20", "weights": "bf16", "isl": 4096, "osl": 1000, "concurrency": 400}
        | {"attention_dp": 4, "moe_ep": 4},
        "decode",
        100,
        2749,
        "100 requests a GPU, context 4096 to 5096",
    ),
    Headline(
        "Qwen3-8B-FP8 H20 prefill",
        {"model": "Qwen3-8B", "gpu": "h20", "weights": "fp8", "kv": "bf16", "isl": 4096, "osl": 1000, "concurrency": 4}
        | {"chunk": 16384},
        "prefill",
        16384,
        15061,
        "one GPU, four prompts of 4096 in a step of 16384",
    ),
    Headline(
        "Qwen3-8B-FP8 H20 decode",
        {"model": "Qwen3-8B", "gpu": "h20", "weights": "fp8", "kv": "bf16", "isl": 4096, "osl": 1000}
        | {"concurrency": 64},
        "decode",
        64,
        2682,
        "64 requests, context 4096 to 5096, bf16 cache",
    ),
    Headline(
        "SGLang 96 H100 prefill EP32",
        _wide("h100", 32, 2000, 100, 8, chunk=16384, overlap=_TBO, engine="sglang"),
        "prefill",
        16000,
        52300 / 8,
        "52 300 tokens/s a node of 8; 4 nodes, 8 prompts of 2000 a GPU (its 16384-token limit), two-batch overlap",
    ),
    Headline(
        "SGLang 96 H100 decode EP72",
        _wide("h100", 72, 2000, 100, 256, overlap=_TBO, engine="sglang"),
        "decode",
        256,
        22300 / 8,
        "22 300 tokens/s a node of 8; 9 nodes, 256 requests a GPU, 2000 in, 100 out, two-batch overlap",
    ),
    Headline(
        "DeepSeek production prefill EP32",
        _wide("h800", 32, 4096, 1000, 5, chunk=8192, prefix_hit=0.563, overlap=_TBO),
        "prefill",
        8192,
        73700 / 8,
        "73 700 tokens/s a node, 56.3% of them prefix hits (their day's mean); 4096 in, 8192 new tokens a GPU",
        counted=1.0 / (1.0 - 0.563),
    ),
    Headline(
        "DeepSeek production decode EP144",
        _wide("h800", 144, 4489, 1000, 88, overlap=_TBO),
        "decode",
        88,
        14800 / 8,
        "14 800 tokens/s a node at 20-22 tokens/s a user, hence 88 requests a GPU; mean KV 4989 tokens",
    ),
)


def headlines(coefficients: CoefficientSet | None = None) -> pd.DataFrame:
    """name, predicted, published (tokens/s/GPU), ratio, running (requests a GPU that fit), assumed."""
    cases = pd.DataFrame([h.row for h in HEADLINES]).astype(object)
    out = estimate_cases(cases.where(cases.notna(), ""), coefficients or coefficient_set())
    lines = []
    for h, (_, row) in zip(HEADLINES, out.iterrows(), strict=True):
        rate = h.tokens * h.counted / (float(row[f"{h.step}_step_ms"]) * 1e-3)
        lines.append(
            {
                "figure": h.name,
                "predicted": rate,
                "published": h.published,
                "ratio": rate / h.published,
                "step_ms": float(row[f"{h.step}_step_ms"]),
                "fits": bool(row["feasible"]),
                "assumed": h.assumed,
            }
        )
    return pd.DataFrame(lines)


# ------------------------------------------------------------------------------------------ runs of others

_ENGINES = {"vllm": "vllm", "tensorrt-llm": "trtllm", "sglang": "sglang"}
_WEIGHTS = (("nvfp4", "fp4"), ("mxfp4", "mxfp4"), ("fp8", "fp8"), ("int8", "int8"), ("fp16", "bf16"), ("bf16", "bf16"))
CLOSED, STATIC = "closed loop", "static batch"
_LOADS = {
    "closed_loop_concurrency": CLOSED,
    "static_batch": STATIC,
    "static_batch_offline": STATIC,
    "static_batch_latency": STATIC,
    "offline_batch": STATIC,
}


def runs(path: Path) -> pd.DataFrame:
    """published_runs.csv in estimate's columns, with `source`, `load`, `metric`, `value`."""
    table = pd.read_csv(path)
    framework = table["framework"].str.lower().str.split().str[0]
    batch = table["batch_or_concurrency"]
    load = table["load_kind"].map(_LOADS).fillna("").where(table["mode"] == "agg", "")
    tp = table["tp"].fillna(1)
    ep = table["ep"].fillna(1)
    return pd.DataFrame(
        {
            "source": table["source"].map(_source),
            "load": load,
            "metric": table["metric"],
            "value": table["value"],
            "model": table["model"]
            .str.replace(r"\s*\(.*\)", "", regex=True)
            .str.replace(r"-FP8(-KV)?$", "", regex=True),
            "gpu": table["gpu"].str.replace(r"\s*\(.*\)", "", regex=True),
            "engine": framework.map(_ENGINES).fillna(""),
            "weights": table["precision_weights"].map(_weights),
            "kv": table["precision_kv"].map(_weights),
            "tp": tp,
            "pp": table["pp"].fillna(1),
            "moe_ep": ep,
            "isl": table["isl"],
            "osl": table["osl"],
            "concurrency": batch,
            # engines of these static batches prefilled the batch at once
            "chunk": np.where(load == STATIC, np.maximum(8192, (batch * table["isl"]).fillna(0)), 8192),
            "speculation": table["spec_decode"].map(lambda word: "1" if str(word) == "mtp1" else ""),
        }
    )


def _source(text: str) -> str:
    repository, _, path = text.partition(":")
    name = repository.split("/")[-1]
    for part in ("glm-5", "qwen3.5", "minimax-m2.5"):
        if part in path:
            return f"{name} {part}"
    return f"{name} {path.split(' ')[0].split('/')[-1].split('@')[0]}"


def _weights(text: object) -> str:
    word = str(text).lower()
    return next((ours for theirs, ours in _WEIGHTS if theirs in word), "")


def unseen(path: Path, coefficients: CoefficientSet | None = None) -> tuple[pd.DataFrame, Counter[str]]:
    """Errors by source, GPU, load and metric (`bias`: geometric mean of predicted/measured), and why rows have none."""
    table = runs(path)
    why = Counter(f"{row.source}: no load that the model prices" for row in table[table["load"] == ""].itertuples())
    table = table[table["load"] != ""].reset_index(drop=True)
    predicted = _priced(table, coefficients or coefficient_set(), why)
    known = np.isfinite(predicted) & (table["value"].to_numpy(float) > 0)
    table = table.assign(ratio=predicted / table["value"].to_numpy(float))[known]
    lines = []
    for (source, gpu, load, metric), part in table.groupby(["source", "gpu", "load", "metric"]):
        error = np.abs(part["ratio"] - 1.0)
        lines.append(
            {"source": source, "gpu": gpu, "load": load, "metric": metric, "rows": len(part)}
            | {"mean": error.mean(), "median": error.median(), "bias": float(np.exp(np.log(part["ratio"]).mean()))}
        )
    return pd.DataFrame(lines), why


def _priced(table: pd.DataFrame, coefficients: CoefficientSet, why: Counter[str]) -> np.ndarray:
    """What the model says of each row's metric, NaN where it cannot."""
    text = table.drop(columns=["source", "load", "metric", "value"]).astype(object)
    parsed = parse_cases(text.where(text.notna(), ""))
    valid = [i for i, case in enumerate(parsed) if isinstance(case, Case)]
    why.update(f"{table['source'][i]}: {case[:70]}" for i, case in enumerate(parsed) if isinstance(case, str))
    with jax.enable_x64(True):
        scenarios = scenarios_of([c for c in parsed if isinstance(c, Case)], coefficients)
        static = (table["load"].to_numpy()[valid] == STATIC).astype(float)
        result = estimate(replace(scenarios, load=replace(scenarios.load, static_batch=static)))
    tpot = np.asarray(result.tpot, float)
    # A static batch is prefilled in one step, with nobody's HTTP before it.
    ttft = np.where(static > 0, np.asarray(result.served.prefill.total, float), np.asarray(result.ttft, float))
    isl, osl, n = (table[name].to_numpy(float)[valid] for name in ("isl", "osl", "concurrency"))
    output = n * osl / (ttft + (osl - 1.0) * tpot)
    total = output * (isl + osl) / osl
    by_metric = {
        "ttft_ms": ttft * 1e3,
        "prefill_ms": ttft * 1e3,
        "tpot_ms": tpot * 1e3,
        "decode_step_ms": tpot * 1e3,
        "output_tok_s": output,
        "total_tok_s": total,
    }
    found = np.full(len(table), math.nan)
    for place, i in enumerate(valid):
        found[i] = by_metric[str(table["metric"][i])][place]
    return found
