"""How many requests run at once: against Erlang, exact birth and death chains, and simulated queues of many servers."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dse.cost.occupancy import Occupancy, occupancy

SEATED = jax.jit(occupancy)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def alike(
    rate: float, seats: int, arrival_scv: float = 1.0, peakedness: float = 1.0, service_scv: float = 1.0
) -> Occupancy:
    """Every stay lasts a second."""
    return SEATED(rate, float(seats), np.array([0.0, float(seats)]), np.ones(2), arrival_scv, service_scv, peakedness)


@pytest.mark.parametrize(
    ("seats", "load", "within"),
    [(2, 0.5, 0.03), (5, 0.8, 0.03), (20, 0.3, 0.06), (30, 0.7, 0.01), (100, 0.8, 0.01), (1000, 0.97, 0.001)],
)
def test_against_erlang(seats: int, load: float, within: float) -> None:
    """Exponential service, by the recursion of Erlang's loss formula."""
    offered, blocked = load * seats, 1.0
    for k in range(1, seats + 1):
        blocked = offered * blocked / (k + offered * blocked)
    delayed = seats * blocked / (seats - offered * (1.0 - blocked))
    found = alike(offered, seats)
    assert float(found.wait.delayed) == pytest.approx(delayed, rel=within)
    assert float(found.wait.mean) == pytest.approx(delayed / (seats - offered), rel=within)


def test_seats_without_end_hold_a_poisson_number() -> None:
    """And z times its variance where arrivals come in bursts."""
    for peakedness in (1.0, 3.0):
        found = alike(80.0, 1000, peakedness=peakedness)
        assert float(found.mean) == pytest.approx(80.0, rel=0.002 * peakedness)
        assert float(found.variance) == pytest.approx(80.0 * peakedness, rel=0.01)
        assert float(found.wait.mean) < 1e-9


def chain(rate: float, seats: int, own: float, more: float) -> tuple[float, float, float, float]:
    """(P(wait), wait, mean and variance of those at work) where k at work take own + more k each: its exact balance."""
    states = np.arange(6000)
    work = np.minimum(states, seats)
    steps = np.log(rate) + np.log(own + more * work[1:]) - np.log(work[1:])
    chance = np.exp(np.cumsum(np.append(0.0, steps)) - np.cumsum(np.append(0.0, steps)).max())
    chance /= chance.sum()
    mean = chance @ work
    return chance[seats:].sum(), chance @ (states - work) / rate, mean, chance @ work**2 - mean**2


@pytest.mark.parametrize("load", [0.5, 0.7, 0.85, 0.9, 0.95])
def test_requests_that_slow_each_other_down(load: float) -> None:
    seats, own, more = 100, 0.6, 0.004
    rate = 100.0 * load
    delayed, wait, mean, variance = chain(rate, seats, own, more)
    stays = np.array([own, own + more * seats])
    found = SEATED(rate, float(seats), np.array([0.0, float(seats)]), stays, 1.0, 1.0, 1.0, more * rate)
    assert float(found.mean) == pytest.approx(mean, rel=1e-3)
    assert float(found.variance) == pytest.approx(variance, rel=1e-2)
    if load > 0.6:  # rare below
        assert float(found.wait.delayed) == pytest.approx(delayed, rel=0.05)
        assert float(found.wait.mean) == pytest.approx(wait, rel=0.05)
    assert variance > 1.1 * mean or load > 0.9  # they vary more than independent ones until the seats run out


def test_one_seat_more_shortens_the_wait_and_gradients_agree() -> None:
    def wait(seats: float, rate: float) -> jax.Array:
        return occupancy(
            rate, seats, jnp.array([0.0, 60.0, 120.0]), jnp.array([0.5, 0.9, 1.2]), 1.4, 1.0, 2.0, 0.4
        ).wait.mean

    waits = [float(wait(seats, 80.0)) for seats in (110.0, 111.0, 115.0, 120.0)]
    assert waits == sorted(waits, reverse=True)
    step = 1e-4
    for at, move in ((jax.grad(wait, 0), (1.0, 0.0)), (jax.grad(wait, 1), (0.0, 1.0))):
        ends = [float(wait(112.0 + sign * step * move[0], 80.0 + sign * step * move[1])) for sign in (1, -1)]
        assert float(at(112.0, 80.0)) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3)


