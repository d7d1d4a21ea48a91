"""What a stage of a pipeline makes a request wait, and percentiles of the whole, against plain Python simulations."""

from __future__ import annotations

import heapq
import itertools
import random
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dse.cost.pipeline import Batched, Continuous, Load, batched, batched_part, pool_load, running, scan_time
from dse.cost.pipeline_tails import Cumulants, of_moments, of_some, of_wait, together
from dse.cost.queueing import Moments, mg1
from dse.cost.types import replace
from dse.search.pipeline_stages import stage_slopes
from dse.search.pipeline_tails import cumulants, percentile
from dse.space.load import parse_pipeline
from dse.space.pipeline_compile import compile_pipeline

SHARES = (0.5, 0.9, 0.99)


def one_stage(service: list[float], batch: float = 1.0, share: float = 1.0) -> Batched:
    """Kinds that are alike likely; a full batch takes as long as a lone call."""
    x = np.array(service)
    weight = np.full(len(x), 1.0 / len(x))
    found = batched((x, x), (x, x), weight, weight, np.float64(batch), np.float64(share))
    return jax.tree.map(np.asarray, found)


def simulated(rate: float, service: list[float], batch: int, servers: int, count: int = 60_000) -> list[float]:
    """Waits where a free server takes up to `batch` of the waiting; a batch lasts the mean of its calls' times."""
    dice = random.Random(5)
    arrivals = list(itertools.accumulate(dice.expovariate(rate) for _ in range(count)))
    free, waits, i = [0.0] * servers, [], 0
    while i < count:
        k = min(range(servers), key=free.__getitem__)
        start = max(free[k], arrivals[i])
        taken = 1
        while taken < batch and i + taken < count and arrivals[i + taken] <= start:
            taken += 1
        waits += [start - a for a in arrivals[i : i + taken]]
        free[k] = start + sum(dice.choice(service) for _ in range(taken)) / taken
        i += taken
    return waits


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9])
def test_one_server_waits_as_pollaczek_and_khinchine_say(rho: float) -> None:
    """And its variance and chance Takacs's."""
    service = [0.5, 1.0, 3.0]
    mean, square = np.mean(service), np.mean(np.square(service))
    found = pool_load(rho / mean, (one_stage(service),), 1.0)
    assert float(found.wait) == pytest.approx(rho / mean * square / (2 * (1 - rho)), rel=1e-5)
    assert float(found.utilisation) == pytest.approx(rho)
    assert float(found.delayed) == pytest.approx(rho)
    exact = mg1(rho / mean, Moments.of(np.array(service)))
    assert float(found.scv) == pytest.approx(float(exact.scv), rel=1e-4)


@pytest.mark.parametrize(
    ("batch", "servers", "rho"),
    [(1, 1, 0.8), (1, 3, 0.8), (4, 1, 0.3), (4, 1, 0.5), (4, 1, 0.9), (8, 1, 0.8), (4, 2, 0.8)],
)
def test_waits_of_a_batch_server_are_those_of_a_simulation(batch: int, servers: int, rho: float) -> None:
    """Means, and percentiles of the wait and a mean service."""
    service = [0.6, 1.4]
    rate = rho * servers * batch
    expected = np.array(simulated(rate, service, batch, servers))
    found = pool_load(rate, (one_stage(service, batch),), float(servers))
    assert float(found.wait) == pytest.approx(float(expected.mean()), rel=0.2)
    x = of_wait(found.wait, found.delayed, found.scv)
    for share, tolerance in zip(SHARES, (0.12, 0.12, 0.22), strict=True):
        late = float(percentile(share, *(np.asarray(v) for v in (x.mean, x.variance, x.third))))
        assert late + 1.0 == pytest.approx(float(np.quantile(expected, share)) + 1.0, rel=tolerance)


