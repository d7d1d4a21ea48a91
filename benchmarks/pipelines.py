"""Published gains of pipelines with pools of their own, as this model sees them: `python benchmarks/pipelines.py`.

Each is told twice: against the kind of baseline that was published, and against the best layout that a search finds
with the stages still sharing a pool. Nothing is tuned to the published figures.
- EPD (Singh et al. 2025, arXiv 2501.05460; set-up of its `automate_e2e.py`): MiniCPM-V 2.6 on 8 A100, images of
  4032 x 3024, 10 tokens out, batches of one. TTFT up to 71% lower than with encoding in the prefill workers (DistServe)
  or all in one engine (vLLM). Its encode workers share one request's image tiles: five save at most 80% of the
  encoder's part of TTFT, so that 71% needs an encoder that is 89% of it. Here it is half: a faster encoder than theirs.
- RAGO (Jiang et al. 2025, arXiv 2503.14649), long contexts: a 120M encoder reads 1M tokens a request before a 70B model
  answers (512 in, 256 out). Up to 2x requests/s a chip, TTFT up to 55% lower, than an LLM-only system with the encoder
  added to its prefill chips, prefill and decode chips 1:1. Here on H100, not on TPU; the database of a request's own
  chunks is small, and left out. Its TTFT gain is that of bursts of 32, cut into micro-batches.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import yaml

from dse.catalog.coefficients import coefficient_set
from dse.cli.console import compile_cache
from dse.errors import InputError
from dse.search.pipeline_result import coefficients_of, search_pipeline
from dse.search.pipeline_stages import price
from dse.space.load import parse_pipeline
from dse.space.pipeline_compile import compile_pipeline

Space = dict[str, Any]
SPACES = Path(__file__).parent.parent / "search_spaces"
ALL = 10**7  # candidates: every pipeline
BURST = 32
PUBLISHED_EPD, PUBLISHED_RAGO_QPS, PUBLISHED_RAGO_TTFT = -0.71, 2.0, -0.55


def run(space: Space, prune: bool = True) -> pd.DataFrame:
    """All pipelines kept; none where nothing serves even the lowest rate."""
    try:
        return search_pipeline(parse_pipeline(space), best=ALL, prune=prune).candidates
    except InputError:
        return pd.DataFrame({"ttft_ms": [], "ttft_p90_ms": [], "pipeline": []})


def stage(name: str, kind: str, **more: Any) -> Space:
    return {"name": name, "kind": kind, **more}


# ----------------------------------------------------------------------------------------------------------- EPD

SIGLIP = {"layers": 27, "hidden": 1152, "heads": 16, "ffn": 4304}  # SigLIP-400M, of MiniCPM-V 2.6
LLM = "Qwen2-7B"
TILES = 10  # slices and the overview of a large image: 1024 patches each, 64 tokens after the resampler
EPD_RATES = [0.25, 0.5, 1.0, 1.5, 2.0]


def epd(images: int, rate: float, *stages: Space) -> Space:
    return {
        "name": "epd",
        "pipeline": list(stages),
        "request": {"isl": 22, "osl": 10},
        "clusters": ["a100-dgx"],
        "gpus": 8,
        "rates": [rate],
        "objectives": {"ttft_ms": "min"},
    }


def encoder(images: int, **more: Any) -> Space:
    return stage("encode", "encoder", encoder=SIGLIP, tokens={"each": 1024, "items": TILES * images}, merge=16, **more)


def epd_layouts(images: int, rate: float) -> dict[str, list[Space]]:
    """As published (one layout each, batches of one) and as searched (all that fit on 8 GPUs)."""
    decode = stage("decode", "decode", model=LLM)
    wide: Space = {"tp": [1, 2, 4], "replicas": {"min": 1, "max": 8, "step": 1}, "batch": [1, 2, 4]}
    apart = stage("decode", "decode", model=LLM, tp=[1, 2], replicas=[1, 2, 3, 4], batch=[1, 8, 64])
    every = {**wide, "spread": [1, 2, 3, 4, 5, 6]}
    one = stage("prefill", "prefill", model=LLM)
    return {
        "separate pools, 5E 2P 1D, tiles dealt": [
            epd(images, rate, encoder(images, spread=5), {**one, "replicas": 2}, decode)
        ],
        "separate pools, 5E 2P 1D, tiles together": [
            epd(images, rate, encoder(images, replicas=5), {**one, "replicas": 2}, decode)
        ],
        "encode in prefill, 7EP 1D (DistServe)": [
            epd(images, rate, encoder(images, pool="prefill"), {**one, "replicas": 7}, decode)
        ],
        "one engine, 8EPD (vLLM)": [
            epd(images, rate, encoder(images, pool="llm"), stage("llm", "llm", model=LLM, replicas=8))
        ],
        "searched, separate pools": [epd(images, rate, encoder(images, **every), {**one, **wide}, apart)],
        "searched, encode in prefill or in the engine": [
            epd(images, rate, encoder(images, pool="prefill", tp=[1, 2, 4], batch=[1, 2, 4]), {**one, **wide}, apart),
            epd(
                images,
                rate,
                encoder(images, pool="llm", tp=[1, 2, 4], batch=[1, 2, 4]),
                stage("llm", "llm", model=LLM, tp=[1, 2, 4], replicas=wide["replicas"], batch=[8, 64]),
            ),
        ],
    }


def show_epd() -> None:
    print(f"EPD: MiniCPM-V 2.6 on 8 A100; mean TTFT in ms. Published: up to {PUBLISHED_EPD:.0%}")
    for images in (2, 4, 8):
        table: dict[str, list[float]] = {}
        for rate in EPD_RATES:
            for name, spaces in epd_layouts(images, rate).items():
                rows = pd.concat([run(copy.deepcopy(s)) for s in spaces], ignore_index=True)
                best = rows.sort_values("ttft_ms").iloc[:1]
                table.setdefault(name, []).append(float(best["ttft_ms"].iloc[0]) if len(best) else np.nan)
        print(f"  {images} images a request, requests/s: " + "  ".join(f"{r:8.2f}" for r in EPD_RATES))
        for name, values in table.items():
            print(f"    {name:46}" + "  ".join(f"{v:8.0f}" if np.isfinite(v) else "unstable" for v in values))
        ours, alone, together, engine, best, shared = (np.array(v) for v in table.values())
        for name, a, b in (
            ("against DistServe's", ours, together),
            ("against one engine", ours, engine),
            ("tiles together, against DistServe's", alone, together),
            ("searched against searched", best, shared),
        ):
            print(f"    {name:46}" + "  ".join(f"{x:+8.0%}" if np.isfinite(x) else "        " for x in a / b - 1.0))


# ---------------------------------------------------------------------------------------------------------- RAGO

READER = {"layers": 17, "hidden": 768, "heads": 12, "ffn": 3072}  # 120M parameters
BIG = "Llama-3.1-70B"
CONTEXT = 1_000_000
GPUS = 64


def rago(*stages: Space, **changes: Any) -> Space:
    return {
        "name": "rago",
        "pipeline": list(stages),
        "request": {"isl": 512, "osl": 256},
        "clusters": ["h100-dgx"],
        "gpus": GPUS,
        "rates": [1e-3],
        "objectives": {"requests_s_gpu": "max", "ttft_ms": "min"},
        **changes,
    }


def reader(**more: Any) -> Space:
    """Embeds the chunks of a request's own context; adds nothing to the prompt but what retrieval picks of it."""
    return stage("read", "rerank", encoder=READER, tokens={"each": 128, "items": CONTEXT / 128}, **more)


