"""DistServe: step-time goldens, the queueing table, the placement search against a plain event simulation."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd
import pytest

from dse.errors import InputError
from dse.published import distserve as ds
from dse.published import placement as pl
from dse.published.tables import published

TARGET = pl.Target(ttft=0.2, tpot=0.1, share=0.9)


@pytest.fixture(autouse=True)
def _double() -> object:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(("tp", "pp", "ms"), [(1, 1, 73.14868), (1, 2, 38.07434), (2, 1, 51.49664)])
def test_prefill_goldens(tp: int, pp: int, ms: float) -> None:
    assert float(ds.prefill_stage(512.0, 512.0**2, tp, pp)) * 1e3 == pytest.approx(ms, rel=1e-5 / 50, abs=1e-5)


@pytest.mark.parametrize(("requests", "ms"), [(32, 31.45870), (128, 65.50198)])
def test_decode_goldens(requests: int, ms: float) -> None:
    assert float(ds.decode_stage(requests, requests * 513.0, 1, 1)) * 1e3 == pytest.approx(ms, abs=1e-5)


# D = .1 s; R = 2, 5, 8: the queueing reference's table, simulated to .1%
WAITS = {
    "single": (0.1125, 0.15, 0.3),
    "inter_op": (0.1027778, 0.1083333, 0.1166667),
    "intra_op": (0.0627451, 0.0710784, 0.0849673),
}


@pytest.mark.parametrize(("i", "rate"), [(0, 2.0), (1, 5.0), (2, 8.0)])
def test_queueing_table(i: int, rate: float) -> None:
    assert float(ds.single(0.1, rate).ttft) == pytest.approx(WAITS["single"][i], rel=1e-6)
    assert float(ds.inter_op(0.1, rate, 2.0).ttft) == pytest.approx(WAITS["inter_op"][i], rel=1e-6)
    assert float(ds.intra_op(0.1, rate, 1.7).ttft) == pytest.approx(WAITS["intra_op"][i], rel=1e-6)


def test_single_server_wait_by_simulation() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.exponential(1 / 5.0, 400_000)
    backlog = np.cumsum(np.concatenate([[0.0], 0.1 - gaps[1:]]))
    wait = backlog - np.minimum.accumulate(backlog)  # Lindley
    assert float(ds.single(0.1, 5.0).ttft) == pytest.approx(0.1 + wait.mean(), rel=0.01)


@pytest.mark.parametrize(("speedup", "load"), [(1.2, 0.4338), (1.5, 0.9361), (1.8, 1.4291)])
def test_crossover(speedup: float, load: float) -> None:
    x = float(ds.crossover(speedup))
    assert x == pytest.approx(load, abs=5e-5)
    assert float(ds.intra_op(1.0, x, speedup).ttft) == pytest.approx(float(ds.inter_op(1.0, x, 2.0).ttft), rel=1e-9)
    assert float(ds.intra_op(1.0, x - 0.01, speedup).ttft) < float(ds.inter_op(1.0, x - 0.01, 2.0).ttft)


@pytest.mark.parametrize("rate", [10.0, 10.1, 1e6])
def test_overload_is_unstable_never_negative(rate: float) -> None:
    for wait in (ds.single(0.1, rate), ds.inter_op(0.1, 2 * rate, 2.0), ds.intra_op(0.1, 1.7 * rate, 1.7)):
        assert not wait.stable
        assert float(wait.ttft) == np.inf
    assert np.isfinite(jax.grad(lambda r: ds.single(0.1, r).ttft)(rate))


def test_table_says_unstable_and_refuses_what_was_not_profiled() -> None:
    rows = pd.DataFrame(
        {
            "tp_prefill": [1, 2, 1, 3, 1, 1, 1],
            "pp_decode": [1, 1, 1, 1, 3, 1, 1],
            "isl": [512, 512, 100, 512, 512, np.nan, 512],
            "osl": [100, 100, 1000, 100, 100, 100, 100],
            "rate": [1, 50, 5, 1, 1, 1, 1],
            "batch": [32, "", "", "", "", "", ""],
            "context": [513, "", "", "", "", "", ""],
            "model": ["opt-13b", "", "", "", "", "", "Llama-3.1-8B"],
        }
    )
    result = published("distserve", rows)
    assert result["prefill_ms"][0] == pytest.approx(73.14868, abs=1e-5)
    assert result["decode_ms"][0] == pytest.approx(31.45870, abs=1e-5)
    assert result["reason"][0] == ""
    assert result["reason"][1].startswith("unstable: prefill")
    assert result["reason"][2].startswith("unstable: decode")
    assert result["ttft_ms"][1] == result["tpot_ms"][2] == np.inf
    numbers = result.select_dtypes("number")
    assert not (numbers < 0).any().any()
    assert "allowed: 1, 2, 4" in result["reason"][3]
    assert "pp_decode" in result["reason"][4]
    assert result["reason"][5] == "isl: is empty (required)"
    assert "OPT-13B only" in result["reason"][6]


def test_steady_batch_solves_littles_law() -> None:
    for rate in (0.5, 2.0, 5.0, 9.0):
        x = ds.Case(tp_prefill=1.0, pp_prefill=1.0, tp_decode=1.0, pp_decode=2.0, isl=300.0, osl=200.0, rate=rate)
        y = ds.serve_one(x)
        stage = float(ds.decode_stage(y.batch / 2, y.batch / 2 * 400, 1.0, 2.0))
        off_the_edge = abs(float(y.batch) / 2 - ds.SMALL_BATCH) > 1
        assert float(y.batch) == pytest.approx(rate * 200 * float(y.tpot))
        assert not off_the_edge or 2 * stage == pytest.approx(float(y.tpot), rel=1e-9)


# ------------------------------------------------------------------------------------------------ placement


def test_enumeration() -> None:
    found = pl.placements(4)
    rows = set(zip(found.tp_prefill, found.pp_prefill, found.tp_decode, found.pp_decode))
    assert (2, 1, 1, 1) in rows
    assert (1, 1, 1, 1) in rows
    assert len(rows) == len(found.gpus) == 9
    assert max(found.gpus) == 4
    two = pl.placements(16, gpus_per_node=8, nodes=2)
    assert max(two.pp_across) == 2
    assert all(40 % (a * p) == 0 for a, p in zip(two.pp_across, two.pp_prefill))
    assert all(n / a <= 8 for n, a in zip(two.gpus, two.pp_across))
    with pytest.raises(InputError, match="gpus: 1"):
        pl.placements(1)


# The authors' profile of max_num_tokens for OPT-13B on A100-80G: GPUs of an instance -> tokens
@pytest.mark.parametrize(
    ("gpus", "tokens"), [(1, 66144), (2, 163008), (4, 356752), (5, 453616), (8, 744224), (16, 1519184), (64, 6168896)]
)
def test_l_m_depends_on_tp_and_pp(gpus: int, tokens: int) -> None:
    assert float(pl.capacity_tokens(gpus)) == pytest.approx(tokens, rel=2e-4)


def _events(trace: pl.Trace, rate: float, tp: int, pp: int, limit: float) -> np.ndarray:
    """First come first served with batching, as plain events."""
    arrival = np.cumsum(trace.gap) / rate
    free, done, i = [0.0] * pp, np.zeros(len(arrival)), 0
    while i < len(arrival):
        start, j, tokens = max(arrival[i], free[0]), i, 0.0
        while j < len(arrival) and arrival[j] <= start and (j == i or tokens + trace.isl[j] <= limit):
            tokens += trace.isl[j]
            j += 1
        stage = float(ds.prefill_stage(tokens, (trace.isl[i:j] ** 2).sum(), tp, pp))
        end = start
        for k in range(pp):
            end = max(end, free[k]) + stage
            free[k] = end
        done[i:j] = end
        i = j
    return done - arrival


@pytest.mark.parametrize(("tp", "pp", "rate"), [(1, 1, 3.0), (2, 1, 12.0), (1, 2, 9.0), (2, 4, 60.0), (1, 1, 300.0)])
def test_prefill_queue_against_plain_events(tp: int, pp: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pl, "capacity_tokens", lambda gpus: 4000.0)  # small, so that batches fill
    trace = pl.sharegpt_like(500.0, 200.0, n=300)
    place = pl.Placement(
        pp_across=1.0, tp_prefill=float(tp), pp_prefill=float(pp), tp_decode=1.0, pp_decode=1.0, same_node=1.0
    )
    found = pl.prefill_ttft(place, rate, trace, stages=4)
    np.testing.assert_allclose(found, _events(trace, rate, tp, pp, 4000.0), rtol=1e-9)


def _optimum(mean_in: float, mean_out: float, cv: float = 1.0, seed: int = 0) -> tuple[tuple[int, ...], float]:
    found = pl.placements(4)
    good = pl.goodput(found, pl.sharegpt_like(mean_in, mean_out, cv, n=1000, seed=seed), TARGET)
    i = pl.best(found, good)
    degrees = (found.tp_prefill, found.pp_prefill, found.tp_decode, found.pp_decode)
    return tuple(int(d[i]) for d in degrees), float(good.per_gpu[i])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_optimum_with_the_authors_lengths(seed: int) -> None:
    """Published: prefill tp2 pp1, decode tp1 pp1, 1.56 requests/s/GPU, over 300 requests, bisected to .25.

    The placement is the best, by a third, over 10,000 requests; its rate is then .2 to .4 above the published one.
    """
    found = pl.placements(4)
    good = pl.goodput(found, pl.sharegpt(10_000, seed), TARGET, top=5.0)
    rates = np.asarray(good.per_gpu)
    i = pl.best(found, good)
    assert (found.tp_prefill[i], found.pp_prefill[i], found.tp_decode[i], found.pp_decode[i]) == (2, 1, 1, 1)
    assert 1.75 < rates[i] < 1.95
    assert rates[i] > 1.25 * np.sort(rates)[-2]


def test_published_rate_is_one_of_those_that_300_requests_give() -> None:
    """Runs as short as the published one scatter by .2: 1.56 is a standard deviation off, and half are within .25."""
    found, rates = pl.placements(4), []
    for seed in range(24):
        good = pl.goodput(found, pl.sharegpt(300, seed), TARGET, top=5.0)
        i = pl.best(found, good)
        assert (found.tp_prefill[i], found.pp_prefill[i], found.tp_decode[i], found.pp_decode[i]) == (2, 1, 1, 1)
        rates.append(float(good.per_gpu[i]))
    assert 0.12 < np.std(rates) < 0.35
    assert abs(np.mean(rates) - 1.5625) < 1.5 * np.std(rates)
    assert np.mean(np.abs(np.array(rates) - 1.5625) <= 0.25) > 0.3


def test_decode_does_not_bind_at_the_published_optimum() -> None:
    """So the published search, which prices decode at TP2 there, finds the same: one more GPU there gains nothing."""
    found, trace = pl.placements(4), pl.sharegpt(3000)
    good = pl.goodput(found, trace, TARGET, top=5.0)
    of = {d: float(r) for *d_, r in zip(*(getattr(found, k) for k in DEGREES), good.rate) for d in [tuple(d_)]}
    assert of[2, 1, 1, 1] == pytest.approx(of[2, 1, 2, 1], abs=0.05)
    longer = pl.Trace(isl=np.round(1.06 * trace.isl), osl=trace.osl, gap=trace.gap)
    slower = pl.goodput(found, longer, TARGET, top=5.0)
    assert float(slower.per_gpu[pl.best(found, slower)]) == pytest.approx(1.5625, abs=0.25)


DEGREES = ("tp_prefill", "pp_prefill", "tp_decode", "pp_decode")


@pytest.mark.parametrize(("mean_in", "seed"), [(750.0, 0), (750.0, 1), (750.0, 2), (900.0, 0), (900.0, 1)])
def test_published_optimum_with_long_prompts(mean_in: float, seed: int) -> None:
    """Published: prefill tp2 pp1, decode tp1 pp1, 1.56 requests/s/GPU to .25; the lengths here are a stand-in."""
    placement, rate = _optimum(mean_in, 200.0, seed=seed)
    assert placement == (2, 1, 1, 1)
    assert 1.0 < rate < 2.5


@pytest.mark.parametrize(("mean_in", "mean_out"), [(160.0, 180.0), (220.0, 330.0)])
def test_short_prompts_move_the_optimum_to_decode(mean_in: float, mean_out: float) -> None:
    placement, rate = _optimum(mean_in, mean_out)
    assert placement[:2] == (1, 1)
    assert rate > 2 * 1.5625


def test_goodput_is_where_the_target_is_met_and_beyond_it_is_not() -> None:
    found, trace = pl.placements(4), pl.sharegpt_like(750.0, 200.0)
    good = pl.goodput(found, trace, TARGET)
    for i in range(len(found.gpus)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], found)
        assert good.rate[i] == pytest.approx(good.per_gpu[i] * one.gpus)
        if good.per_gpu[i] > 0:
            assert pl.meets(one, float(good.rate[i]), trace, TARGET, 4, ds.OPT_13B)
        assert not pl.meets(one, float(good.rate[i]) + 0.02 * one.gpus, trace, TARGET, 4, ds.OPT_13B)


def test_ties_go_to_fewer_gpus() -> None:
    found = pl.placements(4)
    tied = pl.Goodput(rate=found.gpus, per_gpu=np.ones_like(found.gpus), l_m=found.gpus, tokens_decode=found.gpus)
    assert found.gpus[pl.best(found, tied)] == 2


def test_kv_transfer_is_charged() -> None:
    trace = pl.sharegpt_like(750.0, 200.0)
    near, far = (
        pl.Placement(pp_across=1.0, tp_prefill=2.0, pp_prefill=1.0, tp_decode=1.0, pp_decode=1.0, same_node=same)
        for same in (1.0, 0.0)
    )
    extra = float(pl.decode_tpot(far, 3.0, trace, 1.28) - pl.decode_tpot(near, 3.0, trace, 1.28))
    kv = trace.isl.mean() * pl.KV_BYTES
    assert extra == pytest.approx(kv * (1 / pl.NETWORK - 1 / pl.NVLINK) / (trace.osl.mean() - 1))


def test_batched_is_looped_and_gradients_are_finite() -> None:
    rng = np.random.default_rng(0)
    n = 50
    cases = ds.Case(
        tp_prefill=rng.choice([1.0, 2.0, 4.0], n),
        pp_prefill=rng.choice([1.0, 2.0, 4.0], n),
        tp_decode=rng.choice([1.0, 2.0, 4.0], n),
        pp_decode=rng.choice([1.0, 2.0, 4.0], n),
        isl=rng.uniform(10, 2000, n),
        osl=rng.uniform(1, 1000, n),
        rate=rng.uniform(0, 30, n),
    )
    together = ds.serve(cases)
    for i in range(n):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], cases)
        alone = ds.serve_one(one)
        for name in ("prefill", "ttft", "tpot", "batch", "decode"):
            assert float(getattr(alone, name)) == pytest.approx(float(getattr(together, name)[i]), rel=1e-12)
        slope = jax.grad(lambda x: ds.serve_one(x).prefill + jax.numpy.minimum(ds.serve_one(x).ttft, 1e3))(one)
        assert all(np.isfinite(leaf) for leaf in jax.tree.leaves(slope))
    assert not np.any(np.asarray(together.ttft) < 0)
    fits = jax.grad(lambda p: ds.serve_one(jax.tree.map(lambda leaf: leaf[0], cases), p).prefill)(ds.OPT_13B)
    assert any(leaf != 0 for leaf in jax.tree.leaves(fits))