def test_more_than_the_seats_serve_is_flagged() -> None:
    found = alike(31.0, 30)
    assert not bool(found.wait.stable)
    assert np.isfinite(float(found.wait.mean))
    assert float(found.wait.delayed) == pytest.approx(1.0, abs=1e-2)


def _waits(servers: int, gaps: np.ndarray, service: np.ndarray) -> np.ndarray:
    """Waits (n,) of one queue before several servers, first come first served, by a heap of when each is free."""
    free = [0.0] * servers
    waits = np.empty(len(gaps))
    for i, (come, own) in enumerate(zip(np.cumsum(gaps), service, strict=True)):
        start = max(heapq.heappop(free), come)
        waits[i] = start - come
        heapq.heappush(free, start + own)
    return waits


@pytest.mark.parametrize(("cv", "rate", "peakedness"), [(1.0, 17.0, 1.0), (2.0, 15.0, 2.5), (3.0, 14.0, 5.0)])
def test_against_simulated_queues(cv: float, rate: float, peakedness: float) -> None:
    """Gamma gaps before exponential service: z = 1 + (cv^2 - 1) E[min]/E[S], E[min] half a stay."""
    rng = np.random.default_rng(7)
    servers, n = 20, 120_000
    waits = _waits(servers, rng.gamma(1.0 / cv**2, cv**2 / rate, n), rng.exponential(1.0, n))[3000:]
    found = alike(rate, servers, cv**2, peakedness)
    assert float(found.wait.mean) == pytest.approx(waits.mean(), rel=0.15)
    assert float(found.wait.delayed) == pytest.approx((waits > 0).mean(), rel=0.15)


@pytest.mark.parametrize(("seats", "cv", "service_cv"), [(1, 1.0, 0.3), (3, 2.0, 0.3), (3, 5.0, 1.0), (8, 5.0, 0.3)])
def test_few_seats_at_low_load_against_simulated_queues(seats: int, cv: float, service_cv: float) -> None:
    """Where the number is mostly 0: those that wait follow their own burst, and are few in the end."""
    rng = np.random.default_rng(3)
    n, variance = 120_000, np.log1p(service_cv**2)
    for load in (0.01, 0.1, 0.4):
        rate = load * seats
        service = rng.lognormal(-0.5 * variance, np.sqrt(variance), n)
        waits = _waits(seats, rng.gamma(1.0 / cv**2, cv**2 / rate, n), service)[3000:]
        peakedness = 1.0 + (cv**2 - 1.0) * float(np.minimum(service[1:], service[:-1]).mean())
        found = alike(rate, seats, cv**2, peakedness, service_cv**2)
        assert float(found.wait.delayed) == pytest.approx((waits > 0).mean(), rel=0.25, abs=1e-3)
        assert 0.7 * waits.mean() - 1e-4 <= float(found.wait.mean) <= 4.0 * waits.mean() + 1e-3  # high in deep bursts


def test_nobody_is_there_and_waits_as_the_rate_vanishes() -> None:
    for seats, peakedness in ((2, 2.0), (20, 13.0)):
        rates = np.array([1e-9, 1e-6, 1e-3, 0.1, 0.5])
        found = jax.vmap(lambda rate, k=seats, z=peakedness: alike(rate, k, 4.0, z))(rates)
        assert np.all(np.diff(found.wait.mean) > 0)
        assert np.all(found.mean <= 2.0 * rates * (1.0 + 1e-9))
        assert np.all(found.variance <= 12.0 * peakedness * rates)
        assert float(found.wait.delayed[0]) < 1e-3
