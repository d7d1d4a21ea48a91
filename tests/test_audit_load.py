"""A plan's file: one message for everything wrong, and claims that no shipped plan makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dse.audit.load import load_plan, parse_plan
from dse.audit.price import Desk
from dse.audit.run import audit
from dse.audit.types import Finding
from dse.errors import InputError, UnknownName

DENSE = {"layers": 4, "hidden": 512, "heads": 8, "ffn_width": 2048, "gated": True}
PLAN: dict[str, Any] = {
    "model": DENSE,
    "gpu": {"flops": "100 TFLOP/s", "memory": "16 GB", "bandwidth": "1 TB/s"},
    "mfu": "50%",
    "bandwidth_utilisation": 0.8,
    "plan": {"tp": 2, "pp": 1, "dp": 1},
    "gpus": 2,
    "workload": {"batch": 8, "prompt": 1024, "output": 128},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": None}, "model: is required; write model: Llama-3.1-70B"),
        ({"model": "Lama-3.1-70B"}, "unknown model 'Lama-3.1-70B' (nearest: Llama-3.1-70B"),
        ({"model": {**DENSE, "layer": 3}}, "model: unknown key 'layer' (nearest: layers"),
        ({"model": {"layers": 1, "hidden": 8, "heads": 1}}, "no feed-forward layer"),
        ({"model": {**DENSE, "experts": 4}}, "experts need top_k and expert_width"),
        ({"gpu": "h10"}, "unknown gpu 'h10'"),
        ({"gpu": {"flops": "400 TB", "memory": "1 GB", "bandwidth": "1 TB/s"}}, "gpu.flops: '400 TB' is not in FLOP/s"),
        ({"mfu": "160%"}, "mfu: '160%' is not one number (allowed: above 0, up to 1, in %)"),
        ({"targts": {}}, "top level: unknown key 'targts' (nearest: targets"),
        ({"workload": {"batch": 0, "prompt": 5}}, "workload.batch: 0 is out of range"),
        ({"workload": {"batch": 1}}, "workload.prompt: is required"),
        ({"plan": "as it comes"}, "plan: 'as it comes' names no degree"),
        ({"plan": "TP=4, TP=2"}, "plan: tp is given as 4 and as 2"),
        ({"plan": "TP=2, 4 GPUs"}, "gpus: 2 here, 4 in `plan`; keep one"),
        ({"precision": "fp7"}, "precision, kv: weights: unknown precision 'fp7'"),
        ({"claims": [{"wieghts": "8 GB"}]}, "claims[0]: unknown claim 'wieghts' (nearest: weights"),
        ({"claims": ["weights 1 GB", {"weights": 8}]}, "claims[1]: 8 has no unit"),
        ({"claims": [{"claim": "ttft", "value": "1 s", "att": 3}]}, "unknown key of a claim 'att' (nearest: at"),
        ({"targets": {"ttft": "10 GB"}}, "targets.ttft: '10 GB' is not in seconds"),
    ],
)
def test_one_message_with_place_value_and_remedy(change: dict[str, Any], says: str) -> None:
    plan = {k: v for k, v in {**PLAN, **change}.items() if v is not None}
    with pytest.raises(InputError) as error:
        parse_plan(plan, "my.yaml")
    assert str(error.value).startswith("my.yaml: ")
    assert says in str(error.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("gpu: h100\nmfu: 2\nworkload: {batch: x, prompt: 1}\n")
    with pytest.raises(InputError, match="3 problems"):
        load_plan(path)
    with pytest.raises(InputError, match="no such file"):
        load_plan(tmp_path / "other.yaml")
    with pytest.raises(UnknownName):
        parse_plan({**PLAN, "model": "nothing-like-it"})


def findings(**change: Any) -> list[Finding]:
    return list(audit(parse_plan({**PLAN, **change})).findings)


def one(claim: Any, **change: Any) -> Finding:
    return findings(claims=[claim], **change)[0]


def test_prices_are_what_a_hand_computes() -> None:
    """4 layers of (4 + 3 * 4) * 512^2 weights, 16 bits, TP2; prefill of 8 x 1024 tokens."""
    desk = Desk(parse_plan(PLAN))
    (v,) = desk.plan.variants
    assert v.parameters == 4 * 16 * 512**2
    work = desk.prefill(v, 1024.0)
    core = 4 * 8 * 4 * 512 * 1024 * 512  # layers, batch, 2 * (score + value), T, T / 2
    assert work.flops * 2 == pytest.approx(2 * v.parameters * 8192 + core)
    assert work.attention * 2 == pytest.approx(core)
    assert work.reduce == pytest.approx(8192 * 1024 * 8)  # 2 (n-1)/n of T d bf16, two a layer
    decode = desk.decode(v, 1152.0)
    assert decode.weights == pytest.approx(v.parameters)  # two bytes, over two GPUs
    assert decode.kv == pytest.approx(8 * 1152 * 2 * 512 * 2 * 4 / 2, rel=2e-3)
    assert desk.use(v, 1152.0).kv == pytest.approx(8 * 1152 * 2 * 512 * 2 * 4 / 2)
    assert desk.seconds(work) == pytest.approx(work.flops / 50e12)
    assert desk.floor(work) == pytest.approx(work.flops / 100e12)


def test_faster_than_the_peak_is_impossible() -> None:
    found = one("TTFT 1 us")
    assert found.verdict == "impossible"
    assert "100% of their peaks" in found.why
    assert one("decode throughput 1e9 tokens/s").verdict == "impossible"
    assert one("decode 1 ns").verdict == "unknown"  # no such unit here


def test_without_mfu_only_the_floor_is_known() -> None:
    plan = {k: v for k, v in PLAN.items() if k != "mfu"}
    for claim in ("TTFT 50 ms", "communication 10% of the time", "decode throughput 1000 tokens/s"):
        network = {"link": "400 GB/s"}
        found = audit(parse_plan({**plan, "network": network, "claims": [claim]})).findings[0]
        assert found.verdict == "unknown"
        assert "mfu missing" in found.why


def test_claims_about_what_the_model_has_not() -> None:
    for claim in ("no expert communication", "capacity factor 1.2x"):
        assert one(claim).verdict == "unknown"
        assert "has no experts" in one(claim).why


def test_scopes_that_are_not_said() -> None:
    total = 2 * 4 * 16 * 512**2
    assert one(f"weights {total / 1e6:.1f} MB").name == "weights"
    assert one(f"weights {total / 1e6:.1f} MB").verdict == "holds"  # only the whole agrees
    assert one(f"weights {total / 2e6:.1f} MB").verdict == "holds"
    kv = one("KV 5 GB")
    assert kv.verdict == "unknown"
    assert "does not say of what" in kv.why
    assert one({"kv_sequence": "9.44 MB"}).verdict == "holds"


def test_the_same_thing_said_twice() -> None:
    found = findings(claims=["TTFT 1 s", "TTFT 3 s"])
    (twice,) = (f for f in found if f.name.startswith("contradiction"))
    assert "3 s" in twice.why
    assert not [f for f in findings(claims=["TTFT 1 s", "TTFT 1.02 s"]) if f.name.startswith("contradiction")]


@pytest.mark.parametrize(
    ("plan", "gpus", "verdict", "why"),
    [
        ("TP=2, DP=2", 4, "holds", ""),
        ("TP=4, DP=2", 4, "impossible", "needs 8 GPUs, 4 are planned"),
        ("TP=2, PP=3", 8, "wrong", "is no part of 8"),
        ("TP=3", 3, "impossible", "does not divide 8 heads"),
        ("TP=2, EP=4", 2, "impossible", "has no experts"),
        ("PP=8", 8, "impossible", "more than 4 layers"),
    ],
)
def test_mapping(plan: str, gpus: int, verdict: str, why: str) -> None:
    (found,) = (f for f in findings(plan=plan, gpus=gpus) if f.name == "GPU mapping")
    assert (found.verdict, why in found.why) == (verdict, True)


@pytest.mark.parametrize(
    ("command", "verdict", "why"),
    [
        ("torchrun --nproc_per_node=2 --nnodes=1 serve.py", "holds", ""),
        ("torchrun --nproc_per_node=2 --nnodes=2 serve.py", "wrong", "4 processes for 2 GPUs"),
        ("vllm serve x --tensor-parallel-size 4", "wrong", "TP=4 in the command, 2 in the plan"),
        ("python -m sglang.launch_server --tp 2", "holds", ""),
        ("make run", "unknown", "no number of processes"),
    ],
)
def test_launch(command: str, verdict: str, why: str) -> None:
    (found,) = (f for f in findings(launch=command) if f.name == "launch command")
    assert (found.verdict, why in found.why) == (verdict, True)


def test_degrees_repeated_in_a_claim() -> None:
    assert one("TP=2, PP=1").verdict == "holds"
    assert one("EP=16").verdict == "wrong"
