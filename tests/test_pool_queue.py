"""The queue before split pools: its closed form against iteration, against an event simulation, and known limits."""

from __future__ import annotations

import heapq
from dataclasses import replace

import jax
import numpy as np
import pytest

from dse.cost.pool_queue import Journey, best_ratio, boundary, computed, in_flight, met, waiting


def test_the_wait_of_one_server_is_that_of_m_d_1() -> None:
    """queueing.md: D = .1 s at 2, 5, 8 requests/s."""
    with jax.enable_x64(True):
        got = [float(waiting(rate, 0.1, 1.0)) for rate in (2.0, 5.0, 8.0)]
    assert got == pytest.approx([0.0125, 0.05, 0.2], rel=1e-9)


def way(c: int, workers: int = 1, q: float = 1.0, f: float = 0.0, chunks: float = 1.0) -> Journey:
    """A prefill pool of `workers` with c ranks in all, q prompts a full step."""
    idle, busy, more = 0.3, 0.3 if c == workers else 0.5, 0.0 if q == 1.0 else 0.4
    full = busy + (q - 1.0) * more
    return Journey(
        idle=idle,
        busy=busy,
        more=more,
        full=full,
        service=full / q,
        stage=1.0,
        chunks=chunks,
        prompts=q,
        workers=float(workers),
        servers=float(c),
        fixed=0.05,
        travel=0.0,
        layers=1.0,
        layerwise=0.0,
        first_wave=f,
    )


@pytest.mark.parametrize("c", [1, 4, 16])
@pytest.mark.parametrize("q", [1.0, 2.0, 8.0])
@pytest.mark.parametrize("f", [0.0, 0.1, 1.0])
def test_the_closed_form_is_the_fixed_point(c: int, q: float, f: float) -> None:
    """N found in closed form against N = X TTFT(N) + decoding, iterated."""
    j, share = way(c, q=q, f=f), way(c, q=q).service / c
    for rho, decoding in ((0.05, 3.0), (0.5, 40.0), (0.9, 500.0), (0.999, 900.0)):
        rate = rho / share
        with jax.enable_x64(True):
            n, ttft = (float(v) for v in in_flight(j, rate, decoding))
            others = float(met(j, rate, decoding))
            own = float(computed(j, others))
            late, wait = float(boundary(j, others, own)), float(waiting(others, j.service, c)) * others * share
        x = max(1.0, decoding)
        for _ in range(20_000):
            one_step = min(j.idle + (j.busy - j.idle) * (x - 1.0) / max(c - 1.0, 1.0), j.busy)
            wave = max(j.idle, one_step, min(share * x, 0.5 * (j.full + share * x)))
            queue = min(wait, 0.5 * share * (x - 1.0))
            mean = 0.05 + f * wave + (1.0 - f) * (own + late + queue)
            x = rate * mean + decoding
        assert n == pytest.approx(x, rel=1e-6)
        assert ttft == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("c", "workers", "q", "clients", "tolerance"),
    [
        (1, 1, 1.0, 24, 0.15),
        (1, 1, 4.0, 40, 0.15),
        (4, 1, 1.0, 60, 0.15),
        (8, 1, 2.0, 100, 0.15),
        (8, 1, 8.0, 60, 0.20),
        (8, 1, 8.0, 140, 0.15),
        (8, 2, 2.0, 120, 0.20),
        (16, 2, 8.0, 260, 0.15),
        (3, 3, 1.0, 50, 0.20),
    ],
)
def test_ranks_that_step_together_wait_as_simulated(
    c: int, workers: int, q: float, clients: int, tolerance: float
) -> None:
    """A closed loop of clients, prompts dealt in turn, ranks that start a step together and end it together."""
    j = way(c, workers, q)
    ttft, rate, decoding = simulated_pool(j, clients)
    with jax.enable_x64(True):
        n, found = (float(v) for v in in_flight(j, min(rate, 0.9999 * c / j.service), decoding))
    assert found == pytest.approx(ttft, rel=tolerance)
    assert n == pytest.approx(clients, rel=0.05)


@pytest.mark.parametrize(
    ("c", "workers", "q", "clients", "added"),
    [
        (1, 1, 1.0, 24, 0.0),
        (1, 1, 4.0, 24, 0.0),
        (4, 1, 1.0, 20, 0.0),
        (4, 1, 1.0, 65, 0.3),
        (8, 1, 1.0, 80, 0.0),
        (8, 1, 1.0, 120, 0.7),
        (8, 1, 1.0, 140, 0.9),
        (8, 1, 8.0, 140, 0.0),
        (8, 2, 1.0, 120, 0.2),
    ],
)
def test_a_scheduler_that_fixes_a_step_ahead_costs_a_step_only_where_one_is_fixed(
    c: int, workers: int, q: float, clients: int, added: float
) -> None:
    """`turns` = 2: own steps that the simulation adds to TTFT (`added`), and the closed form within a fifth of one."""
    j = way(c, workers, q)
    at_once, rate, decoding = simulated_pool(j, clients)
    ahead, rate_ahead, decoding_ahead = simulated_pool(j, clients, ahead=True)
    with jax.enable_x64(True):
        own = float(computed(j, met(j, rate, decoding)))
        slower = float(in_flight(replace(j, turns=2.0), rate_ahead, decoding_ahead)[1])
        usual = float(in_flight(j, rate, decoding)[1])
    assert (ahead - at_once) / own == pytest.approx(added, abs=0.1)
    assert (slower - usual) / own == pytest.approx((ahead - at_once) / own, abs=0.2)


