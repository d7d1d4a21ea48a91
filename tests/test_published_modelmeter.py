"""ModelMeter's formulas by hand, and the identities that its reference is held to."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd
import pytest

from dse.cost.coefficients import Coefficients
from dse.cost.types import Level, Topology, replace
from dse.published import compare
from dse.published import modelmeter as mm
from dse.published.shallowsim_gpus import GPUS
from dse.published.tables import published

MACHINE = mm.Machine(tensor=1979.0, cuda=67.0, io=4.8, p2p=450.0, bisection=1800.0)
WORK = mm.Stats(tensor=120.0, cuda=3.0, io=40.0, comm=200.0)
DGX = Topology(
    levels=(Level(size=8.0, bandwidth=450e9, latency=1e-6), Level(size=32.0, bandwidth=50e9, latency=5e-6)),
)


@pytest.fixture(autouse=True)
def _double() -> object:
    with jax.enable_x64(True):
        yield


def case(seq_len: float = 8192.0, batch: float = 64.0, devices: float = 64.0, **more: float) -> mm.Case:
    return mm.Case(seq_len=seq_len, batch=batch, devices=devices, **more)


def test_dp_uses_at_most_the_batch() -> None:
    cost = mm.dp(WORK, MACHINE, 8.0, 4.0)
    assert float(cost.tensor_cost) == pytest.approx(120 / 1979 / 4)
    assert float(cost.io_cost) == pytest.approx(40 / 8 / 4.8 / 4)  # terabits to TB
    assert float(cost.total_cost) == pytest.approx(40 / 8 / 4.8 / 4)
    assert cost.com_cost == 0


def test_ep_overlaps_nothing() -> None:
    cost = mm.ep(WORK, MACHINE, 8.0)
    assert float(cost.com_cost) == pytest.approx(200 / 1800)
    assert float(cost.total_cost) == pytest.approx(40 / 8 / 4.8 / 8 + 200 / 1800)


def test_attention_sp_and_ffn_sp() -> None:
    flash = mm.Stats(tensor=90.0, cuda=2.0, io=10.0)
    cost = mm.attention_sp(WORK, flash, MACHINE, 8.0, others=[WORK])
    exchange, flashing = 200 / 450, 10 / 8 / 4.8 / 8
    projections, other = 30 / 8 / 4.8 / 8, 40 / 8 / 4.8 / 8
    assert float(cost.sp_com_cost) == pytest.approx(exchange)
    assert float(cost.flashatten_cost) == pytest.approx(flashing)
    assert float(cost.total_cost) == pytest.approx(max(exchange, flashing) + projections + other)
    assert float(mm.ffn_sp(WORK, MACHINE, 8.0).total_cost) == pytest.approx(other)


def test_layers_stats_sums() -> None:
    assert vars(mm.layers_stats([WORK] * 3)) == {name: 3 * value for name, value in vars(WORK).items()}


def test_volumes() -> None:
    x = case(seq_len=1000.0, batch=2.0, devices=8.0, capacity_factor=1.25)
    assert float(mm.all_to_all_gb(x, 2000.0, 7168.0, 8.0)) == pytest.approx(3 * 2000 * 7168 * 8 * 1.25 * 7 / 8 / 1e9)
    assert float(mm.sequence_gb(x, 2000.0, 192.0, 128.0)) == pytest.approx(320 * 2000 * 7 / 8 * 2 / 1e9)


@pytest.mark.parametrize("model", [mm.dp_ep, mm.sp_ep])
def test_one_device_communicates_for_nothing(model: object) -> None:
    cost = model(case(devices=1.0), MACHINE)  # type: ignore[operator]
    assert float(cost.summed("com_cost")) == float(cost.summed("sp_com_cost")) == 0.0


def test_dp_with_a_small_batch_leaves_devices_idle() -> None:
    assert float(mm.dp(WORK, MACHINE, 64.0, 4.0).total_cost) == float(mm.dp(WORK, MACHINE, 4.0, 64.0).total_cost)


@pytest.mark.parametrize("devices", [1.0, 8.0, 64.0])
def test_ep_meets_dp_from_above_as_the_network_grows(devices: float) -> None:
    bound = float(mm.dp(WORK, MACHINE, devices, 64.0).total_cost)
    gaps = [
        float(mm.ep(WORK, replace(MACHINE, bisection=b), devices).total_cost) - bound for b in (1e2, 1e4, 1e8, 1e16)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] == pytest.approx(0.0, abs=1e-12)


def test_flops_of_a_prefill_do_not_depend_on_chunks_but_reads_do() -> None:
    whole, cut = (mm.deepseek_r1_stats(case(seq_len=262144.0, batch=1.0, chunk=c)) for c in (262144.0, 8192.0))
    assert float(whole.flash.tensor) == pytest.approx(float(cut.flash.tensor))
    assert float(whole.moe.tensor) == pytest.approx(float(cut.moe.tensor))
    assert float(cut.moe.io) > 4 * float(whole.moe.io)
    assert float(cut.attention.tensor) > float(whole.attention.tensor)  # K and V of cached tokens are made anew


def test_counts_by_a_loop_over_chunks() -> None:
    length, chunk = 100_000.0, 16_384.0
    x = mm.deepseek_r1_stats(case(seq_len=length, batch=1.0, chunk=chunk))
    matrix = 7168 * 2112 + 1536 * 24576 + 512 * 32768 + 16384 * 7168
    projections = scores = 0.0
    start = 0.0
    while start < length:
        new = min(chunk, length - start)
        projections += 2 * new * matrix + 2 * start * 512 * 32768
        scores += 2 * 128 * 320 * new * (start + new / 2)
        start += new
    assert float(x.attention.tensor - x.flash.tensor) == pytest.approx(61 * projections / 1e12)
    assert float(x.flash.tensor) == pytest.approx(61 * scores / 1e12)


def test_a_million_tokens() -> None:
    """Attention is quadratic: it dominates at 1M tokens; nothing overflows."""
    lengths = np.geomspace(1024, 2**20, 11)
    cases = jax.tree.map(lambda v: v * np.ones(11), case(batch=1.0, devices=256.0))
    machines = jax.tree.map(lambda v: v * np.ones(11), MACHINE)
    cost = mm.sp_ep_batch(replace(cases, seq_len=lengths), machines)
    total, attention = np.asarray(cost.total), np.asarray(cost.attention.total_cost)
    assert np.isfinite(total).all()
    assert (np.diff(total) > 0).all()
    compute = total - np.asarray(cost.moe.com_cost)
    assert attention[-1] / compute[-1] > 0.9
    assert np.asarray(cost.attention.flashatten_cost)[-1] > 100 * np.asarray(cost.attention.flashatten_cost)[-5]


def test_collapsed_network_has_the_slowest_level_that_is_crossed() -> None:
    assert [float(v) for v in mm.collapsed(DGX, 8.0)] == [450.0, 1800.0]
    assert [float(v) for v in mm.collapsed(DGX, 16.0)] == [50.0, 400.0]


@pytest.mark.parametrize("strategy", ["dp_ep", "sp_ep"])
def test_both_networks_on_the_same_case(strategy: str) -> None:
    """Within a node the two differ by the halves of a bisection; beyond it by the whole collapse."""
    ratios = {}
    for devices in (1.0, 8.0, 16.0, 64.0, 256.0):
        both = compare.networks(case(batch=256.0, devices=devices), MACHINE, DGX, Coefficients.ideal(), strategy, 1.0)
        com = [float(m.moe.com_cost) for m in (both.collapsed, both.hierarchical)]
        assert float(both.collapsed.ffn.total_cost) == float(both.hierarchical.ffn.total_cost)
        ratios[devices] = com[0] / com[1] if com[1] else 0.0
    assert ratios[1.0] == 0.0
    # flat: k copies of a token over one link a rank; collapsed: all copies of all ranks over N/2 links
    assert ratios[8.0] == pytest.approx(2.0, rel=0.01)
    assert all(ratios[n] > 1.9 for n in (16.0, 64.0, 256.0))


def test_gradients_are_finite_and_a_batch_is_a_loop() -> None:
    for model, batched in ((mm.dp_ep, mm.dp_ep_batch), (mm.sp_ep, mm.sp_ep_batch)):
        slope = jax.grad(lambda x, m, f=model: f(x, m).total, argnums=(0, 1))(case(seq_len=1e5), MACHINE)
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(slope))
        rows = [case(seq_len=s, devices=n) for s in (100.0, 3e4, 1e6) for n in (1.0, 8.0, 300.0)]
        stacked = jax.tree.map(lambda *leaves: np.array(leaves), *rows)
        together = batched(stacked, jax.tree.map(lambda v: np.full(9, v), MACHINE))
        for i, row in enumerate(rows):
            assert float(model(row, MACHINE).total) == pytest.approx(float(together.total[i]), rel=1e-12)


def test_table() -> None:
    rows = pd.DataFrame(
        {
            "strategy": ["dp_ep", "sp_ep", "ep", "dp", "nonsense", "dp_ep", "dp_ep"],
            "gpu": ["H200"] * 5 + ["MI308X", "H100Z"],
            "devices": [8, 64, 8, 8, 8, 8, 8],
            "seq_len": [8192, 1048576, None, None, 1, 8192, 8192],
            "batch": [64, 1, 4, 4, 1, 1, 1],
            "tensor_work_tflop": [None, None, 120, 120, None, None, None],
            "comm_work_gb": [None, None, 200, 200, None, None, None],
        }
    )
    result = published("modelmeter", rows)
    assert list(result["reason"][:4]) == [""] * 4
    assert "allowed: dp_ep, sp_ep" in result["reason"][4]
    assert result["reason"][5] == "cuda_tflops: is empty (required)"
    assert "unknown GPU" in result["reason"][6]
    assert result["total_cost"][2] == pytest.approx(120 / 1979 / 8 + 200 / 1800)
    assert result["total_cost"][3] == pytest.approx(120 / 1979 / 4)
    parts = ["attention_cost", "ffn_cost", "moe_cost"]
    np.testing.assert_allclose(result[parts].sum(axis=1)[:2], result["total_cost"][:2])


# --------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("strategy", ["dp_ep", "sp_ep"])
def test_curves_stack_to_the_total(strategy: str) -> None:
    lengths = np.geomspace(1024, 2**20, 7)
    parts = compare.curve(lengths, case(batch=8.0), MACHINE, strategy)
    model = {"dp_ep": mm.dp_ep, "sp_ep": mm.sp_ep}[strategy]
    totals = [float(model(case(seq_len=n, batch=8.0), MACHINE).total) for n in lengths]
    np.testing.assert_allclose(compare.total(parts), totals)


def test_breakdowns_sum_to_what_each_method_says() -> None:
    one = compare.Deployment(isl=4096.0, context=4096.0, batch=64.0, tp=4.0, dp=8.0, ep=32.0, gpu=GPUS["H200"])
    cases = jax.tree.map(lambda v: np.full(5, float(v)), one)
    found = {phase: compare.breakdowns(cases, phase) for phase in ("prefill", "decode")}
    row = {"gpu": ["H200"], "seq_len": [4096], "decode_len": [0], "kv_cache_rate": [0], "dp": [8], "tp": [4]}
    row |= {"EP": [32], "BatchSize": [64]}
    prefill = published("shallowsim-prefill", pd.DataFrame(row))["Sum"][0]
    decode = published("shallowsim-decode", pd.DataFrame(row))["TPOT"][0]
    assert float(compare.total(found["prefill"]["shallowsim-prefill"])[0]) * 1e3 == pytest.approx(prefill)
    assert float(compare.total(found["decode"]["shallowsim-decode"])[0]) * 1e3 == pytest.approx(decode)
    for methods in found.values():
        for name, parts in methods.items():
            assert name in compare.REASONS
            assert list(parts) == [part for part in compare.PARTS if part in parts]
            assert all(np.asarray(value).shape == (5,) and (np.asarray(value) >= 0).all() for value in parts.values())
