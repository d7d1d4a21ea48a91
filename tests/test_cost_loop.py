"""The closed loop and the operators' forms: limits, continuity, and laws that hold whatever the coefficients are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import Columns, columns, in_double
from scenarios import random_device

from dse.catalog.coefficients import coefficient_set
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario, estimate
from dse.cost.operators import GemmShape
from dse.cost.roofline import gemm, grouped, rates
from dse.cost.serving import any_of, drawn, larger_root
from dse.cost.types import Device, Plan, Precision, Routed, replace
from dse.space.cases import Case, parse_cases, scenarios_of

ROWS = 240  # of every batch here, so that one program prices them all
LLAMA = {"model": "Llama-3.1-8B", "gpu": "h100", "isl": 1000, "osl": 300, "concurrency": 32, "chunk": 2048}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def plain(load: dict[str, Any], coefficients: dict[str, Any], **settings: Any) -> Scenario:
    """`ROWS` of one case with other loads and coefficients, arrays of at most that length."""
    parsed = parse_cases(pd.DataFrame([LLAMA | settings]).astype(str))
    cases = [case for case in parsed if isinstance(case, Case)]
    assert cases, parsed
    one = jax.tree.map(lambda leaf: np.resize(np.asarray(leaf, np.float64), ROWS), scenarios_of(cases, PHYSICS))
    wide = {k: np.resize(np.asarray(v, np.float64), ROWS) for k, v in (load | coefficients).items()}
    return replace(
        one,
        load=replace(one.load, **{k: wide[k] for k in load}),
        coefficients=replace(one.coefficients, **{k: wide[k] for k in coefficients}),
    )


PHYSICS = coefficient_set("physics")
STEADY = {"arrival_overhead": 0.0, "first_wave": 0.0, "cohort": 0.0, "idle_seats": 0.0}


def loop(load: dict[str, Any], coefficients: dict[str, Any] | None = None, **settings: Any) -> Columns:
    priced = estimate(plain(load, coefficients or STEADY, **settings))
    return columns(jax.tree.map(np.asarray, priced))


# --------------------------------------------------------------------------------------- closed loop


def test_prompts_that_never_go_first_share_their_steps(random_batch: list[Scenario], double: Columns) -> None:
    never = [replace(x, coefficients=replace(x.coefficients, prefill_priority=0.0)) for x in random_batch]
    for name, values in columns(in_double(never)).items():
        np.testing.assert_allclose(values, double[name], rtol=1e-12, atol=1e-15, err_msg=name)


def test_prompts_that_go_first_pause_decode() -> None:
    """A token of decode waits for them; the first token no longer for the pieces that share the budget."""
    n = np.geomspace(2, 64, ROWS)
    shared, first = ({**STEADY, "prefill_priority": p} for p in (0.0, 1.0))
    steps = loop({"concurrency": n}, first)
    assert (steps["tpot"] > steps["served.decode.total"]).all()
    saturated = {"concurrency": np.full(ROWS, 400.0), "isl": 4000.0, "osl": 64.0}
    assert (loop(saturated, first)["ttft"] < loop(saturated, shared)["ttft"]).all()


def test_the_first_wave_weighs_less_in_a_longer_run() -> None:
    waves = np.linspace(1, 100, ROWS)
    got = loop({"waves": waves, "concurrency": 128.0}, {"first_wave": 1.0, "cohort": 0.0})
    assert (np.diff(got["ttft"]) < 0).all()
    assert (np.diff(got["tpot"]) > 0).all()  # answers of the first and the last wave meet fewer prompts


@pytest.mark.parametrize(("isl", "osl"), [(1000, 60), (6000, 40), (300, 2000)])
@pytest.mark.parametrize("settings", [{}, {"attention_dp": 4, "tp": 1}], ids=["one", "ranks"])
def test_latencies_have_no_jump_where_prompts_fill_pieces_and_budgets(
    isl: float, osl: float, settings: dict[str, Any]
) -> None:
    """As many requests as memory holds: twice as many points, steps at most three quarters as large."""
    ranks = settings.get("attention_dp", 1)

    def swept(points: int) -> tuple[Columns, np.ndarray]:
        n = np.geomspace(1, 2000, points)
        parts = [loop({"concurrency": n[i : i + ROWS] * ranks, "isl": isl, "osl": osl}, **settings)
                 for i in range(0, points, ROWS)]  # fmt: skip
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return whole, whole["memory.requests"] > n

    (coarse, held), (fine, also) = swept(4 * ROWS), swept(8 * ROWS)
    if isl > osl:  # from none to prompts that take all they can of a step
        assert coarse["served.mixed.tokens"][held].max() > 0.95 * LLAMA["chunk"]
    for name in ("ttft", "tpot"):
        assert (
            np.abs(np.diff(np.log(fine[name][also]))).max() < 0.75 * np.abs(np.diff(np.log(coarse[name][held]))).max()
        )


def test_one_request_at_a_time_waits_for_none() -> None:
    isl = np.linspace(1, 2000, ROWS)
    got = loop({"concurrency": 1.0, "isl": isl}, {"cohort": 0.3, "turns": 2.0, "idle_seats": 1.0})
    np.testing.assert_allclose(got["served.queue"] / got["ttft"], 0, atol=1e-9)


def test_a_client_without_a_seat_waits_for_one_of_the_others() -> None:
    """Little's law: of n clients one always waits, so each waits 1/n of its whole time; decode is as it was."""
    n = np.linspace(2, 64, ROWS)
    load = {"concurrency": n, "isl": 500.0, "osl": 200.0}
    free, short = (loop(load, {**STEADY, "idle_seats": seats}) for seats in (0.0, 1.0))
    np.testing.assert_allclose(short["ttft"] - free["ttft"], short["e2e"] / n, rtol=1e-9)
    np.testing.assert_allclose(short["tpot"], free["tpot"])


