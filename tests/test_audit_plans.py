"""The shipped plans: the fifteen findings of the 10B MoE with hand-computed numbers, one right plan, one too small."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from dse.audit.load import load_plan, parse_plan
from dse.audit.nearest import coefficients
from dse.audit.price import ONE, Desk, plan_of
from dse.audit.run import audit
from dse.audit.types import Audit, Finding, as_dict
from dse.cost.operators import GemmShape
from dse.cost.roofline import gemm, grouped, rates
from dse.report.audit import html, render, to_json

PLANS = Path(__file__).parent.parent / "search_spaces" / "plans"


@pytest.fixture(scope="module")
def moe() -> Audit:
    return audit(load_plan(PLANS / "moe_10b.yaml"))


@pytest.fixture(scope="module")
def right() -> Audit:
    return audit(load_plan(PLANS / "llama70b_right.yaml"))


@pytest.fixture(scope="module")
def small() -> Audit:
    return audit(load_plan(PLANS / "deepseek_v3_too_small.yaml"))


def of(audited: Audit, name: str, text: str = "") -> Finding:
    (found,) = (f for f in audited.findings if f.name == name and text in f.claimed)
    return found


def near(found: Finding, key: str, low: float, high: float | None = None) -> None:
    """Within 1% of the hand figures."""
    assert found.numbers[key] == pytest.approx((low, low if high is None else high), rel=0.01), key


def test_1_parameters(moe: Audit) -> None:
    found = of(moe, "parameters")
    assert found.verdict == "wrong"
    assert found.numbers["parameters"] == (285343744.0, 419561472.0)
    assert "285343744" in found.computed
    near(found, "active_parameters", 50.46e6, 67.24e6)
    near(found, "width_needed", 25400, 38100)


def test_2_weights(moe: Audit) -> None:
    for name in ("weights a GPU", "weights"):
        found = of(moe, name)
        assert found.verdict == "wrong"
        near(found, "weights_gpu" if name != "weights" else "weights", 67.4e6, 84.1e6)
        near(found, "implied_parameters", 64e9)
        near(found, "weights_gpu_as_claimed", 1.25e9)


def test_3_kv(moe: Audit) -> None:
    sequence, total, gpu = of(moe, "KV cache a sequence"), of(moe, "KV cache in all"), of(moe, "KV cache a GPU")
    assert [f.verdict for f in (sequence, total, gpu)] == ["holds", "holds", "wrong"]
    near(sequence, "kv_sequence", 320 * 2**20)
    near(sequence, "kv_token", 32768)
    near(total, "kv_total", 42.95e9)
    near(gpu, "kv_gpu", 2.68e9)
    near(gpu, "kv_gpu_as_written", 10.7e9)
    assert "4 GPUs" in gpu.computed


def test_4_total(moe: Audit) -> None:
    found = of(moe, "memory a GPU")
    assert found.verdict == "wrong"
    near(found, "sum_of_terms", 12.1e9)
    assert "add up, but are wrong" in found.why
    assert "it fits" in found.why
    assert of(moe, "memory").verdict == "holds"


def test_5_ttft(moe: Audit) -> None:
    found = of(moe, "TTFT")
    assert found.verdict == "wrong"
    near(found, "flops", 352e12, 616e12)
    near(found, "ttft", 0.0917, 0.1604)
    near(found, "one_gpu", 1.47, 2.57)
    assert "the time of one GPU" in found.why
    assert of(moe, "target: TTFT").verdict == "holds"


def test_6_prefill(moe: Audit) -> None:
    found = of(moe, "prefill time at 1024 tokens")
    assert found.verdict == "wrong"
    near(found, "prefill_time", 4.0e-3, 5.7e-3)


def test_7_throughput(moe: Audit) -> None:
    found = of(moe, "throughput")
    assert found.verdict == "wrong"
    assert found.numbers["implied_prefill_time_gpu"][0] == pytest.approx(328e3, rel=0.01)
    assert found.numbers["implied_prefill_time"][0] == pytest.approx(5243e3, rel=0.01)
    near(found, "implied_ttft_gpu", 27.3e3, 41.0e3)
    assert "misses the target" in found.why


def test_8_decode(moe: Audit) -> None:
    """The hand figures are SwiGLU's: the far end of each range."""
    found = of(moe, "decode latency a token")
    assert found.verdict == "wrong"
    for length, ms, rate in ((128, 0.0817, 97.9), (1024, 0.2448, 32.7), (10240, 1.92, 4.16)):
        assert found.numbers[f"decode_seconds_{length}"][1] * 1e3 == pytest.approx(ms, rel=0.01)
        assert found.numbers[f"decode_rate_{length}"][0] / 1e3 == pytest.approx(rate, rel=0.01)
    near(found, "as_written", 7.5e-3)
    target = of(moe, "target: throughput (decode)")
    assert target.verdict == "impossible"
    near(target, "context_limit", 439)
    assert "439" in target.why


