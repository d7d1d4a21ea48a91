"""Queues: the worked table, exact tails, and every approximation against the Lindley recursion within its domain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal, getcontext
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dse.cost import queueing as q

N = 400_000
WARM = N // 20
# Each compiled once.
RECURSION, PERCENTILE, EXACT, SURVIVAL, CROSSOVER, GENERAL = (
    jax.jit(f) for f in (q.lindley, q.percentile, q.md1_percentile, q.md1_survival, q.crossover, q.gg1)
)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# The table of DistServe's forms (D = 0.1 s): R, one server, two stages, intra-op at K = 1.7.
TABLE = ((2, 0.1125, 0.1027778, 0.0627451), (5, 0.15, 0.1083333, 0.0710784), (8, 0.3, 0.1166667, 0.0849673))


@pytest.mark.parametrize(("rate", "one", "stages", "tensor"), TABLE)
def test_worked_table(rate: float, one: float, stages: float, tensor: float) -> None:
    found = q.single(rate, 0.1), q.inter_op(rate, 0.1, 2.0), q.intra_op(rate, 0.1, 1.7)
    assert [float(x.ttft) for x in found] == pytest.approx([one, stages, tensor], abs=5e-8)


@pytest.mark.parametrize(("speedup", "load"), [(1.2, 0.4338), (1.5, 0.9361), (1.8, 1.4291)])
def test_crossover(speedup: float, load: float) -> None:
    assert float(CROSSOVER(speedup)) == pytest.approx(load, abs=5e-5)
    closed = 0.5 * (speedup + 2 - math.sqrt((speedup + 2) ** 2 - 32 * speedup * (speedup - 1) / (3 * speedup - 2)))
    assert float(CROSSOVER(speedup)) == pytest.approx(closed, abs=1e-9)
    step = 1e-5
    slope = (float(CROSSOVER(speedup + step)) - float(CROSSOVER(speedup - step))) / (2 * step)
    assert float(jax.grad(q.crossover)(speedup)) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("stages", [2.0, 4.0, 8.0])
def test_crossover_is_where_the_two_forms_meet(stages: float) -> None:
    speedup = 0.6 * stages
    load = float(CROSSOVER(speedup, stages))
    assert float(q.intra_op(load, 1.0, speedup).ttft) == pytest.approx(float(q.inter_op(load, 1.0, stages).ttft), 1e-9)
    below, above = 0.9 * load, load + 0.5 * (speedup - load)
    assert q.intra_op(below, 1.0, speedup).ttft < q.inter_op(below, 1.0, stages).ttft
    assert q.intra_op(above, 1.0, speedup).ttft > q.inter_op(above, 1.0, stages).ttft
    assert (float(CROSSOVER(0.9, stages)), float(CROSSOVER(stages, stages))) == (0.0, stages)


@pytest.mark.parametrize("rate", [10.0, 12.0, 1e6])
def test_unstable_is_a_flag_and_never_infinite(rate: float) -> None:
    service = q.Moments.of(jnp.array([0.05, 0.15]))
    for wait in (q.md1(rate, 0.1), q.mg1(rate, service), q.gg1(rate, 4.0, service), q.gg1(rate, 0.5, service)):
        assert not wait.stable
        assert q.word(bool(wait.stable)) == "unstable"
        assert all(np.isfinite(float(x)) for x in (wait.mean, wait.delayed, wait.scv, PERCENTILE(wait, 0.99)))
        assert float(wait.mean) > 0
    assert q.word(bool(q.md1(5.0, 0.1).stable)) == "stable"
    assert np.isfinite(float(EXACT(rate, 0.1, 0.99)))


def _crommelin(load: Fraction, x: Fraction) -> float:
    """P(W <= x D) = (1-r) sum_k (-1)^k z^k/k! e^z, z = r(x-k): the textbook's alternating sum, in 80 digits."""
    getcontext().prec = 80
    total = Decimal(0)
    for k in range(int(x) + 1):
        z = load * (x - k)
        exact = Decimal(z.numerator) / Decimal(z.denominator)
        total += (-exact) ** k / math.factorial(k) * exact.exp() if z else Decimal(k == 0)
    return float((1 - Decimal(load.numerator) / Decimal(load.denominator)) * total)


