"""The simulator against a plain event loop, the closed forms of a step, and what no scheduler may break."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
import sim_oracle

from dse.catalog.coefficients import coefficient_set
from dse.cost.batching import MIXED, POLICIES, PREFILL
from dse.cost.evaluate import Scenario
from dse.cost.memory import memory
from dse.cost.serving import cycle
from dse.cost.shard import Sharded, shard
from dse.cost.simulate import Requests, Simulation, simulate, simulate_closed
from dse.cost.step import Batch, Segment, step
from dse.cost.types import replace
from dse.space.cases import Case, parse_cases, scenarios_of

ROWS = (
    {"model": "Llama-3.1-8B", "gpu": "h100", "weights": "fp8"},
    {"model": "Llama-3.1-8B", "gpu": "l40s", "chunk": 512},
    {"model": "Llama-3.1-8B", "gpu": "h100", "tp": 2, "pp": 2, "chunk": 1024},
    {"model": "Llama-3.1-8B", "gpu": "h100", "tp": 1, "cp": 2, "overlap": "full/none"},
)
WIDE = ({"model": "DeepSeek-V3", "gpu": "h200", "attention_dp": 8, "moe_ep": 8, "speculation": 1, "chunk": 2048},)
SEATS = 6
FIELDS = ("arrival", "admitted", "first_token", "finished")


def plans(rows: Any = ROWS, coefficients: str | None = "physics", **columns: Any) -> Scenario:
    table = pd.DataFrame([{"isl": 800, "osl": 60, "concurrency": 16, **columns, **row} for row in rows])
    parsed = parse_cases(table.astype(object).where(table.notna(), "").astype(str))
    cases = [case for case in parsed if isinstance(case, Case)]
    assert len(cases) == len(rows), parsed
    return scenarios_of(cases, coefficient_set(coefficients))


@cache
def trace(n: int = 120, rate: float = 8.0, seed: int = 0) -> Requests:
    rng = np.random.default_rng(seed)
    isl = rng.integers(1, 2500, n).astype(float)
    return Requests(
        arrival=np.cumsum(rng.exponential(1 / rate, n)),
        isl=isl,
        osl=np.maximum(rng.geometric(1 / 40, n), 1).astype(float),
        prefix=np.floor(isl * rng.choice([0.0, 0.5, 1.0], n)),
        count=np.array(n),
    )


def run(scenarios: Scenario, requests: Requests, policy: int = MIXED, **how: Any) -> Simulation:
    """One shape for all tests of this file, so that it is compiled once."""
    return simulate(scenarios, requests, policy=policy, seats=SEATS, workers=2, **how)


def one(scenarios: Scenario, i: int) -> Scenario:
    return jax.tree.map(lambda x: np.asarray(x)[i], scenarios)


def tight(scenarios: Scenario, requests: int) -> Scenario:
    """The same plans on GPUs that hold so many of the nominal requests."""
    with jax.enable_x64(True):
        fits = jax.vmap(lambda x: memory(x.architecture, x.device, x.plan, x.load, x.coefficients))(scenarios)
        fits = jax.tree.map(np.asarray, fits)
    spare = np.asarray((fits.requests - requests) * fits.kv_request / np.asarray(scenarios.coefficients.utilisation))
    device = replace(scenarios.device, capacity=np.asarray(scenarios.device.capacity) - spare)
    return replace(scenarios, device=device)


@cache
def hand(i: int) -> sim_oracle.Plan:
    """The oracle's plan of a row, compiled once."""
    with jax.enable_x64(True):
        return sim_oracle.plan_of(one(plans(), i))


def by_hand(plan: sim_oracle.Plan, r: Requests, policy: str, clients: int = 0) -> np.ndarray:
    with jax.enable_x64(True):
        columns = zip(r.arrival, r.isl, r.osl, r.prefix, strict=True)
        queue = [sim_oracle.Request(k, a, int(p), int(o), int(h)) for k, (a, p, o, h) in enumerate(columns)]
        return sim_oracle.times(sim_oracle.run(plan, queue, policy, SEATS, plan.ranks, clients))


def found(sim: Simulation, i: int) -> np.ndarray:
    return np.stack([getattr(sim.outcome, name)[i] for name in FIELDS])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_where_a_plain_event_loop_puts_it(policy: str) -> None:
    scenarios, r = plans(), trace()
    sim = run(scenarios, r, POLICIES.index(policy))
    for i, row in enumerate(ROWS):
        expected = by_hand(hand(i), r, policy)
        np.testing.assert_allclose(found(sim, i), expected, rtol=1e-6, err_msg=str(row))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_of_attention_dp_step_together_as_in_a_plain_event_loop(policy: str) -> None:
    scenarios, r = plans(WIDE), trace(60, 30.0)
    sim = run(scenarios, r, POLICIES.index(policy))
    with jax.enable_x64(True):
        plan = sim_oracle.plan_of(one(scenarios, 0))
    np.testing.assert_allclose(found(sim, 0), by_hand(plan, r, policy), rtol=1e-6)


def test_memory_admits_as_a_plain_event_loop_does_and_is_never_exceeded() -> None:
    scenarios, r = tight(plans(), 4), trace()
    sim = run(scenarios, r)
    for i in range(len(ROWS)):
        plan = replace(hand(i), capacity=float(sim.capacity[i]), most_used=0.0)
        np.testing.assert_allclose(found(sim, i), by_hand(plan, r, "mixed"), rtol=1e-6)
        assert sim.totals.most_kv_share[i] == pytest.approx(plan.most_used / plan.capacity, rel=1e-5)
        assert 0.5 < sim.totals.most_kv_share[i] <= 1.0 + 1e-9
        assert sim.totals.most_waiting[i] > 0
    roomy = run(plans(), r)
    assert (roomy.totals.most_kv_share < 0.5).all()


