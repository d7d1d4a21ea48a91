"""Small results of a search, made by hand, and readers of what the report makes of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from dse.report.text import render
from dse.search.result import Binding, SearchResult
from dse.space.columns import MEMORY_PARTS, STEP_PARTS, STEPS

OBJECTIVES = (("output_tok_s_gpu", "max"), ("tpot_ms", "min"))
LIMITS = (("ttft_ms", "max", 2000.0), ("tpot_ms", "max", 50.0))


def rows(count: int = 5, **changes: Any) -> pd.DataFrame:
    """Plans of a front: throughput falls from 900 as TPOT falls from 48 ms; steps and memory add up."""
    i = np.arange(count)
    model = dict(model="Llama-3.1-70B", gpu="h100", cluster="h100-dgx", isl=2048, osl=512, prefix_hit=0.0)
    precision = dict(weights="fp8", activations="fp8", kv="fp8")
    degrees = dict(tp=2 ** (1 + i % 3), pp=1, attention_dp=1, moe_tp=1, moe_ep=1, cp=1)
    load = dict(concurrency=87 - i % 80, chunk=1024, speculation=0, static_batch=0)
    rules = dict(overlap="partial", dispatch="auto", cp_method="auto", sequence_parallel=0, microbatches=0)
    size = dict(utilisation=0.9, gpus=2 ** (1 + i % 3), replicas=1)
    times = dict(ttft_ms=924.4 - i, tpot_ms=48.0 * 0.5**i, output_tok_s_gpu=900.0 - 100 * i, tok_s_user=21.5 + i)
    rest = dict(e2e_ms=24672.0, memory_gib=55.5, feasible=True, reason="", total_tok_s_gpu=4500.0, usd_per_mtok=0.9 + i)
    frame = pd.DataFrame(model | precision | degrees | load | rules | size | times | rest)
    for step in STEPS:
        for k, part in enumerate(STEP_PARTS):
            frame[f"{step}_{part}_ms"] = float(k + 1)
        frame[f"{step}_experts_ms"] = 0.0
        frame[f"{step}_step_ms"] = sum(range(1, 11)) - 4.0 - 11.0
    for k, part in enumerate(MEMORY_PARTS):
        frame[f"{part}_gib"] = (33.5, 17.0, 0.5, 0.5, 4.0)[k]
    return frame.assign(usable_gib=71.7, ties=1).assign(**changes)


def result(front: pd.DataFrame | None = None, **changes: Any) -> SearchResult:
    front = rows() if front is None else front
    base = SearchResult(
        name="small",
        sampler="grid",
        objectives=OBJECTIVES,
        constraints=LIMITS,
        front=front,
        candidates=front,
        funnel=(
            *(("enumerated", 1000), ("legal", 400), ("fits in memory", 300)),
            *(("meets ttft_ms max 2000", 290), ("meets tpot_ms max 50", 100)),
        ),
        cuts={"tp does not divide the heads": 150, "dp does not use the GPUs": 450, "never": 0},
        enumerated=1000,
        legal=400,
        evaluated=400,
        feasible=100,
        seconds=3.2,
        rate=12.5e6,
        run={
            "space": {"description": "Which plan?", "workloads": [{"isl": 2048, "osl": 512, "weight": 1.0}]},
            "seed": None,
            "versions": {"jax": "0.10"},
            "python": "3.11",
        },
    )
    return replace(base, **changes)


def nothing(**changes: Any) -> SearchResult:
    least = rows(1, ttft_ms=54.4)
    return result(
        pd.DataFrame(),
        constraints=(("ttft_ms", "max", 20.0), ("output_tok_s_gpu", "min", 1000.0)),
        least=least,
        binding=(Binding("ttft_ms", 54.4, "max", 20.0), Binding("output_tok_s_gpu", 900.0, "min", 1000.0)),
        feasible=0,
        funnel=(("enumerated", 1000), ("legal", 400), ("fits in memory", 300), ("meets ttft_ms max 20", 0)),
        **changes,
    )


def text_of(summary: Any, width: int = 100) -> str:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(render(summary))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


class _Page(HTMLParser):
    """Which elements are open, what is fetched, which text is seen."""

    void = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.sources += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href", "action", "data", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.seen.append(data)


def assert_well_formed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    assert parser.sources == []  # nothing is fetched
    assert parser.scripts == 3
    return parser


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.S)
    assert found is not None
    figures: dict[str, Any] = json.loads(found[1])
    return figures