def test_9_expert_communication(moe: Audit) -> None:
    found = of(moe, "expert communication between GPUs")
    assert found.verdict == "wrong"
    near(found, "remote_share", 15 / 16)
    near(found, "expert_communication", 5.03e9)
    near(found, "seconds_450", 11.2e-3)
    near(found, "seconds_50", 101e-3)


def test_10_mapping(moe: Audit) -> None:
    found = of(moe, "GPU mapping")
    assert found.verdict == "wrong"
    assert "neither FLOPs nor bandwidth" in found.why
    assert "TP4×DP4 (16 GPUs)" in found.why
    assert "TP4×EP16 (64 GPUs)" in found.why


def test_11_tp_overhead(moe: Audit) -> None:
    found = of(moe, "TP overhead")
    assert found.verdict == "wrong"
    near(found, "total", 8e-3)
    near(found, "tp_overhead", 0.32, 0.40)
    assert found.numbers["share_of_decode_latency"][0] > 1.0  # more than its decode step


def test_12_launch_and_mfu(moe: Audit) -> None:
    launch, mfu = of(moe, "launch command"), of(moe, "MFU")
    assert (launch.verdict, mfu.verdict) == ("wrong", "wrong")
    assert "nodes of 16 GPUs" in launch.why
    near(mfu, "mfu", 0.60)


def test_13_arithmetic(moe: Audit) -> None:
    found = of(moe, "arithmetic", "16 layers × 12.1")
    assert found.verdict == "wrong"
    near(found, "left", 193.6e9)
    near(found, "right", 12.1e9)


def test_14_low_end(moe: Audit) -> None:
    found = of(moe, "KV cache a GPU at 128 tokens")
    assert found.verdict == "wrong"
    near(found, "kv_gpu", 0.0336e9)
    total = of(moe, "memory a GPU at 128 tokens")
    near(total, "sum_of_terms", 9.6e9)
    assert total.verdict == "wrong"


def test_15_headroom(moe: Audit) -> None:
    found = of(moe, "memory headroom")
    assert found.verdict == "wrong"
    assert "repeats the memory claim" in found.why
    assert "right in direction" in found.why


def test_what_nobody_can_say_is_unknown(moe: Audit) -> None:
    missing = {
        "communication share of the time": "links is missing",
        "imbalance": "histogram",
        "capacity factor": "20%",
    }
    for name, what in missing.items():
        found = of(moe, name)
        assert found.verdict == "unknown"
        assert what in found.why


def test_no_plan_meets_the_targets_of_the_10b_and_the_bound_is_named(moe: Audit) -> None:
    assert moe.nearest is not None
    assert not moe.nearest.meets
    (bound,) = (b for b in moe.nearest.bounds if b.broken)
    assert bound.kind == "bandwidth"
    assert bound.numbers["context_limit"] == pytest.approx(439, rel=0.01)
    best = moe.nearest.plan
    assert best is not None
    assert float(best["decode_tok_s_gpu"]) < bound.numbers["decode_rate"]  # the bound holds for what was priced