def test_a_shared_pool_is_the_queue_of_both_stages() -> None:
    """Two stages of one server, batches of one: M/G/1 of the mixture."""
    a, b = one_stage([1.0]), one_stage([3.0])
    rate = 0.15  # each
    expected = rate * (1.0 + 9.0) / (2 * (1 - rate * 4.0))
    found = pool_load(rate, (a, b), 1.0)
    assert float(found.wait) == pytest.approx(expected, rel=1e-5)
    mixture = mg1(2 * rate, Moments.of(np.array([1.0, 3.0])))
    assert float(found.scv) == pytest.approx(float(mixture.scv), rel=1e-4)


def test_an_overloaded_pool_says_so_and_stays_finite() -> None:
    found = pool_load(3.0, (one_stage([1.0]),), 2.0)
    assert not bool(found.stable)
    assert np.isfinite([float(found.wait), float(found.scv), float(found.delayed)]).all()


def test_continuous_stages_meet_their_knots() -> None:
    s = Continuous(rate=np.array([1.0, 3.0, 4.0]), tpot=np.array([0.01, 0.02, 0.04]), seats=64.0, scv=0.0, calls=1.0)
    assert float(running(s, 0.2, 1.0).part.tpot) == pytest.approx(0.01)
    assert float(running(s, 6.0, 2.0).part.tpot) == pytest.approx(0.02)
    between = float(running(s, 3.5, 1.0).part.tpot)  # linear in what runs, 0.06 to 0.16 of a call
    assert between == pytest.approx(0.02 + 0.2 * (3.5 * between - 0.06))
    assert not bool(running(s, 4.1, 1.0).stable)


