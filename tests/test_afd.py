"""Attention-FFN disaggregation: limits, the ping-pong's two regimes, bytes by hand, memory of both groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest

from dse.catalog.coefficients import CoefficientSet
from dse.cost.afd import AttentionFfn, AttentionFfnEstimate, attention_part, estimate_attention_ffn
from dse.cost.coefficients import Coefficients
from dse.cost.pool_steps import decode_times
from dse.cost.shard import shard
from dse.space.cases import Case, parse_cases, scenarios_of

ROW = {"model": "DeepSeek-V3", "gpu": "h200", "isl": 4000, "osl": 1000, "tp": 1}
ATTENTION, FFN, REQUESTS = 16, 8, 1024.0


def side(gpus: int, **more: Any) -> Any:
    row = {**ROW, "attention_dp": gpus, "moe_ep": gpus, "concurrency": int(REQUESTS), **more}
    (case,) = parse_cases(pd.DataFrame([row]).astype(object))
    assert isinstance(case, Case)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), scenarios_of([case], CoefficientSet("physics")))


def price(m: float = 3.0, free: float = 0.0, **changes: Any) -> AttentionFfnEstimate:
    x = AttentionFfn(attention=side(ATTENTION), ffn=side(FFN), micro_batches=np.array([m]), free=np.array([free]))
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[0], estimate_attention_ffn(replace(x, **changes)))


def endless() -> Any:
    """FFN workers of unlimited speed, without latencies."""
    ffn = side(FFN)
    fast = replace(ffn.device, peak_bf16=np.array([1e30]), peak_fp8=np.array([1e30]), bandwidth=np.array([1e30]))
    ideal = jax.tree.map(lambda x: np.array([float(x)]), Coefficients.ideal())
    return replace(ffn, device=fast, coefficients=ideal)


@pytest.mark.parametrize("m", [1.0, 2.0, 4.0])
def test_a_free_network_and_endless_experts_leave_attention_alone(m: float) -> None:
    found = price(m, free=1.0, ffn=endless())
    with jax.enable_x64(True):
        x = jax.tree.map(lambda leaf: leaf[0], side(ATTENTION))

        @jax.jit
        def attention(x: Any) -> Any:
            s = shard(attention_part(x.architecture), x.device, x.topology, x.plan, x.coefficients)
            return decode_times(s, x.load, REQUESTS / m).step

        alone = attention(x)
        expected = m * float(alone.body + alone.head) + float(alone.overhead)
    assert found.ffn == pytest.approx(0.0, abs=1e-12)
    assert found.transfer == 0.0
    assert found.tpot == pytest.approx(expected, rel=1e-9)


def test_a_layer_is_the_round_of_one_or_the_busiest_of_all() -> None:
    seen = set()
    for m in (1.0, 2.0, 3.0, 6.0, 12.0):
        e = price(m)
        round_trip, busiest = e.attention + e.ffn + 2 * e.transfer, m * max(e.attention, e.ffn, e.transfer)
        assert e.layer == pytest.approx(max(round_trip, busiest), rel=1e-12)
        seen.add(round_trip > busiest)
    assert seen == {True, False}


def test_micro_batches_hide_the_exchange_and_too_many_starve_the_experts() -> None:
    """One micro-batch waits for its tokens; weights are read once for each, so many of them cost more."""
    tpot = {m: float(price(m).tpot) for m in (1.0, 2.0, 3.0, 32.0)}
    assert min(tpot[2.0], tpot[3.0]) < tpot[1.0]
    assert tpot[32.0] > min(tpot.values())
    assert float(price(1.0, free=1.0).tpot) < tpot[1.0]
    assert float(price(2.0, free=1.0).tpot) <= tpot[2.0]  # hidden, or paid for


def test_bytes_of_the_exchange_by_hand() -> None:
    """58 of 61 layers send 8 choices' distinct ranks of 8, 3 dense ones a single copy: 7168 elements each."""
    m, imbalance = 2.0, Coefficients().imbalance
    tokens = REQUESTS / m
    distinct = 8 * (1 - (1 - 1 / 8) ** 8)
    combine = tokens * 7168 * 2.0 * (58 * distinct + 3) / 61  # 16-bit, the wider way
    busiest = combine * max(1 / ATTENTION, (1 + (imbalance - 1) * (1 - 1 / FFN)) / FFN)
    slow, slower = (
        price(m, attention=scaled(side(ATTENTION), f), ffn=scaled(side(FFN), f)).transfer for f in (1e-3, 5e-4)
    )
    per_byte = (slower - slow) * 1e-3 / busiest  # what a byte takes at the full rate
    assert 30e9 < 1 / per_byte < 50e9  # 400 Gb/s between nodes


def scaled(x: Any, factor: float) -> Any:
    levels = tuple(replace(level, bandwidth=level.bandwidth * factor) for level in x.topology.levels)
    return replace(x, topology=replace(x.topology, levels=levels))


def test_both_groups_hold_the_whole_model_between_them() -> None:
    e, whole = price(), price(attention=side(ATTENTION), ffn=side(2 * FFN))
    assert e.gpus == ATTENTION + FFN
    assert e.ffn_memory.kv == 0
    assert e.attention_memory.kv > 0
    assert e.attention_memory.weights < 0.2 * e.ffn_memory.weights
    assert whole.ffn_memory.weights < 0.55 * e.ffn_memory.weights
    assert e.output_rate * e.gpus == pytest.approx(REQUESTS / e.tpot)