def pools(replicas: int) -> tuple[Space, Space]:
    some = {"model": BIG, "weights": "fp8", "replicas": {"min": 1, "max": replicas, "step": 1}}
    prefill = stage("prefill", "prefill", tp=[2, 4], batch=[1, 4, 16], **some)
    return prefill, stage("decode", "decode", tp=[2, 4], batch=[32, 128, 256], **some)


def rate_a_gpu(rows: pd.DataFrame) -> pd.Series:
    """min_i (replicas_i batch_i / t_i) over all GPUs."""
    return rows["capacity_requests_s"] / rows["gpus"]


def show_rago() -> None:
    prefill, decode = pools(16)
    shared = run(rago(reader(pool="prefill", tp=[1, 2], batch=[1, 4]), prefill, decode), prune=False)
    balanced = shared[shared["prefill_gpus"] == shared["decode_gpus"]]
    few, less = ({**x, "replicas": [1, 2, 4]} for x in pools(4))
    apart = {"replicas": [*range(1, 16), *range(16, 61, 4)], "batch": [1, 4]}
    separate = run(rago(reader(**apart), few, less), prune=False)
    print(f"RAGO, {CONTEXT:,} tokens read a request: requests/s a GPU on up to {GPUS} H100. Published: up to 2x")
    found = {
        "reader in prefill's pool, prefill and decode 1:1": balanced,
        "reader in prefill's pool, searched": shared,
        "separate pools, searched": separate,
    }
    best = {}
    for name, rows in found.items():
        top = rows.loc[rate_a_gpu(rows).idxmax()]
        best[name] = float(rate_a_gpu(rows).max())
        print(f"    {name:50}{best[name]:8.4f}   {top['pipeline']}")
    one, two, three = best.values()
    print(f"    against 1:1 {three / one:.2f}x, against the searched shared pool {three / two:.2f}x")
    rate = 0.8 * one * GPUS
    own = {**apart, "spread": [1, 2, 4, 8, 16, 32], "replicas": [1, 2, 3, 4, 6, 8, 16, 32]}
    together = rago(reader(pool="prefill", tp=[1, 2], batch=[1, 4]), prefill, decode, rates=[rate])
    every = run(together, prune=False)
    base = float(every.loc[every["prefill_gpus"] == every["decode_gpus"], "ttft_ms"].min())
    shared_ms = float(every["ttft_ms"].min())
    ours = float(run(rago(reader(**own), few, less, rates=[rate]))["ttft_ms"].min())
    print(
        f"  least TTFT at {rate:.1f} requests/s (80% of the 1:1 layout's best): 1:1 {base:.0f} ms, searched shared"
        f" {shared_ms:.0f} ms, separate {ours:.0f} ms ({ours / base - 1:+.0%}, {ours / shared_ms - 1:+.0%})"
    )