def test_a_closed_loop_sends_the_next_request_when_one_finishes() -> None:
    scenarios, r = plans(), trace()
    for policy in ("prefill", "mixed"):
        sim = run(scenarios, r, POLICIES.index(policy), clients=3)
        for i in range(len(ROWS)):
            np.testing.assert_allclose(found(sim, i), by_hand(hand(i), r, policy, 3), rtol=1e-6, atol=1e-9)


@cache
def busy(policy: int = MIXED) -> tuple[Requests, Simulation]:
    """Requests that queue, on all plans of one rank, with coefficients as fitted."""
    r = trace(rate=12.0, seed=1)
    return r, run(plans(coefficients=None), r, policy)


@pytest.mark.parametrize("policy", [PREFILL, MIXED])
def test_requests_and_tokens_are_conserved(policy: int) -> None:
    r, sim = busy(policy)
    prompt = np.maximum(r.isl - r.prefix, 1.0)
    np.testing.assert_allclose(sim.totals.prompt_tokens, prompt.sum(), rtol=1e-6)
    np.testing.assert_allclose(sim.totals.decode_tokens, (r.osl - 1).sum(), rtol=1e-6)
    for times in (sim.outcome.admitted, sim.outcome.first_token, sim.outcome.finished):
        assert np.isfinite(times).all()


@pytest.mark.parametrize("policy", [PREFILL, MIXED])
def test_mean_counts_are_what_is_counted_at_many_moments(policy: int) -> None:
    sim, moments = busy(policy)[1], np.linspace(0.0, 1.0, 20_001)
    for i in range(len(ROWS)):
        arrival, _, first, end = (np.sort(times) for times in found(sim, i))
        came, begun, left = (np.searchsorted(x, moments * end[-1], side="right") for x in (arrival, first, end))
        assert (came - begun).mean() == pytest.approx(sim.totals.queue[i], rel=0.01)
        assert (begun - left).mean() == pytest.approx(sim.totals.decoding[i], rel=0.01)


@pytest.mark.parametrize("policy", [PREFILL, MIXED])
def test_requests_are_served_in_order_and_never_before_they_could_be(policy: int) -> None:
    r, sim = busy(policy)
    o = sim.outcome
    assert (np.diff(o.admitted, axis=1) >= 0).all()
    assert (np.diff(o.first_token, axis=1) >= 0).all()
    assert (o.admitted >= o.arrival).all()
    assert (o.finished >= o.first_token).all()
    alone = run(plans(coefficients=None), replace(r, arrival=np.arange(120) * 100.0), policy)
    shortest = alone.outcome.first_token - alone.outcome.arrival
    assert (o.first_token - o.arrival >= shortest - 1e-9).all()


def test_the_order_of_plans_changes_nothing() -> None:
    r, sim = busy()
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: np.asarray(x)[order], plans(coefficients=None))
    again = run(shuffled, r)
    np.testing.assert_allclose(again.outcome.finished, sim.outcome.finished[order], rtol=1e-12)
    np.testing.assert_allclose(again.timeline.time, sim.timeline.time[order], rtol=1e-12)


def seconds(s: Sharded, prefill: Segment | None, decode: Segment | None) -> float:
    rule = s.plan.overlap_decode if prefill is None else s.plan.overlap_prefill
    return float(cycle(s, step(s, Batch(prefill=prefill, decode=decode), rule), 0.0, 1.0))


def test_one_request_at_a_time_costs_its_own_steps() -> None:
    isl, osl, chunk = 5000.0, 300.0, 2048.0
    scenarios = plans((ROWS[0], {**ROWS[1], "chunk": ""}), isl=isl, osl=osl, concurrency=1, chunk=chunk)
    sim = simulate_closed(scenarios, waves=32, seats=8)
    with jax.enable_x64(True):
        x = one(scenarios, 0)
        s = shard(x.architecture, x.device, x.topology, x.plan, x.coefficients)
        pieces = [(0.0, chunk), (chunk, chunk), (2 * chunk, isl - 2 * chunk)]
        ttft = sum(seconds(s, Segment(requests=1.0, tokens=n, start=at, span=n), None) for at, n in pieces)
        tpot = seconds(s, None, Segment(requests=1.0, tokens=1.0, start=isl, span=osl - 1.0))
    o = jax.tree.map(lambda times: times[0], sim.outcome)
    np.testing.assert_allclose(o.first_token - o.arrival, ttft, rtol=1e-9)
    np.testing.assert_allclose((o.finished - o.first_token) / (osl - 1.0), tpot, rtol=1e-9)


def test_a_request_that_fits_nowhere_refuses_the_plan_alone() -> None:
    large = {"model": "Llama-3.1-70B", "gpu": "h100", "tp": 1}
    sim = run(plans((large, *ROWS)), trace())
    assert sim.fits.tolist() == [False, True, True, True, True]
    assert np.isnan(sim.outcome.finished[0]).all()
    assert np.isnan(sim.totals.seconds[0])
    np.testing.assert_allclose(sim.outcome.finished[1:], run(plans(), trace()).outcome.finished, rtol=1e-12)


def test_lengths_of_a_closed_loop_lie_in_the_asked_range() -> None:
    sim = simulate_closed(plans(ROWS[:2], isl=1000, osl=100, concurrency=8), waves=4, spread=0.8, seed=3, seats=8)
    drawn = sim.totals.prompt_tokens / 32
    assert ((drawn > 850) & (drawn < 950)).all()
    assert (np.isfinite(sim.outcome.finished).sum(axis=1) == 32).all()