def test_an_engine_that_schedules_ahead_takes_steps_like_a_prompts_own() -> None:
    """In company only: each turn more is another step as long as the one that computes the prompt."""
    load = {"concurrency": np.linspace(2, 64, ROWS), "isl": 500.0, "osl": 200.0}
    one, two, three = (loop(load, {**STEADY, "turns": turns})["ttft"] for turns in (1.0, 2.0, 3.0))
    np.testing.assert_allclose(three - two, two - one)
    own = loop({**load, "concurrency": 1.0}, STEADY)["ttft"]
    assert (two - one > 0.9 * own).all()
    np.testing.assert_allclose(loop({**load, "concurrency": 1.0}, {**STEADY, "turns": 3.0})["ttft"], own)


def test_a_saturated_prefill_obeys_littles_law() -> None:
    """N = throughput x residence, where the steps' own throughput of tokens is what each request needs of them."""
    isl, osl, n = 4000.0, 64.0, np.linspace(150, 600, ROWS)
    got = loop({"concurrency": n, "isl": isl, "osl": osl, "waves": 1e4})
    served = got["served.mixed.tokens"] / got["served.mixed.total"] / (isl + osl - 1)
    np.testing.assert_allclose(served * got["e2e"], n, rtol=0.03)


def test_helpers_are_their_definitions() -> None:
    chance = np.array([0.0, 1e-9, 1e-3, 0.4, 1.0])
    np.testing.assert_allclose(any_of(4.0, chance), [0, 4e-9, 1 - 0.999**4, 1 - 0.6**4, 1], rtol=1e-8)
    np.testing.assert_allclose(any_of(1.0, chance), chance, rtol=1e-13)
    mean = np.array([0.0, 1e-6, 1e-3, 0.1, 2.0, 50.0])
    counts = np.arange(1, 300)[:, None]
    weights = np.cumprod(np.broadcast_to(mean, (299, 6)) / counts, axis=0)
    wanted = np.append([1.0], ((counts * weights).sum(0) / weights.sum(0).clip(1e-300))[1:])
    np.testing.assert_allclose(drawn(mean), wanted, rtol=1e-9)
    for x, q in ((-5e4, 3e-4), (-2.0, 3.0), (0.0, 4.0), (7.0, 0.0), (7.0, 1e-3)):
        root = float(larger_root(x, q))
        assert root >= max(x, 0.0)
        assert root * (root - x) == pytest.approx(q, rel=1e-9, abs=1e-12)
    slopes = jax.grad(lambda x, q: larger_root(x, q), (0, 1))(-5.0, 0.0), jax.grad(drawn)(0.0)
    np.testing.assert_allclose([*slopes[0], slopes[1]], [0.0, 0.2, 0.5])
    assert [float(jax.grad(any_of, 1)(4.0, p)) for p in (0.0, 1.0)] == [4.0, 0.0]


# ----------------------------------------------------------------------------------------- operators

H100 = Device(
    peak_bf16=989e12, peak_fp8=1979e12, peak_fp4=0.0, peak_int8=1979e12,
    bandwidth=3.35e12, capacity=80e9, power=700.0, price=2.0,
)  # fmt: skip
FP8 = Precision(
    **{f"{part}_{what}": 1.0 for part in ("mixer", "ffn", "expert") for what in ("bytes", "act", "rate")},
    kv_bytes=2.0,
    dispatch_bytes=1.0,
    combine_bytes=2.0,
)
ONE = Plan(tp=1.0, pp=1.0, attention_dp=1.0, cp=1.0, moe_tp=1.0, moe_ep=1.0, replicas=1.0, precision=FP8)