def show_burst() -> None:
    """Mean TTFT of a burst that goes through reader and prefill all at once, or in micro-batches, pools of 32 and 8."""
    sizes = [1, 2, 4, 8, 16, 32]
    space = rago(
        reader(spread=32, batch=sizes),
        stage("prefill", "prefill", model=BIG, weights="fp8", tp=8, batch=sizes),
        stage("decode", "decode", model=BIG, weights="fp8", tp=8, batch=256),
    )
    p = compile_pipeline(parse_pipeline(space))
    with jax.enable_x64(True):
        priced = price(p, coefficients_of(p, coefficient_set()))
    times = [np.asarray(priced[name].times.together) for name in ("read", "prefill")]
    means = []
    for i, size in enumerate(sizes):
        ends = [0.0] * len(times)
        total = 0.0
        for _ in range(BURST // size):
            start = 0.0
            for k, t in enumerate(times):
                start = ends[k] = max(start, ends[k]) + float(t[i])
            total += size * ends[-1]
        means.append(total / BURST)
    gains = ", ".join(f"{size}: {m / means[-1] - 1:+.0%}" for size, m in zip(sizes, means, strict=True))
    print(f"  a burst of {BURST} in micro-batches, mean TTFT against all at once ({means[-1]:.2f} s): {gains}")
    print(f"  Published: up to {PUBLISHED_RAGO_QPS:.0f}x and {PUBLISHED_RAGO_TTFT:.0%}")


# -------------------------------------------------------------------------------------------- the shipped spaces


def in_pool(space: Space, name: str, owner: str) -> Space:
    """The stage `name` in the pool of another, with a tp of its own."""
    space = copy.deepcopy(space)
    one = next(s for s in space["pipeline"] if s["name"] == name)
    for key in ("replicas", "spread"):
        one.pop(key, None)
    one |= {"pool": owner, "tp": [1, 2]}
    return space


def aggregated(space: Space) -> Space:
    """Prefill and decode in one pool."""
    space = copy.deepcopy(space)
    stages = space["pipeline"]
    decode = next(s for s in stages if s["kind"] == "decode")
    some = {key: decode[key] for key in ("model", "weights", "tp", "batch")}
    llm = stage("llm", "llm", replicas={"min": 1, "max": 16, "step": 1}, **some)
    space["pipeline"] = [s for s in stages if s["kind"] not in ("prefill", "decode")] + [llm]
    return space


def show_shipped() -> None:
    """Most requests/s a GPU within the space's own limits, weights in fp8."""
    for file, name in (("epd_qwen3_vl", "encode"), ("rag_70b", "rerank")):
        space = yaml.safe_load((SPACES / f"{file}.yaml").read_text())
        space |= {"objectives": {"requests_s_gpu": "max", "ttft_p90_ms": "min"}}
        for one in space["pipeline"]:
            one |= {"weights": "fp8"} if one["kind"] in ("prefill", "decode") else {}
        one_pool = aggregated(space)
        layouts = {
            "every stage apart": space,
            f"{name} in prefill's pool": in_pool(space, name, "prefill"),
            f"{name} apart, prefill and decode in one pool": one_pool,
            "all in one pool": in_pool(one_pool, name, "llm"),
        }
        print(f"{file}: most requests/s a GPU, and TTFT P90 there")
        for layout, data in layouts.items():
            top = run(data).sort_values("requests_s_gpu").iloc[-1]
            print(f"    {layout:50}{top['requests_s_gpu']:8.3f}{top['ttft_p90_ms']:8.0f} ms   {top['pipeline']}")


def main() -> None:
    compile_cache()
    show_epd()
    show_rago()
    show_burst()
    show_shipped()


if __name__ == "__main__":
    main()