def test_what_an_undivided_engine_has_and_pools_have_not_changes_nothing() -> None:
    """turns = 1 and no idle seats: the same; neither matters to a request alone."""
    for c, q in ((1, 1.0), (8, 1.0), (8, 8.0)):
        j = way(c, q=q, f=0.1)
        with jax.enable_x64(True):
            for rate, decoding in ((0.7 * c / j.service, 60.0), (1e-6, 1.0)):
                plain = in_flight(j, rate, decoding)
                same = in_flight(replace(j, turns=1.0, idle_seats=0.0, decoders=4.0), rate, decoding)
                late = in_flight(replace(j, turns=2.0, idle_seats=0.3, decoders=4.0), rate, decoding)
                assert [float(v) for v in same] == [float(v) for v in plain]
                if decoding == 1.0:
                    assert float(late[1]) == pytest.approx(float(plain[1]), rel=1e-4)
                else:
                    assert float(late[0] - plain[0]) >= 4 * 0.3 * (1 - 1e-9)  # Little: those without a seat wait


@pytest.mark.parametrize(
    ("c", "q", "rate", "decoding"), [(1, 1.0, 2.0, 20.0), (8, 1.0, 20.0, 150.0), (8, 8.0, 30.0, 300.0)]
)
def test_users_have_gradients_by_what_the_fit_learns(c: int, q: float, rate: float, decoding: float) -> None:
    at = np.array([2.0, 0.1, 5.0])  # turns, idle seats, an answer among half as many

    def users(x: jax.Array) -> jax.Array:
        j = replace(way(c, q=q, f=0.1), turns=x[0], idle_seats=x[1], half=x[2], decoders=4.0)
        return in_flight(j, rate, decoding)[0]

    with jax.enable_x64(True):
        exact = np.asarray(jax.jacfwd(users)(at))
        step = 1e-6 * np.eye(3)
        finite = [(float(users(at + h)) - float(users(at - h))) / 2e-6 for h in step]
    assert exact == pytest.approx(finite, rel=1e-5, abs=1e-6)


def simulated_pool(j: Journey, clients: int, requests: int = 12_000, ahead: bool = False) -> tuple[float, float, float]:
    """(mean TTFT, requests/s, mean number in decode) past the start; decode takes 8 to 12 s whatever the load.

    `ahead`: a worker fixes its next step when one begins, of the prompts that are there by then, if any are.
    """
    workers, ranks = int(j.workers), int(j.servers / j.workers)
    most = round((j.full - j.busy) / j.more) + 1 if j.more else 1
    rng = np.random.default_rng(0)
    queues: list[list[list[int]]] = [[[] for _ in range(ranks)] for _ in range(workers)]
    events = [(float(t), i, "come", i) for i, t in enumerate(rng.uniform(0.0, 10.0, clients))]
    heapq.heapify(events)
    came, first, ends = np.zeros(requests), np.zeros(requests), np.zeros(requests)
    busy, batches, sent, dealt = [False] * workers, [[] for _ in range(workers)], clients, 0
    fixed: list[list[list[int]] | None] = [None] * workers

    def take(queue: list[list[int]]) -> list[list[int]] | None:
        taken = [q[:most] for q in queue]
        for q in queue:
            del q[:most]
        return taken if any(taken) else None

    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "come":
            came[what], worker = now, dealt % workers
            queues[worker][dealt // workers % ranks].append(what)
            dealt += 1
        elif kind == "step":
            worker, busy[what] = what, False
            for r in batches[worker]:
                first[r] = now + j.fixed
                ends[r] = first[r] + rng.uniform(8.0, 12.0)
                if sent < requests:
                    heapq.heappush(events, (ends[r], sent, "come", sent))
                    sent += 1
        taken = None if busy[worker] else fixed[worker] or take(queues[worker])
        if taken:
            fixed[worker] = take(queues[worker]) if ahead else None
            fullest, mean = max(map(len, taken)), sum(map(len, taken)) / ranks
            present = (mean * ranks - 1.0) / max(ranks - 1.0, 1.0)
            lasts = j.idle + (j.busy - j.idle) * min(present, 1.0)
            even = max(mean - 1.0, 0.0)
            lasts += j.more * (even + (fullest - 1.0 - even) * (j.idle / j.busy if ranks > 1 else 1.0))
            busy[worker], batches[worker] = True, [r for q in taken for r in q]
            heapq.heappush(events, (now + lasts, requests + worker, "step", worker))
    past = slice(requests // 3, requests - clients)
    span = came[past][-1] - came[past][0]
    rate = (past.stop - past.start - 1) / span
    return float((first - came)[past].mean()), rate, rate * float((ends - first)[past].mean())


def test_best_ratio_is_the_best_of_all_ratios() -> None:
    rng = np.random.default_rng(0)
    rp, rd = rng.uniform(0.5, 20.0, (2, 40))
    gp, gd = rng.choice([1, 2, 4, 8, 16], (2, 40))
    p, d, rate = (np.asarray(a) for a in best_ratio(rp, rd, gp, gd, 96.0, most=24))
    for i in range(40):
        options = [
            (min(a * rp[i], b * rd[i]) / (a * gp[i] + b * gd[i]))
            for a in range(1, 25)
            for b in range(1, 25)
            if a * gp[i] + b * gd[i] <= 96
        ]
        assert rate[i] == pytest.approx(max(options), rel=1e-5)
        assert min(p[i] * rp[i], d[i] * rd[i]) / (p[i] * gp[i] + d[i] * gd[i]) == pytest.approx(rate[i], rel=1e-5)
    assert float(best_ratio(1.0, 1.0, 8.0, 8.0, 15.0)[2]) == 0.0