def without(c: Coefficients, names: Sequence[str]) -> Coefficients:
    return replace(c, **dict.fromkeys(names, 0.0))


def test_what_a_tile_wastes_vanishes_in_a_large_gemm() -> None:
    c = Coefficients()
    bare = without(c, ("gemm_m_half", "gemm_k_half", "gemm_walk", "quantise_passes"))

    def ratio(size: float) -> float:
        shape = GemmShape(k=size, n=size)
        return float(gemm(shape, 1.0, 1.0, 1.0, H100, c)(size) / gemm(shape, 1.0, 1.0, 1.0, H100, bare)(size))

    assert ratio(1e3) > 1.2
    assert ratio(1e7) == pytest.approx(1.0, abs=1e-3)
    assert ratio(1e3) > ratio(1e4) > ratio(1e5) > ratio(1e6) > 1.0


def test_what_experts_waste_vanishes_in_large_ones() -> None:
    c = Coefficients()
    bare = without(c, ("expert_half_fp8", "expert_m_half", "expert_walk", "expert_each_fp8", "permute_passes",
                       "expert_corner"))  # fmt: skip

    def ratio(size: float) -> float:
        routed = Routed(experts=8.0, top_k=2.0, d_in=size, width=size, matrices=3.0)
        full, least = (grouped(routed, ONE, H100, x)(8 * size, 8.0) for x in (c, bare))
        return float(full / least)

    assert ratio(1e3) > 1.5
    assert ratio(1e8) == pytest.approx(1.0, abs=1e-3)


def test_absent_experts_cost_nothing_but_a_walk_and_have_slopes() -> None:
    none = Routed(experts=0.0, top_k=0.0, d_in=0.0, width=0.0, matrices=3.0)

    def seconds(c: Coefficients) -> Any:
        return grouped(none, ONE, H100, c)(0.0, 0.0)

    assert float(seconds(Coefficients())) == 0.0
    slopes = jax.grad(seconds)(jax.tree.map(float, Coefficients()))
    assert all(np.isfinite(slope) for slope in jax.tree.leaves(slopes))


def test_few_rows_waste_at_most_so_many_times_their_own() -> None:
    """One row an expert: m_most of them where a tile is much larger; m_half where a tile is small."""
    routed = Routed(experts=256.0, top_k=8.0, d_in=7168.0, width=2048.0, matrices=3.0)
    c = replace(Coefficients.ideal(), expert_m_most=10.0)
    fast = replace(H100, bandwidth=1e30)
    full = grouped(routed, ONE, fast, c)(256.0, 256.0)
    for half, times in ((1e6, 11.0), (1e-3, 1.001), (10.0, 1 + 10 / 2)):
        padded = grouped(routed, ONE, fast, replace(c, expert_m_half=half))(256.0, 256.0)
        assert float(padded / full) == pytest.approx(times, rel=1e-3)


def test_a_power_limit_leaves_less_than_the_peak_and_more_to_more_power() -> None:
    c, rng = Coefficients(), np.random.default_rng(0)
    for device in [random_device(rng) for _ in range(50)]:
        low, high = (np.array(rates(replace(device, power=p), c)) for p in (device.power, 1.1 * device.power))
        peaks = np.array([device.peak_bf16, device.peak_fp8, device.peak_fp4, device.peak_int8])
        peaks = np.where(peaks > 0, peaks, device.peak_bf16)
        assert (low < peaks).all()
        assert (high > low).all()
        half = replace(c, flops_per_joule=device.peak_bf16 / device.power)
        assert float(rates(device, half)[0]) == pytest.approx(device.peak_bf16 / 2)
        np.testing.assert_array_equal(rates(device, Coefficients.ideal()), peaks)
        np.testing.assert_array_equal(rates(replace(device, power=0.0), c), peaks)  # nobody said


def test_the_bare_roofline_has_slopes_in_single() -> None:
    """An endless power limit must not overflow on its way back."""
    with jax.enable_x64(False):
        for c in (Coefficients.ideal(), Coefficients()):
            slopes = jax.grad(lambda d, k: sum(x / 1e15 for x in rates(d, k)), (0, 1))(
                jax.tree.map(np.float32, H100), jax.tree.map(np.float32, c)
            )
            assert all(np.isfinite(slope) for slope in jax.tree.leaves(slopes))
