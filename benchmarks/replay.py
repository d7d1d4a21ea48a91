"""How fast a replay is: python benchmarks/replay.py [TRACE.csv] [--plans 256] [--requests 10000] [--workers 4]

Plans of two models on four GPUs over one trace (without a file: Poisson arrivals, lognormal lengths). Compiling is
timed apart, with the same shapes and one request; every request must be served and every token computed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd

from dse.catalog.coefficients import coefficient_set
from dse.cost.evaluate import Scenario
from dse.cost.simulate import Requests, simulate
from dse.cost.types import replace
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.space.replay import shape_trace
from dse.space.traces import Trace, read_trace

AXES = {
    "model": ("Llama-3.1-8B", "Llama-3.1-70B"),
    "gpu": ("h100", "h200", "b200", "b300"),
    "tp": (2, 4, 8),
    "pp": (1, 2),
    "weights": ("bf16", "fp8"),
    "chunk": (1024, 2048, 4096, 8192),
}


def plans(count: int) -> Scenario:
    """Plans that differ in every axis, the first `count` of the product in a fixed shuffle."""
    rows = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    order = np.random.default_rng(0).permutation(len(rows))
    if count > len(rows):
        raise SystemExit(f"--plans {count}: at most {len(rows)}")
    table = pd.DataFrame([rows[i] for i in order[:count]]).astype(str).assign(isl="1200", osl="250")
    found = parse_cases(table)
    wrong = [row for row in found if not isinstance(row, Case)]
    if wrong:
        raise SystemExit(str(wrong[0]))
    return scenarios_of([row for row in found if isinstance(row, Case)], coefficient_set())


def requests(path: Path | None, count: int, rate: float) -> Trace:
    rng = np.random.default_rng(0)
    if path is not None:
        return shape_trace(read_trace(path), rate, count)
    lengths = [np.ceil(rng.lognormal(np.log(mean) - 0.5, 1.0, count)) for mean in (1200, 250)]
    arrival = np.cumsum(rng.exponential(1 / rate, count))
    return Trace(arrival_s=arrival, input_tokens=lengths[0], output_tokens=lengths[1], prefix_tokens=np.zeros(count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", nargs="?", type=Path)
    parser.add_argument("--plans", type=int, default=256)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=6.0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    trace, scenarios = requests(asked.trace, asked.requests, asked.rate), plans(asked.plans)
    r = Requests(
        arrival=np.asarray(trace.arrival_s),
        isl=trace.input_tokens,
        osl=trace.output_tokens,
        prefix=trace.prefix_tokens,
        count=np.array(len(trace)),
    )
    started = time.perf_counter()
    simulate(scenarios, replace(r, count=np.array(1)), workers=asked.workers)
    compiling = time.perf_counter() - started
    started, processor = time.perf_counter(), time.process_time()
    sim = simulate(scenarios, r, workers=asked.workers)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    ran = sim.fits
    prompt, answer = np.maximum(r.isl - r.prefix, 1.0).sum(), (r.osl - 1.0).sum()
    if not np.isfinite(sim.outcome.finished[ran]).all():
        raise SystemExit("some requests were not served")
    for name, total in (("prompt_tokens", prompt), ("decode_tokens", answer)):
        if not np.allclose(getattr(sim.totals, name)[ran], total, rtol=1e-6):
            raise SystemExit(f"{name} are not conserved")
    steps = sim.totals.iterations[ran]
    print(f"{ran.sum()} of {len(ran)} plans ran (the others do not fit), {len(trace):,} requests each")
    print(
        f"compiling {compiling:.1f} s; replay {seconds:.1f} s ({processor:.1f} s of processor, {asked.workers} threads)"
    )
    print(f"{ran.sum() * len(trace) / seconds:,.0f} requests/s, {steps.sum() / seconds:,.0f} iterations/s")
    print(
        f"iterations a plan: {steps.min():,.0f} to {steps.max():,.0f}; in decode on average: "
        f"{np.median(sim.totals.decoding[ran]):.0f} (median plan), {sim.totals.decoding[ran].max():.0f} (most)"
    )


if __name__ == "__main__":
    main()