def steps_simulated(
    rate: float, osl: float, cv: float, a: float, b: float, c: float, count: int = 24_000
) -> list[float]:
    """TPOT of each call where a step takes a + b n + c times the contexts of the n calls in it, which join at its end.

    Contexts are lognormal of mean 1000, coefficient of variation 1 where c > 0.
    """
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1.0 / rate, count))

    def lognormal(mean: float, cv: float) -> Any:
        sigma = np.sqrt(np.log1p(cv**2))
        return mean * np.exp(sigma * rng.standard_normal(count) - sigma**2 / 2)

    steps, context = np.maximum(np.rint(lognormal(osl, cv)), 1).astype(int), lognormal(1000.0, 1.0)
    now, i, k, total = 0.0, 0, 0, 0.0
    ends: list[tuple[int, int]] = []
    start, found = np.zeros(count), np.zeros(count)
    while i < count or ends:
        now = now if ends else max(now, arrivals[i])
        while i < count and arrivals[i] <= now:
            heapq.heappush(ends, (k + int(steps[i]), i))
            start[i], total, i = now, total + context[i], i + 1
        now, k = now + a + b * len(ends) + c * total, k + 1
        while ends and ends[0][0] <= k:
            _, j = heapq.heappop(ends)
            found[j], total = (now - start[j]) / steps[j], total - context[j]
    return found[count // 10 : -count // 20].tolist()


@pytest.mark.parametrize(
    ("rate", "osl", "cv", "a", "b", "c"),
    [
        (2.0, 300, 0.0, 0.01, 1e-4, 0.0),
        (20.0, 300, 0.0, 0.01, 1e-4, 0.0),  # a step takes two and a half times what weights take
        (15.0, 300, 0.8, 0.01, 1e-4, 0.0),
        (15.0, 300, 0.5, 0.01, 5e-5, 5e-8),
        (4.0, 1000, 0.5, 0.006, 4e-5, 2e-8),
    ],
)
def test_tpot_percentiles_of_decode_are_those_of_a_step_simulation(
    rate: float, osl: float, cv: float, a: float, b: float, c: float
) -> None:
    """Within 3%, P99 4%; and the spread itself within 10%."""
    alive = np.geomspace(1.0, 2000.0, 6)
    tpot = a + (b + 1000 * c) * alive
    stage = Continuous(
        rate=alive / (osl * tpot),
        tpot=tpot,
        seats=2000.0,
        scv=cv**2,
        calls=1.0,
        steps=osl,
        uneven=(c * 1000.0 * alive) ** 2,
    )
    part = running(stage, np.asarray(rate), 1.0).part
    expected = np.array(steps_simulated(rate, osl, cv, a, b, c))
    assert float(part.tpot) == pytest.approx(expected.mean(), rel=0.03)
    assert float(part.tpot_variance) ** 0.5 == pytest.approx(expected.std(), rel=0.1)
    for share, rel in zip(SHARES, (0.03, 0.03, 0.04), strict=True):
        late = percentile(share, *(np.asarray(x) for x in (part.tpot, part.tpot_variance, part.tpot_third)))
        assert float(late) == pytest.approx(np.quantile(expected, share), rel=rel)


def test_tpot_does_not_spread_where_steps_are_alike() -> None:
    """And an idle replica's calls hardly meet."""
    rate = np.array([1.0, 10.0, 100.0])
    flat = Continuous(rate=rate, tpot=np.full(3, 0.01), seats=64.0, scv=0.5, calls=1.0, steps=100.0, uneven=np.zeros(3))
    assert float(running(flat, np.asarray(50.0), 1.0).part.tpot_variance) == 0.0
    steep = Continuous(rate=rate, tpot=rate**0.5 / 100, seats=64.0, scv=0.5, calls=1.0, steps=100.0, uneven=np.zeros(3))
    idle, busy = (running(steep, np.asarray(x), 1.0).part for x in (1e-4, 5.0))
    assert float(idle.tpot_variance) < 1e-3 * float(busy.tpot_variance)


def test_a_scan_reads_each_list_once() -> None:
    assert float(scan_time(1e9, 0.01, 1.0, 1e11, 0.002)) == pytest.approx(0.002 + 1e-4, rel=1e-5)
    assert float(scan_time(1e9, 1.0, 16.0, 1e11, 0.0)) == pytest.approx(0.01, rel=1e-5)  # the whole index, once
    assert float(scan_time(1e9, 0.5, 2.0, 1e11, 0.0)) == pytest.approx(0.0075, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- tails


def test_percentiles_of_gammas_are_exact() -> None:
    """Of the gamma distribution with a shift, and of an exponential up to where P90 is held."""
    rng = np.random.default_rng(1)
    sample = 2.0 + rng.gamma(4.0, 1.0, 400_000)
    for share in SHARES:
        found = percentile(share, np.array(6.0), np.array(4.0), np.array(8.0))
        assert float(found) == pytest.approx(np.quantile(sample, share), rel=5e-3)
    one = np.array(1.0)
    for share, most in ((0.5, 1e-3), (0.9, 0.02), (0.99, 1e-3)):
        assert float(percentile(share, one, one, 2 * one)) == pytest.approx(-np.log(1 - share), rel=most)


@pytest.mark.parametrize("share", [0.9, 0.99])
def test_percentiles_rise_with_every_cumulant(share: float) -> None:
    """So that a search may leave out what is worse in all of them."""
    mean = 1.0
    variance, third = np.meshgrid(np.geomspace(1e-4, 10, 120), np.geomspace(1e-7, 100, 120), indexing="ij")
    found = percentile(share, mean, variance, third)
    assert (np.diff(found, axis=0) >= -1e-4).all()  # interpolation between the table's skewnesses
    assert (np.diff(found, axis=1) >= -1e-4).all()


def test_cumulants_give_their_percentiles_back() -> None:
    mean, p90, p99 = np.array([1.0, 1.0, 1.0]), np.array([1.5, 2.3, 1.2]), np.array([2.1, 4.6, 1.4])
    found = cumulants(mean, p90, p99)
    assert percentile(0.9, mean, *found) == pytest.approx(p90, rel=1e-6)
    assert percentile(0.99, mean, *found) == pytest.approx(p99, rel=1e-3)
    rare = cumulants(*(np.array(x) for x in (1.0, 1.1, 5.0)))  # a few requests wait long: late, never early
    assert float(percentile(0.99, np.array(1.0), *rare)) == pytest.approx(5.0, rel=1e-3)
    assert float(percentile(0.9, np.array(1.0), *rare)) > 1.1


def test_a_share_of_requests_is_a_mixture() -> None:
    rng = np.random.default_rng(2)
    x = rng.gamma(2.0, 3.0, 300_000) * (rng.random(300_000) < 0.3)
    found = of_some(of_moments(6.0, 54.0, 648.0), 0.3)  # raw moments of gamma(2, 3)
    assert float(found.mean) == pytest.approx(x.mean(), rel=0.01)
    assert float(found.variance) == pytest.approx(x.var(), rel=0.02)
    assert float(found.third) == pytest.approx(np.mean((x - x.mean()) ** 3), rel=0.05)


def tandem(rate: float, stages: list[tuple[list[float], int, float]], alike: bool, count: int = 60_000) -> Any:
    """TTFT of requests that pass stages (services, servers, share of the requests) in turn, first come first served.

    `alike`: one draw decides a request's place among the services of every stage.
    """
    dice = random.Random(7)
    time, now = [], 0.0
    for _ in range(count):
        now += dice.expovariate(rate)
        time.append(now)
    came = list(time)
    place = [dice.random() for _ in range(count)]
    for services, servers, share in stages:
        order = sorted((t, i) for i, t in enumerate(time))
        free = [0.0] * servers
        for t, i in order:
            if dice.random() >= share:
                continue
            u = place[i] if alike else dice.random()
            start = max(t, heapq.heappop(free))
            time[i] = start + services[int(u * len(services))]
            heapq.heappush(free, time[i])
    return np.array(time) - np.array(came)


def predicted(rate: float, stages: list[tuple[list[float], int, float]]) -> list[float]:
    total: Cumulants | None = None
    with jax.enable_x64(True):
        for services, servers, share in stages:
            s = one_stage(services, share=share)
            load: Load = pool_load(rate, (s,), jnp.float64(servers))
            part = batched_part(s, load, load.filled[0], share, 0.0 * load.wait).ttft
            total = part if total is None else total + part
    assert total is not None
    return [float(percentile(q, *(np.asarray(x) for x in (total.mean, total.variance, total.third)))) for q in SHARES]


def spread(mean: float, cv: float) -> list[float]:
    """400 quantiles of a lognormal time."""
    places = [(i + 0.5) / 400 for i in range(400)]
    sigma = float(np.sqrt(np.log1p(cv**2)))
    values = np.exp(sigma * np.array([NormalDist().inv_cdf(p) for p in places]))
    return [float(x) for x in values * mean / values.mean()]


STAGES: list[tuple[list[float], int, float]] = [
    (spread(0.5, 0.7), 2, 0.7),  # encoders, of 70% of the requests
    (spread(0.25, 0.5), 1, 1.0),
    ([0.05], 1, 1.0),
]


@pytest.mark.parametrize("rate", [0.8, 2.0, 3.2])
def test_percentiles_of_a_tandem_are_those_of_a_simulation(rate: float) -> None:
    """Stages in series, services independent; the last rate loads the busiest to 80%."""
    found, expected = predicted(rate, STAGES), np.quantile(tandem(rate, STAGES, alike=False), SHARES)
    assert found == pytest.approx(expected.tolist(), rel=0.06)


def test_lengths_that_drive_several_stages_lengthen_the_tail() -> None:
    """What the assumption of independent stages costs: where what is long at one stage is long at all, P99 is 15% low
    at low load, P50 and P90 within 8%."""
    for rate in (0.4, 2.0):
        found, alike = predicted(rate, STAGES), np.quantile(tandem(rate, STAGES, alike=True), SHARES)
        assert found[:2] == pytest.approx(alike[:2].tolist(), rel=0.08)
        assert -0.16 < found[2] / alike[2] - 1.0 < -0.05


def two_stages(rate: float, share: float, alpha: float, beta: float, merge: float, count: int = 80_000) -> np.ndarray:
    """TTFT where an encoder takes alpha a token, and prefill beta a prompt token, a/merge of them the encoder's.

    One server each. A `share` of the requests has tokens a, lognormal (2000, cv 0.7), all a prompt (500, cv 0.5).
    """
    rng = np.random.default_rng(3)

    def lognormal(mean: float, cv: float) -> Any:
        sigma = np.sqrt(np.log1p(cv**2))
        return mean * np.exp(sigma * rng.standard_normal(count) - sigma**2 / 2)

    came = np.cumsum(rng.exponential(1.0 / rate, count))
    tokens = lognormal(2000.0, 0.7) * (rng.random(count) < share)
    prompt, now, out = lognormal(500.0, 0.5), 0.0, came.copy()
    for i in np.flatnonzero(tokens):
        now = max(now, came[i]) + alpha * tokens[i]
        out[i] = now
    now, done = 0.0, np.zeros(count)
    for i in np.argsort(out, kind="stable"):
        now = max(now, out[i]) + beta * (prompt[i] + tokens[i] / merge)
        done[i] = now
    return done - came


@pytest.mark.parametrize(("share", "busy"), [(1.0, 0.02), (0.6, 0.02), (0.6, 0.5)])
def test_tokens_that_two_stages_see_lengthen_the_tail(share: float, busy: float) -> None:
    """P90 within 5%, P99 within 8% of a simulation of both; as if independent, P99 was 13 to 21% low."""
    alpha, beta, merge = 1e-4, 2e-4, 4.0
    spec = parse_pipeline(
        {
            "pipeline": [
                {
                    "name": "encode",
                    "kind": "encoder",
                    "encoder": {"layers": 1, "hidden": 64, "heads": 1, "ffn": 64},
                    "tokens": {"each": 2000, "cv": 0.7, "share": share},
                    "merge": merge,
                },
                {"name": "prefill", "kind": "prefill", "model": "Qwen3-0.6B"},
            ],
            "request": {"isl": {"mean": 500, "cv": 0.5}, "osl": 1},
            "clusters": ["h100-dgx"],
            "gpus": 8,
            "rates": [1.0],
        }
    )
    p = compile_pipeline(spec)
    rate = busy / max(alpha * 2000 * share, beta * (500 + 500 * share))
    (common,) = p.commons
    parts, slopes = [], []
    with jax.enable_x64(True):
        for stage, each in zip(spec.pipeline, (alpha, beta), strict=True):
            k = p.kinds[stage.name]
            times = each * (k.sequences * k.tokens)[None]
            s = batched((times, times), (times, times), k.weight, k.first, np.ones(1), np.full(1, k.calls))
            s = replace(s, slopes=stage_slopes(p, stage, k, times))
            load = pool_load(rate, (s,), jnp.ones(1))
            part = batched_part(s, load, load.filled[0], k.share, 0.0 * load.wait)
            parts.append(together(part.ttft, part.slopes, (common.skewness,), -1.0))
            slopes.append(part.slopes[0])
        alone = parts[0] + parts[1]
        whole = together(alone, (slopes[0] + slopes[1],), (common.skewness,))
        apart = together(together(alone, (slopes[0],), (common.skewness,)), (slopes[1],), (common.skewness,))

    def late(x: Cumulants, q: float) -> float:
        return float(percentile(q, *(np.asarray(v)[0] for v in (x.mean, x.variance, x.third))))

    expected = np.quantile(two_stages(rate, share, alpha, beta, merge), SHARES)
    assert late(whole, 0.9) == pytest.approx(expected[1], rel=0.05)
    assert late(whole, 0.99) == pytest.approx(expected[2], rel=0.08)
    assert late(apart, 0.99) < 0.9 * expected[2]