def test_exact_tail_equals_crommelins_series() -> None:
    for load in (Fraction(1, 10), Fraction(1, 2), Fraction(8, 10), Fraction(95, 100)):
        for x in (Fraction(0), Fraction(1, 3), Fraction(1), Fraction(5, 2), Fraction(10), Fraction(151, 5)):
            found = float(SURVIVAL(float(load), float(x)))
            assert found == pytest.approx(1.0 - _crommelin(load, x), abs=1e-12)


def test_exact_tail_continues_smoothly_and_integrates_to_the_mean() -> None:
    for load in (0.3, 0.8, 0.95):
        edge = q.STATES - 1e-9, q.STATES + 1e-9
        low, high = (float(SURVIVAL(load, x)) for x in edge)
        assert high == pytest.approx(low, rel=1e-3, abs=1e-13)
        x = np.linspace(0.0, 40.0 / (1.0 - load), 40_001)
        tail = np.asarray(jax.vmap(lambda t: q.md1_survival(load, t))(x))  # noqa: B023
        assert np.all(np.diff(tail) <= 1e-12)
        assert np.trapezoid(tail, x) == pytest.approx(float(q.md1(load, 1.0).mean), rel=2e-3)


def _lengths(rng: np.random.Generator, cv: float) -> np.ndarray:
    if cv == 0:
        return np.ones(N)
    variance = np.log1p(cv**2)
    return rng.lognormal(-0.5 * variance, np.sqrt(variance), N)


def _waits(rng: np.random.Generator, load: float, burst: float, service: np.ndarray) -> np.ndarray:
    gaps = rng.gamma(1.0 / burst**2, burst**2 / load, N)
    return np.asarray(RECURSION(gaps, service))[WARM:]


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_deterministic_service(rng: np.random.Generator, load: float) -> None:
    waits = _waits(rng, load, 1.0, np.ones(N))
    assert float(q.md1(load, 1.0).mean) == pytest.approx(waits.mean(), rel=0.05)
    for share in (0.9, 0.99):
        true = float(np.quantile(waits, share))
        assert float(EXACT(load, 1.0, share)) == pytest.approx(true, rel=0.05)
        assert float(PERCENTILE(q.md1(load, 1.0), share)) == pytest.approx(true, rel=0.10)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("cv", [0.5, 1.0])
def test_varying_service(rng: np.random.Generator, load: float, cv: float) -> None:
    service = _lengths(rng, cv)
    waits = _waits(rng, load / service.mean(), 1.0, service)
    wait = q.mg1(load / service.mean(), q.Moments.of(service))
    assert float(wait.mean) == pytest.approx(waits.mean(), rel=0.05)
    assert float(wait.delayed) == pytest.approx((waits > 0).mean(), rel=0.05)
    for share in (0.9, 0.99):
        assert float(PERCENTILE(wait, share)) == pytest.approx(float(np.quantile(waits, share)), rel=0.10)


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("burst", [0.7, 1.5, 2.0, 3.0])
def test_bursty_arrivals(rng: np.random.Generator, load: float, cv: float, burst: float) -> None:
    service = _lengths(rng, cv)
    waits = _waits(rng, load / service.mean(), burst, service)
    wait = GENERAL(load / service.mean(), burst**2, q.Moments.of(service))
    assert float(wait.mean) == pytest.approx(waits.mean(), rel=0.15)
    for share in (0.9, 0.99):
        assert float(PERCENTILE(wait, share)) == pytest.approx(float(np.quantile(waits, share)), rel=0.20)


def test_poisson_arrivals_are_one_case_of_general_ones() -> None:
    service = q.Moments.of(jnp.array([0.02, 0.1, 0.3]), jnp.array([0.5, 0.3, 0.2]))
    for rate in (1.0, 5.0, 9.0):
        for burst in (1.0 - 1e-9, 1.0, 1.0 + 1e-9):
            general, poisson = q.gg1(rate, burst, service), q.mg1(rate, service)
            for name in ("mean", "delayed", "scv"):
                assert float(getattr(general, name)) == pytest.approx(float(getattr(poisson, name)), rel=1e-6)