def test_every_claim_of_the_right_plan_holds(right: Audit) -> None:
    assert {f.name: f.why for f in right.findings if f.verdict != "holds"} == {}
    assert len(right.findings) >= 20
    assert right.nearest is not None
    assert right.nearest.meets
    assert right.nearest.text.startswith("the plan itself")
    near(of(right, "parameters"), "parameters", 70553706496)
    near(of(right, "KV cache a token"), "kv_token", 80 * 2 * 8 * 128 * 2)


def test_a_plan_that_cannot_fit(small: Audit) -> None:
    found = of(small, "memory")
    assert found.verdict == "impossible"
    assert found.why.startswith("needs 9 GPUs")
    assert of(small, "memory a GPU").verdict == "wrong"
    assert small.nearest is not None
    assert not small.nearest.meets
    assert [b.kind for b in small.nearest.bounds if b.broken] == ["memory"]
    assert "no plan meets the targets: memory" in small.nearest.text


def test_more_gpus_are_the_nearest_plan_once_they_may_be_had() -> None:
    plan = {
        "model": "DeepSeek-V3",
        "gpu": "h100",
        "mfu": "40%",
        "bandwidth_utilisation": "70%",
        "precision": "fp8",
        "plan": "TP=8, EP=8, 8 GPUs",
        "workload": {"batch": 64, "prompt": 4096, "output": 1024},
        "targets": {"ttft": "10 s", "tpot": "50 ms"},
    }
    found = audit(parse_plan(plan)).nearest
    assert found is not None
    assert found.meets
    assert found.plan is not None
    assert found.plan["gpus"] == 16.0
    assert float(found.plan["memory_gib"]) < 79.7


def test_the_plans_around_are_priced_at_the_shares_that_the_plan_states() -> None:
    """An MFU is the whole distance from the peak, and every byte streams at the stated share of the bandwidth."""
    stated = {"mfu": "40%", "bandwidth_utilisation": "50%", "gpu": "h200", "model": "DeepSeek-V3", "precision": "fp8"}
    desk = Desk(parse_plan(stated | {"plan": "TP=8, EP=8, 8 GPUs", "workload": {"batch": 8, "prompt": 4096}}))
    c, device = coefficients(desk), desk.plan.device
    routed = next(f.routed for f in desk.plan.variants[0].architecture.ffns if f.routed is not None)
    experts = grouped(routed, plan_of(ONE, desk.plan), device, c)
    matrices = gemm(GemmShape(k=7168.0, n=7168.0), 1.0, 1.0, 1.0, device, c)
    assert float(rates(device, c)[0]) == pytest.approx(0.4 * device.peak_bf16)
    assert float(experts.weights) == pytest.approx(3 * 7168 * 2048 / (0.5 * device.bandwidth))
    assert float(experts(2.0, 2.0)) == pytest.approx(2 * float(experts.weights))
    assert float(matrices(1.0)) == pytest.approx((7168**2 + 3 * 7168) / (0.5 * device.bandwidth))


def test_json_is_the_contracts(moe: Audit) -> None:
    data = json.loads(to_json(moe))
    assert data == json.loads(json.dumps(as_dict(moe)))
    for claim in data["claims"]:
        assert {"name", "verdict", "claimed", "computed", "why"} <= set(claim)
        assert claim["verdict"] in ("holds", "wrong", "impossible", "unknown")
        assert claim["why"]
    assert data["nearest"]["meets_targets"] is False


def test_page_and_terminal(moe: Audit) -> None:
    page = html(moe)
    assert "<script src" not in page
    assert page.count("<td><b>") == len(moe.findings)
    console = Console(width=100, file=io.StringIO())
    console.print(render(moe))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "impossible" in text
    assert "439" in text
