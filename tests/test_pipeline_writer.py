"""Language models that write before the user's answer (query rewriters): their whole answer is part of TTFT."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from dse.cost.coefficients import Coefficients
from dse.errors import InputError
from dse.programs import QUICK
from dse.search import pipeline_open
from dse.search.pipeline_result import search_pipeline
from dse.space.load import parse_pipeline
from dse.space.pipeline_calls import kinds

C = Coefficients()
SMALL, LARGE = "Qwen3-0.6B", "Llama-3.1-8B"
REWRITE: dict[str, Any] = {"name": "rewrite", "kind": "llm", "model": SMALL, "batch": 32, "tokens": 200, "osl": 40}
SEARCH: dict[str, Any] = {
    "name": "retrieve",
    "kind": "retrieval",
    "vectors": 1e9,
    "vector_bytes": 96,
    "scan": 0.01,
    "host": {"memory_gb_s": 300, "capacity_gib": 512, "usd_per_hour": 4},
}
PREFILL: dict[str, Any] = {"name": "prefill", "kind": "prefill", "model": LARGE, "batch": [1, 4]}
DECODE: dict[str, Any] = {"name": "decode", "kind": "decode", "model": LARGE, "batch": 64}
ANSWER: dict[str, Any] = {"name": "answer", "kind": "llm", "model": LARGE, "batch": 64}


@pytest.fixture(scope="module", autouse=True)
def _quickly_compiled() -> Iterator[None]:
    """A few rows of a large program: compiled in half the time, though slower then."""
    pipeline_open.compiled.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline_open, "LARGE", QUICK)
        patch.setattr(pipeline_open, "BLOCK", 2)
        yield
    pipeline_open.compiled.cache_clear()


def space(*stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {"pipeline": list(stages), "request": {"isl": 1500, "osl": 200}, "clusters": ["h100-dgx"], "gpus": 8}
    return {**base, "rates": [1e-3], "objectives": {"gpus": "min", "ttft_ms": "min"}, **changes}


def run(*stages: dict[str, Any], **changes: Any) -> Any:
    return search_pipeline(parse_pipeline(space(*stages, **changes)), C).front


@cache
def alone() -> Any:
    """The rewriter as the user's model: what one of its calls takes."""
    own = {k: v for k, v in REWRITE.items() if k not in ("tokens", "osl")}
    return run(own, request={"isl": 200, "osl": 40}).iloc[0]


def test_idle_ttft_holds_the_whole_rewritten_query() -> None:
    with_it, without = run(REWRITE, SEARCH, PREFILL, DECODE).iloc[0], run(SEARCH, PREFILL, DECODE).iloc[0]
    written = alone()["ttft_ms"] + 39 * alone()["tpot_ms"]
    assert with_it["ttft_ms"] - without["ttft_ms"] == pytest.approx(written, rel=1e-3)
    assert with_it["e2e_ms"] - without["e2e_ms"] == pytest.approx(written, rel=1e-3)
    assert with_it["tpot_ms"] == pytest.approx(without["tpot_ms"], rel=1e-9)
    assert with_it["gpus"] == without["gpus"] + 1
    assert with_it["rewrite_wait_ms"] + with_it["rewrite_time_ms"] == pytest.approx(written, rel=1e-3)


def test_two_aggregated_models_have_their_own_lengths() -> None:
    """The answer's TPOT is the user's, whatever the rewriter's; either model may be the bottleneck."""
    both, answer = run(REWRITE, SEARCH, ANSWER).iloc[0], run(SEARCH, ANSWER).iloc[0]
    assert both["tpot_ms"] == pytest.approx(answer["tpot_ms"], rel=1e-9)
    written = alone()["ttft_ms"] + 39 * alone()["tpot_ms"]
    assert both["ttft_ms"] - answer["ttft_ms"] == pytest.approx(written, rel=2e-3)
    long = run({**REWRITE, "osl": 4000}, SEARCH, ANSWER).iloc[0]
    assert (both["bottleneck"], long["bottleneck"]) == ("answer", "rewrite")
    assert long["capacity_requests_s"] < both["capacity_requests_s"]


def test_its_answers_length_spreads_the_tail() -> None:
    fixed, spread = (run({**REWRITE, "osl": {"mean": 40, "cv": cv}}, SEARCH, PREFILL).iloc[0] for cv in (0.0, 0.5))
    assert spread["ttft_ms"] == pytest.approx(fixed["ttft_ms"], rel=0.01)
    rng = np.random.default_rng(0)
    sigma = np.sqrt(np.log(1.25))
    tokens = 40 * np.exp(sigma * rng.standard_normal(400_000) - sigma**2 / 2)
    times = fixed["ttft_ms"] + (tokens - 40) * alone()["tpot_ms"]
    for share, rel in ((90, 0.02), (99, 0.03)):
        assert spread[f"ttft_p{share}_ms"] == pytest.approx(np.percentile(times, share), rel=rel)


def test_a_share_of_the_requests_and_every_turn() -> None:
    some = {**REWRITE, "tokens": {"each": 200, "share": 0.25}, "adds": 100, "every_turn": True}
    spec = parse_pipeline(space(some, SEARCH, PREFILL, loop={"turns": 4, "growth": 50, "hit": 0.5}))
    k = kinds(spec)
    assert (k["rewrite"].calls, k["rewrite"].share) == (1.0, 0.25)
    assert k["prefill"].first @ k["prefill"].tokens == pytest.approx(1600)
    whole, part = run(REWRITE, SEARCH, PREFILL).iloc[0], run({**some, "adds": 0}, SEARCH, PREFILL).iloc[0]
    none = run(SEARCH, PREFILL).iloc[0]
    assert part["ttft_ms"] - none["ttft_ms"] == pytest.approx(0.25 * (whole["ttft_ms"] - none["ttft_ms"]), rel=5e-3)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((SEARCH, PREFILL, DECODE, REWRITE), ["'rewrite'", "writes behind the user's answer"]),
        (({**REWRITE, "osl": 0}, PREFILL), ["osl", "0"]),
        ((SEARCH, {**PREFILL, "osl": 30}), ["osl", "'prefill'"]),
        (({**ANSWER, "name": "one"}, ANSWER), ["osl of its own"]),
        (({**ANSWER, "tokens": 30},), ["tokens", "'llm'"]),
        (({**REWRITE, "osl": {"cv": 1}}, PREFILL), ["osl", "mean"]),
    ],
)
def test_a_wrong_writer_says_why(stages: tuple[dict[str, Any], ...], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        parse_pipeline(space(*stages))
    assert [word for word in words if word not in str(error.value)] == []