def test_exponential_service_is_exact_for_gamma_gaps() -> None:
    """GI/M/1: E[W] = E[S] s/(1-s) with the root s, and M/M/1 percentiles in closed form."""
    exponential = q.Moments(mean=1.0, square=2.0, cube=6.0)
    for load in (0.4, 0.8):
        wait = GENERAL(load, 6.25, exponential)
        root = float(wait.delayed)
        assert root == pytest.approx((1 + 6.25 * (1 - root) / load) ** (-1 / 6.25), rel=1e-9)
        assert float(wait.mean) == pytest.approx(root / (1 - root), rel=1e-9)
        one = q.mg1(load, exponential)
        assert float(PERCENTILE(one, 0.99)) == pytest.approx(-math.log(0.01 / load) / (1 - load), rel=2e-2)


@pytest.mark.parametrize("cv", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_arrivals_of_an_interval(rng: np.random.Generator, cv: float) -> None:
    """Dispersion and the chance of any arrival, in intervals of one length, against drawn gamma gaps."""
    n = 400_000
    times = np.cumsum(rng.gamma(1.0 / cv**2, cv**2, n))
    for length in (0.3, 1.0, 4.0):
        counts = np.bincount((times / length).astype(int))[1:-1]
        dispersed = float(q.dispersion(cv**2, length))
        assert dispersed == pytest.approx(counts.var() / counts.mean(), rel=0.25)
        assert float(q.any_come(dispersed, length)) == pytest.approx((counts > 0).mean(), rel=0.3)
    if cv == 1.0:
        assert dispersed == pytest.approx(1.0, abs=1e-5)
        assert float(q.any_come(1.0, 0.7)) == pytest.approx(1.0 - math.exp(-0.7), rel=1e-5)
    before, after = (float(jax.grad(lambda x: q.any_come(x, 0.7))(x)) for x in (1.0 - 2e-4, 1.0 + 2e-4))
    assert before == pytest.approx(after, rel=0.02)


def test_recursion_by_a_plain_loop_and_many_plans_at_once(rng: np.random.Generator) -> None:
    gaps, services = rng.exponential(1.0, 200), rng.exponential(0.8, (200, 3))
    waits = np.asarray(q.lindley(gaps, services))
    for plan in range(3):
        w, previous = 0.0, 0.0
        for i in range(200):
            w = max(w + previous - gaps[i], 0.0)
            previous = services[i, plan]
            assert waits[i, plan] == pytest.approx(w, abs=1e-12)


def test_gradients_are_finite_and_right() -> None:
    service = q.Moments.of(jnp.array([0.02, 0.1, 0.3]))

    def p99(rate: float, burst: float) -> jax.Array:
        return q.percentile(q.gg1(rate, burst, service), 0.99)

    slope_of = jax.jit(jax.grad(p99))
    for burst in (0.5, 1.0, 4.0):
        for rate in (1e-3, 3.0, 6.0, 20.0):
            assert np.isfinite(float(slope_of(rate, burst)))
    step = 1e-4
    slope = (float(p99(3.0 + step, 4.0)) - float(p99(3.0 - step, 4.0))) / (2 * step)
    assert float(slope_of(3.0, 4.0)) == pytest.approx(slope, rel=1e-3)


def test_crossing_by_false_positions_finds_what_halving_does() -> None:
    for root in (0.013, 0.4, 0.999):
        fall = lambda x, root=root: jnp.exp(-3 * x) - math.exp(-3 * root)  # noqa: E731
        assert float(q.crossing(fall, 0.0, 1.0, 50)) == pytest.approx(root, abs=1e-12)
        assert float(q.crossing(fall, 0.0, 1.0, 10, 4)) == pytest.approx(root, abs=1e-6)
    assert float(q.crossing(lambda x: 1.0 + 0.0 * x, 0.0, 2.0, 30)) == pytest.approx(2.0, rel=1e-6)
    assert float(q.crossing(lambda x: -1.0 - x, 0.5, 2.0, 30)) == 0.5
