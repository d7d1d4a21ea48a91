"""The free-text form of plans: quantities, statements, degrees; and what is not understood, with the reason."""

from __future__ import annotations

import pytest

from dse.audit.quantity import amount, between, quantity, said
from dse.audit.text import claims_of, degrees_of


@pytest.mark.parametrize(
    ("text", "kind", "low", "high"),
    [
        ("10B parameters", "parameters", 1e10, 1e10),
        ("10B-parameter MoE", "parameters", 1e10, 1e10),
        ("37B active parameters", "active_parameters", 37e9, 37e9),
        ("weights: 8GB (fixed)", "weights", 8e9, 8e9),
        ("weights 141 GB in all", "weights_total", 141e9, 141e9),
        ("0.5 GiB of weights an expert", "weights_expert", 0.5 * 2**30, 0.5 * 2**30),
        ("KV 320 MB a sequence", "kv_sequence", 320e6, 320e6),
        ("KV cache: 32 KiB per token", "kv_token", 32768.0, 32768.0),
        ("2.6 GB of KV a GPU", "kv_gpu", 2.6e9, 2.6e9),
        ("activations 1 GB", "activations_gpu", 1e9, 1e9),
        ("buffers 0.5 GB", "buffers_gpu", 0.5e9, 0.5e9),
        ("total memory 12.1 GB", "memory_gpu", 12.1e9, 12.1e9),
        ("81% headroom", "headroom", 0.81, 0.81),
        ("prefill 20–25 ms", "prefill_time", 0.020, 0.025),
        ("decode 4-6 ms a token", "decode_latency", 0.004, 0.006),
        ("TPOT of 500 µs", "decode_latency", 0.0005, 0.0005),
        ("TTFT 2 to 3 s", "ttft", 2.0, 3.0),
        ("4000-5000 tokens/ms", "throughput", 4e6, 5e6),
        ("100 tokens/ms/GPU", "throughput_gpu", 1e5, 1e5),
        ("2,000 tok/s a GPU", "throughput_gpu", 2000.0, 2000.0),
        ("communication 5-10% of the time", "communication_share", 0.05, 0.10),
        ("no inter-GPU expert communication", "expert_communication", 0.0, 0.0),
        ("capacity factor 1.2×", "capacity_factor", 1.2, 1.2),
        ("20-30% variance from imbalance", "imbalance", 0.2, 0.3),
        ("MFU 40-50%", "mfu", 0.4, 0.5),
        ("16 GPUs", "gpus", 16.0, 16.0),
    ],
)
def test_statements(text: str, kind: str, low: float, high: float) -> None:
    (claim,) = claims_of(text)
    assert claim.kind == kind
    assert claim.quantity is not None
    assert claim.quantity.span == pytest.approx((low, high))


def test_a_statement_of_several_claims_keeps_its_topic() -> None:
    kinds = [c.kind for c in claims_of("KV 320 MB a sequence, 41 GB in all, 2.6 GB a GPU")]
    assert kinds == ["kv_sequence", "kv_total", "kv_gpu"]
    operation, share = claims_of("TP overhead 0.5 ms an attention operation, < 5%")
    assert (operation.kind, share.kind) == ("tp_overhead_time", "tp_overhead")
    assert share.quantity is not None
    assert share.quantity.sign == "<"


def test_lengths_and_equations() -> None:
    (claim,) = claims_of("prefill 20-25 ms at 1024 tokens")
    assert claim.length == 1024.0
    low = claims_of("low end (128 tokens): 0.1 GB of KV a GPU, total memory 9.6 GB")
    assert [(c.kind, c.length) for c in low] == [("kv_gpu", 128.0), ("memory_gpu", 128.0)]
    equation, total, share = claims_of("total 12.1 GB = 18.9% of 64 GB")
    assert [v for v, _ in equation.sides] == pytest.approx([12.1e9, 12.096e9])
    assert (total.kind, share.kind) == ("memory_gpu", "memory_share")
    (alone,) = claims_of("16 layers × 12.1 GB = 12.1 GB")
    assert [v for v, _ in alone.sides] == pytest.approx([193.6e9, 12.1e9])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("8GB (fixed)", "does not say what"),
        ("18.9%", "does not say what"),
        ("it is fast", "no quantity"),
        ("weights 20 ms", "does not say anything about weights"),
    ],
)
def test_what_is_ambiguous_says_why(text: str, why: str) -> None:
    (claim,) = claims_of(text)
    assert claim.kind == ""
    assert why in claim.problem


def test_degrees() -> None:
    degrees, gpus = degrees_of("EP=16, TP=4 inside each expert, internal to a GPU, PP=1, DP=1, 16 GPUs in all")
    assert (degrees.ep, degrees.tp, degrees.pp, degrees.dp, gpus) == (16, 4, 1, 1, 16)
    assert degrees.tp_internal
    assert degrees_of("TP8 attention-DP 4")[0].attention_dp == 4
    with pytest.raises(ValueError, match="tp is given as 4 and as 8"):
        degrees_of("TP=4, then TP=8")


def test_quantities() -> None:
    assert quantity("~0.5 GB", "bytes").sign == "~"
    assert quantity("<5%", "share").span == pytest.approx((0.05, 0.05))
    assert quantity(["20 ms", "25 ms"], "seconds").span == pytest.approx((0.020, 0.025))
    assert amount("400 Gb/s", "bytes/s") == pytest.approx(50e9)  # bits
    assert amount("50 GB/s", "bytes/s") == pytest.approx(50e9)
    for value, dimension, why in (
        (8, "bytes", "has no unit"),
        ("8 ms", "bytes", "not in bytes"),
        ("8 GB or 9 GB", "bytes", "not one quantity"),
        (True, "bytes", "is not a quantity"),
    ):
        with pytest.raises(ValueError, match=why):
            quantity(value, dimension)
    with pytest.raises(ValueError, match="not one number"):
        amount("1-2 GB", "bytes")


def test_numbers_to_text() -> None:
    assert said(285343744.0, "parameters") == "285343744 parameters"
    assert said(42.949e9, "bytes") == "42.9 GB"
    assert said(0.0, "bytes") == "0 B"
    assert between((0.020, 0.025), "seconds") == "20 to 25 ms"
    assert between((4161.0, 114000.0), "tokens/s") == "4.16 to 114 tokens/ms"
    assert between((1.0, 1.0), "seconds") == "1 s"
