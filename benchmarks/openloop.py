"""How far the closed forms of open load are from the step simulator: `python benchmarks/openloop.py [--runs N]`.

Every case is a plan, a distribution of lengths and a coefficient of variation of the gaps, at 20, 50 and 80% of its
capacity; requests are drawn, served one engine step at a time (`dse.cost.simulate`) and compared. Printed by regime,
apart for the cases that the forms were developed on and for those that they were not: errors in percent, the mean of
their sizes and the worst. Held out: models, plans and lengths drawn by a seed; those of `SEED` have been looked at
while forms were chosen, those of a new `--seed` have not.

Finite runs converge slowly near capacity. So the waits of a single queue, fed by the same gaps and prompts, put each
request into a stratum that weighs what it does in a far longer run of that queue (`described`), for means as well as
percentiles. `noise`, `noise_p99`: standard errors of the mean and of the P99 so found, in percent, over the runs.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import coefficient_set
from dse.cli.console import compile_cache
from dse.cost import lengths as dist
from dse.cost.evaluate import Scenario
from dse.cost.goodput import Arrivals, OpenLoop, Slo, open_loop
from dse.cost.iterations import replica, resident
from dse.cost.lengths import Lengths
from dse.cost.memory import memory
from dse.cost.pace import top
from dse.cost.shard import shard
from dse.cost.simulate import Requests, simulate
from dse.cost.types import stack
from dse.errors import InputError
from dse.programs import LARGE
from dse.space.cases import Case, parse_cases, scenarios_of

Array = np.ndarray
UTILISATIONS = (0.2, 0.5, 0.8)
SEATS = 256  # requests that the simulated engine runs at once on a rank
SLO = Slo(ttft=0.5, tpot=0.04)
CONTROLS = 1_000_000  # requests that fix the strata
STRATA = (*np.arange(0.05, 0.9, 0.05), 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995)

PLANS: dict[str, dict[str, Any]] = {
    # developed on
    "8B": {"model": "Llama-3.1-8B", "gpu": "h100", "chunk": 2048},
    "8B c512": {"model": "Llama-3.1-8B", "gpu": "h100", "chunk": 512},
    "70B tp4": {"model": "Llama-3.1-70B", "gpu": "h100", "tp": 4, "weights": "fp8", "chunk": 8192},
    "Mixtral tp2": {"model": "Mixtral-8x7B", "gpu": "h100", "tp": 2, "chunk": 4096},
    "70B tp4 pp2": {"model": "Llama-3.1-70B", "gpu": "h100", "tp": 4, "pp": 2, "chunk": 2048},
    "70B tp2 pp4": {"model": "Llama-3.1-70B", "gpu": "h100", "tp": 2, "pp": 4, "chunk": 4096},
    "V3 dp8": {"model": "DeepSeek-V3", "gpu": "h200", "attention_dp": 8, "moe_ep": 8, "chunk": 4096},
    "235B dp4": {
        "model": "Qwen3-235B-A22B",
        "gpu": "h200",
        "weights": "fp8",
        "attention_dp": 4,
        "moe_ep": 4,
        "chunk": 2048,
    },
    "30B dp2": {"model": "Qwen3-30B-A3B", "gpu": "h100", "attention_dp": 2, "moe_ep": 2, "chunk": 4096},
    "32B b200": {"model": "Qwen3-32B", "gpu": "b200", "chunk": 4096},
    "8B a100": {"model": "Llama-3.1-8B", "gpu": "a100", "chunk": 1024},
    "oss h200": {"model": "gpt-oss-120b", "gpu": "h200", "tp": 2, "chunk": 8192},
    "32B pp2": {"model": "Qwen3-32B", "gpu": "a100", "tp": 2, "pp": 2, "chunk": 4096},
    "235B pp4": {"model": "Qwen3-235B-A22B", "gpu": "h200", "tp": 2, "pp": 4, "moe_tp": 2, "chunk": 2048},
    "235B dp8": {
        "model": "Qwen3-235B-A22B",
        "gpu": "h100",
        "weights": "fp8",
        "attention_dp": 8,
        "moe_ep": 8,
        "chunk": 4096,
    },
    "V3 dp4": {"model": "DeepSeek-V3", "gpu": "b200", "tp": 2, "attention_dp": 4, "moe_ep": 8, "chunk": 8192},
    "30B dp2 b200": {"model": "Qwen3-30B-A3B", "gpu": "b200", "attention_dp": 2, "moe_ep": 2, "chunk": 2048},
}
# held out: each regime's plans get a chunk and lengths by draw
UNSEEN: dict[str, tuple[dict[str, Any], ...]] = {
    "one rank": (
        {"model": "Qwen3-14B", "gpu": "h100"},
        {"model": "Mistral-7B-v0.3", "gpu": "l40s"},
        {"model": "Qwen2.5-72B", "gpu": "a100", "tp": 4},
        {"model": "gpt-oss-20b", "gpu": "h100"},
        {"model": "gemma-3-27b", "gpu": "h200"},
        {"model": "Mixtral-8x22B", "gpu": "h200", "tp": 4},
    ),
    "pipeline": (
        {"model": "Qwen2.5-72B", "gpu": "h100", "tp": 2, "pp": 2},
        {"model": "Llama-3.1-405B", "gpu": "h100", "tp": 8, "pp": 2, "weights": "fp8"},
        {"model": "GLM-4.5-Air", "gpu": "h100", "tp": 2, "pp": 2},
        {"model": "Llama-2-70B", "gpu": "a100", "tp": 1, "pp": 4},
    ),
    "attention DP": (
        {"model": "GLM-4.5", "gpu": "h200", "attention_dp": 8, "moe_ep": 8, "weights": "fp8"},
        {"model": "MiniMax-M2.5", "gpu": "h200", "attention_dp": 4, "moe_ep": 4},
        {"model": "Qwen3-Next-80B-A3B", "gpu": "h100", "attention_dp": 4, "moe_ep": 4},
        {"model": "GLM-4.5-Air", "gpu": "b200", "attention_dp": 2, "moe_ep": 2},
    ),
}
UNSEEN["bursts"] = UNSEEN["one rank"]
SEED, DRAWS = 20261121, 12
# isl, osl, their coefficients of variation
LENGTHS = {
    "even": (1000.0, 200.0, 0.0, 0.0),
    "mixed": (1000.0, 200.0, 0.8, 0.8),
    "long": (4000.0, 300.0, 0.5, 0.5),
    "chat": (200.0, 300.0, 1.0, 0.8),
    "code": (2500.0, 150.0, 1.2, 0.6),
    "talk": (600.0, 400.0, 0.4, 1.0),
}


@dataclass(frozen=True)
class Pair:
    """A plan and what it is asked, at three rates."""

    regime: str
    held_out: bool
    plan: str
    lengths: str
    cv: float = 1.0


def unseen(seed: int) -> list[Pair]:
    """Held-out cases; registers their plans and lengths."""
    rng = np.random.default_rng(seed)
    found = []
    for regime, cvs in (
        ("one rank", (1.0,)),
        ("bursts", (1.5, 2.0, 3.0)),
        ("pipeline", (1.0,)),
        ("attention DP", (1.0,)),
    ):
        for i in range(DRAWS):
            plan, lengths = f"{regime} {i}", f"{regime} {i}"
            PLANS[plan] = {**UNSEEN[regime][i % len(UNSEEN[regime])], "chunk": int(2 ** rng.integers(9, 14))}
            means = np.exp(rng.uniform(np.log([150.0, 80.0]), np.log([5000.0, 600.0])))
            LENGTHS[lengths] = (*np.round(means), *np.round(rng.uniform(0.0, [1.3, 1.0]), 1))
            found += [Pair(regime, True, plan, lengths, cv) for cv in cvs]
    return found


def pairs(seed: int = SEED) -> list[Pair]:
    def product(regime: str, held_out: bool, plans: str, lengths: str, cvs: tuple[float, ...] = (1.0,)) -> list[Pair]:
        names = [(p.strip(), x) for p in plans.split(",") for x in lengths.split()]
        return [Pair(regime, held_out, p, x, cv) for cv in cvs for p, x in names]

    return [
        *product("one rank", False, "8B, 8B c512, 70B tp4, Mixtral tp2", "even mixed long chat"),
        *product("one rank", False, "32B b200, 8B a100, oss h200", "code talk"),
        *product("bursts", False, "8B, 8B c512, 70B tp4, Mixtral tp2", "even mixed long", (1.5, 2.0, 3.0)),
        *product("bursts", False, "32B b200, 8B a100, oss h200", "code talk", (1.5, 2.0, 3.0)),
        *product("pipeline", False, "70B tp4 pp2, 70B tp2 pp4", "even mixed long chat"),
        *product("pipeline", False, "32B pp2, 235B pp4", "code talk"),
        *product("attention DP", False, "V3 dp8, 235B dp4, 30B dp2", "even mixed long"),
        *product("attention DP", False, "235B dp8, V3 dp4, 30B dp2 b200", "code talk"),
        *unseen(seed),
    ]


def scenarios(chosen: list[Pair]) -> Scenario:
    rows = []
    for pair in chosen:
        plan = PLANS[pair.plan]
        isl, osl, *_ = LENGTHS[pair.lengths]
        rows.append({**plan, "isl": isl, "osl": osl, "concurrency": SEATS * plan.get("attention_dp", 1)})
    found = parse_cases(pd.DataFrame(rows).astype(str).replace("nan", ""))
    for pair, row in zip(chosen, found, strict=True):
        if not isinstance(row, Case):
            raise InputError(f"{pair.plan}: {row}")
    return scenarios_of([row for row in found if isinstance(row, Case)], coefficient_set())


def closed_form(x: Scenario, lengths: Lengths, share: Any, cv: Any) -> OpenLoop:
    """At a share of the capacity."""
    s = shard(x.architecture, x.device, x.topology, x.plan, x.coefficients)
    load = resident(x.load, lengths)
    held = memory(x.architecture, x.device, x.plan, load, x.coefficients)
    r = replica(s, load, lengths, held, cv)
    most = top(r)
    capacity = most.rate * r.ranks
    return open_loop(s, load, lengths, held, Arrivals(rate=share * capacity, cv=cv), SLO)


def predicted(chosen: list[Pair], x: Scenario) -> OpenLoop:
    """[pairs, utilisations]"""
    nodes = stack([dist.padded(dist.lognormal(*LENGTHS[p.lengths]), dist.NODES) for p in chosen])
    each = jax.vmap(jax.vmap(closed_form, (None, None, 0, None)), (0, 0, None, 0))
    found = jax.jit(each, compiler_options=LARGE)(x, nodes, np.array(UTILISATIONS), np.array([p.cv for p in chosen]))
    return jax.tree.map(np.asarray, found)


def drawn(chosen: list[Pair], rates: Array, requests: int, seed: int = 1) -> Requests:
    """Gamma gaps, lognormal lengths: [pairs * utilisations, requests]."""
    rng = np.random.default_rng(seed)

    def lognormal(mean: float, cv: float) -> Array:
        variance = np.log1p(cv**2)
        drawn = rng.lognormal(np.log(mean) - 0.5 * variance, np.sqrt(variance), requests)
        return np.maximum(np.round(drawn), 1.0)

    arrival, isl, osl = [], [], []
    for pair, row in zip(chosen, rates, strict=True):
        for rate in row:
            mean_in, mean_out, cv_in, cv_out = LENGTHS[pair.lengths]
            arrival.append(np.cumsum(rng.gamma(1.0 / pair.cv**2, pair.cv**2 / rate, requests)))
            isl.append(lognormal(mean_in, cv_in))
            osl.append(lognormal(mean_out, cv_out))
    count = np.full(len(arrival), requests)
    lengths = np.array(isl)
    return Requests(
        arrival=np.array(arrival), isl=lengths, osl=np.array(osl), prefix=np.zeros_like(lengths), count=count
    )


def waits(gaps: Array, services: Array) -> Array:
    """Of a single queue, in order of arrival (Lindley)."""
    backlog = np.concatenate([[0.0], np.cumsum(services[:-1] - gaps[1:])])
    return backlog - np.minimum.accumulate(backlog)


@lru_cache(maxsize=1)
def control(prompt_cv: float, gap_cv: float) -> tuple[Array, Array]:
    """Gaps and prompts of mean 1, of a far longer run."""
    rng = np.random.default_rng(0)
    variance = np.log1p(prompt_cv**2)
    gaps = rng.gamma(1.0 / gap_cv**2, gap_cv**2, CONTROLS)
    return gaps, rng.lognormal(-0.5 * variance, np.sqrt(variance), CONTROLS)


@cache
def strata(prompt_cv: float, gap_cv: float, load: float) -> tuple[Array, Array]:
    """Waits of a single queue that cut its far longer run into strata, and the share of each."""
    gaps, prompts = control(prompt_cv, gap_cv)
    found = waits(gaps, load * prompts)[CONTROLS // 20 :]
    cuts = np.unique(np.quantile(found, STRATA))
    cuts = cuts[cuts > 0]
    return cuts, np.bincount(np.searchsorted(cuts, found), minlength=len(cuts) + 1) / len(found)


def quantile(values: Array, weights: Array, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][min(np.searchsorted(reached, share), len(values) - 1)])


def described(pair: Pair, load: float, gaps: Array, isl: Array, ttft: Array, tpot: Array) -> dict[str, float]:
    """Of [runs, requests]: each request weighs what its stratum does, by the wait that it would have in a single queue
    fed by the same gaps and prompts (gaps of mean 1, a prompt takes as long as it has tokens)."""
    mean_in, _, cv_in, _ = LENGTHS[pair.lengths]
    cuts, shares = strata(cv_in, pair.cv, load)
    requests = gaps.shape[1]
    kept = slice(requests // 8, requests - requests // 20)  # warm-up and the end left out
    places = np.array(
        [np.searchsorted(cuts, waits(g, load * i / mean_in)[kept]) for g, i in zip(gaps, isl, strict=True)]
    )

    def of(rows: slice) -> dict[str, float]:
        place, first, later = places[rows].ravel(), ttft[rows, kept].ravel(), tpot[rows, kept].ravel()
        weight = (shares / np.maximum(np.bincount(place, minlength=len(shares)), 1))[place]
        some = ~np.isnan(later)
        return {
            "ttft": float(np.average(first, weights=weight)),
            **{f"ttft_p{p}": quantile(first, weight, p / 100) for p in (50, 90, 99)},
            "tpot": float(np.average(later[some], weights=weight[some])),
            "tpot_p90": quantile(later[some], weight[some], 0.9),
        }

    whole, parts = of(slice(None)), [of(slice(i, i + 1)) for i in range(len(gaps))]
    noise = {
        f"noise{suffix}": 100.0 * np.std([p[name] for p in parts], ddof=1) / np.sqrt(len(parts)) / whole[name]
        for name, suffix in (("ttft", ""), ("ttft_p99", "_p99"))
    }
    return {**whole, **noise}


def simulated(chosen: list[Pair], x: Scenario, rates: Array, requests: int, runs: int) -> pd.DataFrame:
    """Mean and percentiles of TTFT and TPOT of each pair and utilisation."""
    many = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), len(UTILISATIONS), axis=0), x)
    overhead = np.repeat(np.asarray(x.coefficients.arrival_overhead), len(UTILISATIONS))[:, None]
    found = []
    for seed in range(1, runs + 1):
        asked = drawn(chosen, rates, requests, seed)
        done = simulate(many, asked, seats=SEATS, workers=4).outcome
        answer = asked.osl - 1.0
        tpot = np.where(answer > 0, (done.finished - done.first_token) / np.maximum(answer, 1.0), np.nan)
        gaps = np.diff(asked.arrival, axis=1, prepend=0.0) * rates.reshape(-1, 1)
        found.append((gaps, asked.isl, done.first_token - done.arrival + overhead, tpot))
    series = [np.stack(runs) for runs in zip(*found, strict=True)]  # [runs, cases, requests] each
    cases = [(p, u) for p in chosen for u in UTILISATIONS]
    return pd.DataFrame([described(*case, *(x[:, i] for x in series)) for i, case in enumerate(cases)])


MEASURES = ("ttft", "ttft_p50", "ttft_p90", "ttft_p99", "tpot", "tpot_p90")


def compared(chosen: list[Pair], found: OpenLoop, truth: pd.DataFrame) -> pd.DataFrame:
    """A row a pair and utilisation: errors in percent of the simulated value."""
    rows = pd.DataFrame([{**vars(p), "load": u} for p in chosen for u in UTILISATIONS])
    for name in MEASURES:
        rows[name] = 100.0 * (getattr(found, name).ravel() / truth[name].to_numpy() - 1.0)
    return rows.assign(noise=truth["noise"].to_numpy(), noise_p99=truth["noise_p99"].to_numpy())


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean size of the errors and the worst, by regime."""
    keys = [rows["held_out"].map({False: "developed", True: "held out"}), rows["regime"], rows["load"]]
    if (rows["cv"] > 1).any():
        keys.insert(2, rows["cv"])
    sizes = rows[list(MEASURES)].abs().groupby(keys)
    table = sizes.mean().round(1).astype(str) + " (" + sizes.max().round(0).astype(int).astype(str) + ")"
    return table.assign(cases=sizes.size(), **rows.groupby(keys)[["noise", "noise_p99"]].mean().round(1))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=8000, help="of each run of a case")
    parser.add_argument("--runs", type=int, default=4, help="of each case, two at least")
    parser.add_argument("--seed", type=int, default=SEED, help="of the held-out cases")
    parser.add_argument("--regime", help="one of them alone")
    parser.add_argument("--all", action="store_true", help="every case as well")
    asked = parser.parse_args()
    compile_cache()
    chosen = [p for p in pairs(asked.seed) if asked.regime in (None, p.regime)]
    started = time.perf_counter()
    with jax.enable_x64(True):
        x = scenarios(chosen)
        found = predicted(chosen, x)
        middle = time.perf_counter()
        rows = compared(chosen, found, simulated(chosen, x, found.rate, asked.requests, asked.runs))
    ended = time.perf_counter()
    print(
        f"{len(rows)} cases: closed forms {middle - started:.0f} s with compilation, simulator {ended - middle:.0f} s"
    )
    with pd.option_context("display.width", 250, "display.max_rows", None, "display.max_columns", None):
        if asked.all:
            print(rows.round(1).to_string(index=False))
        print(summary(rows).to_string())


if __name__ == "__main__":
    main()
