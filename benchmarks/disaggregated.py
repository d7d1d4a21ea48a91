"""How fast the joint search of pools is: python benchmarks/disaggregated.py [SPACE.yaml] [--rounds 3]

The whole answer is timed, from the space to the front of both ways of serving: compile time apart (the first round),
then warm rounds. The answer is checked while it is timed: rounds agree, and rows of the front are estimated again.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from dse.catalog.coefficients import coefficient_set
from dse.search.result import SearchResult
from dse.search.run import search
from dse.space import load_space
from dse.space.cases import estimate_cases

SPACE = Path(__file__).parent.parent / "search_spaces" / "deepseek_v3_disagg_h200.yaml"
AT_MOST = 5.0  # seconds, warm
PEER = 4_000  # pairs that the peer's search combines in 24 to 29 s
TIMES_MORE = 100
METRICS = ["ttft_ms", "tpot_ms", "output_tok_s_gpu"]


def check(first: SearchResult, again: SearchResult) -> float:
    """The largest relative difference between two rounds, and between the front and `dse estimate` of its rows."""
    between = np.abs(again.front[METRICS].to_numpy(float) / first.front[METRICS].to_numpy(float) - 1).max()
    split = first.front[first.front["serving"] == "disaggregated"].reset_index(drop=True)
    if not len(split):
        raise SystemExit("no disaggregated plan on the front: nothing to check")
    estimated = estimate_cases(split.astype(object), coefficient_set())[METRICS].to_numpy(float)
    return float(max(between, np.abs(estimated / split[METRICS].to_numpy(float) - 1).max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("space", nargs="?", default=SPACE, type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    spec = load_space(arguments.space)
    results, times = [], []
    for _ in range(1 + arguments.rounds):
        started = time.perf_counter()
        results.append(search(spec))
        times.append(time.perf_counter() - started)
    found = results[-1].run["disaggregated"]
    error = check(results[-2], results[-1])
    warm = min(times[1:])
    print(f"{spec.name}: {found['pairs']:,} pairs of workers ({found['pairs'] / PEER:,.0f} times the peer's {PEER:,})")
    print(f"first round {times[0]:.1f} s; warm {', '.join(f'{t:.2f}' for t in times[1:])} s")
    print(f"pools alone {found['seconds']:.2f} s; undivided serving {results[-1].seconds - found['seconds']:.2f} s")
    print(f"disaggregated {found['gain']:+.1%} {found['metric']}; largest difference {error:.1e}")
    failed = [
        text
        for wrong, text in (
            (warm > AT_MOST, f"{warm:.1f} s warm, at most {AT_MOST:g}"),
            (found["pairs"] < TIMES_MORE * PEER, f"{found['pairs']:,} pairs, at least {TIMES_MORE * PEER:,}"),
            (error > 1e-6, f"answers differ by {error:.1e}"),
        )
        if wrong
    ]
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
