"""Waits behind prompts of earlier iterations: limits, and queues that slow down while they last, simulated."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from dse.cost.backlog import _swelling, backlog
from dse.cost.queueing import Moments, Wait, both, gg1, percentile


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def queue(scv: float, weight: list[float]) -> Any:
    """What `backlog` reads of a replica."""
    shares = jnp.array(weight)
    return SimpleNamespace(arrival_scv=scv, mean=lambda values: jnp.sum(shares * values))


ONE = (jnp.zeros(1), jnp.ones(1))  # the batch is always the mean one
FOUND = jax.jit(lambda rate, scv, s, more, stay: backlog(queue(scv, [1.0]), rate, s, more, stay, *ONE))
PERCENTILE = jax.jit(percentile)


@pytest.mark.parametrize("scv", [0.5, 1.0, 4.0])
def test_of_one_speed_it_is_the_general_queue(scv: float) -> None:
    weight, service = [0.5, 0.3, 0.2], jnp.array([0.02, 0.1, 0.3])
    x, nothing = queue(scv, weight), jnp.zeros(3)
    wait = backlog(x, 5.0, service, nothing, 3.0, jnp.array([-0.5, 0.0, 0.7]), jnp.array([0.2, 0.5, 0.3]))
    plain = gg1(5.0, scv, Moments.of(service, jnp.array(weight)))
    for name in ("mean", "delayed", "scv"):
        assert float(getattr(wait, name)) == pytest.approx(float(getattr(plain, name)), rel=5e-6)


def test_speeds_far_apart_against_quadrature() -> None:
    """A queue that is a thousand times slower once it has lasted: exp(-int (1-y)/quick + y/slow)."""
    for lasts in (0.01, 0.5, 3.0, 30.0):
        quick, slow = (
            Wait(mean=w, delayed=1.0, scv=1.0, utilisation=0.5, stable=jnp.asarray(True)) for w in (0.1, 100.0)
        )
        wait, _ = _swelling(quick, slow, lasts, 1e-9)

        def density(w: float, lasts: float = lasts) -> float:
            return float(np.exp(-w / 100.0 + (10.0 - 0.01) * lasts * np.expm1(-w / lasts)))

        ends = (0.0, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 5000.0)
        total, first = (
            sum(quad(lambda w, p=power: w**p * density(w), *pair)[0] for pair in pairwise(ends)) for power in (0, 1)
        )
        assert float(wait.mean) == pytest.approx(first / total, rel=1e-3)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("scv", [0.005, 0.09, 0.5, 1.0, 25.0])
def test_rates_that_vanish_have_waits_that_are_numbers(scv: float, kind: Any) -> None:
    """Of regular arrivals nobody waits at low load, so that the mean wait is 0 in any precision."""
    waits = []
    with jax.enable_x64(kind is np.float64):
        batch = jnp.zeros(1, kind), jnp.ones(1, kind)
        for rate in (1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.9):
            given = kind(rate), jnp.ones(1, kind), jnp.full(1, 0.05, kind), kind(20.0)
            wait = backlog(queue(kind(scv), [1.0]), *given, *batch)
            assert all(np.isfinite(float(getattr(wait, name))) for name in ("mean", "delayed", "scv"))
            waits.append(float(wait.mean))
    assert waits == sorted(waits)
    assert scv > 1.0 or waits[0] < 1e-5


def test_of_slow_sizes_half_of_the_time_each() -> None:
    """A batch that never changes: the mixture of two queues."""
    x, service, more = queue(1.0, [1.0]), jnp.array([0.5]), jnp.array([0.3])
    wait = backlog(x, 1.0, service, more, 1e9, jnp.array([0.0, 1.0]), jnp.array([0.5, 0.5]))
    ends = [gg1(1.0, 1.0, Moments.of(jnp.array([s]))) for s in (0.5, 0.8)]
    assert float(wait.mean) == pytest.approx(0.5 * sum(float(w.mean) for w in ends), rel=1e-4)
    assert float(wait.delayed) == pytest.approx(0.65, rel=1e-4)
    assert float(wait.scv) > 1.2  # heavier than either


def simulated(rng: np.random.Generator, cv: float, quiet: float, full: float, stay: float, n: int) -> tuple[Any, float]:
    """(waits, mean service) of a queue fed once a second whose service goes from `quiet` to `full` seconds as decode
    swells: towards 1 while it works and towards 0 while it does not, in `stay` seconds."""
    gaps = rng.gamma(1.0 / cv**2, cv**2, n)
    waits, services = np.empty(n), np.empty(n)
    wait = swollen = 0.0
    for i, gap in enumerate(gaps):
        service = quiet + swollen * (full - quiet)
        waits[i], services[i] = wait, service
        works = min(gap, wait + service)
        swollen = 1.0 - (1.0 - swollen) * np.exp(-works / stay)
        swollen *= np.exp(-(gap - works) / stay)
        wait = max(wait + service - gap, 0.0)
    return waits[n // 20 :], float(services[n // 20 :].mean())


@pytest.mark.parametrize(("cv", "stay"), [(1.0, 5.0), (1.0, 20.0), (2.0, 20.0), (2.0, 60.0)])
def test_against_a_queue_that_slows_down(cv: float, stay: float) -> None:
    """Decode that swells to its size at capacity takes all work there to 0.85 of what can be done; the share of time in
    which the queue works is that of the mean service."""
    waits, service = simulated(np.random.default_rng(5), cv, 0.45, 0.85, stay, 400_000)
    wait = FOUND(1.0, cv**2, jnp.array([service]), jnp.array([0.85 - service]), stay)
    plain = gg1(1.0, cv**2, Moments.of(jnp.array([service])))
    errors = [float(wait.mean) / waits.mean() - 1.0, float(plain.mean) / waits.mean() - 1.0]
    assert abs(errors[0]) < min(0.15, abs(errors[1]))
    for share, allowed in ((0.9, 0.08), (0.99, 0.22)):
        truth = float(np.quantile(waits, share))
        error, other = (float(PERCENTILE(w, share)) / truth - 1.0 for w in (wait, plain))
        assert abs(error) < allowed
        assert abs(error) < 0.7 * abs(other)


def test_sums_of_waits() -> None:
    one = gg1(1.0, 1.0, Moments.of(jnp.array([0.5])))
    nothing = Wait(mean=0.0, delayed=0.0, scv=1.0, utilisation=0.0, stable=jnp.asarray(True))
    for name in ("mean", "delayed", "scv"):
        assert float(getattr(both(one, nothing), name)) == pytest.approx(float(getattr(one, name)), rel=1e-9)
    twice = both(one, one)
    assert float(twice.mean) == pytest.approx(2.0 * float(one.mean))
    assert float(twice.delayed) == pytest.approx(0.75)
