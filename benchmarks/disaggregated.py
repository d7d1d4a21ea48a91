"""How fast the joint search of pools is: python benchmarks/disaggregated.py [SPACE.yaml] [--rounds 3]

The whole answer is timed, from the space to the front of both ways of serving: compile time apart (the first round),
then warm rounds. The answer is checked while it is timed: rounds agree, and rows of the front are estimated again.

With a table of measured deployments, how right the estimates are: python benchmarks/disaggregated.py MEASURED.csv. By
Little's law a row's users, TTFT and TPOT say how many prompts a second its prefill pool computed. Beside the errors
stands the most that each kind of prefill worker was seen to compute, over what the model says it can: above 1 the model
is too slow; far below 1 no row filled that pool, or the model is too fast (rows that end at the same rate tell).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from dse.catalog.coefficients import coefficient_set
from dse.search.result import SearchResult
from dse.search.run import search
from dse.space import load_space
from dse.space.cases import estimate_cases
from dse.space.schema import SpaceSpec

SPACE = Path(__file__).parent.parent / "search_spaces" / "deepseek_v3_disagg_h200.yaml"
AT_MOST = 5.0  # seconds, warm
PEER = 4_000  # pairs that the peer's search combines in 24 to 29 s
TIMES_MORE = 100
TPOT_AT_MOST = 0.20  # mean error of the rows that surely did not speculate
IN_DECODE = 0.93  # of the users: below, something before decode held them
METRICS = ["ttft_ms", "tpot_ms", "output_tok_s_gpu"]


def check(first: SearchResult, again: SearchResult) -> float:
    """The largest relative difference between two rounds, and between the front and `dse estimate` of its rows."""
    between = np.abs(again.front[METRICS].to_numpy(float) / first.front[METRICS].to_numpy(float) - 1).max()
    split = first.front[first.front["serving"] == "disaggregated"].reset_index(drop=True)
    if not len(split):
        raise SystemExit("no disaggregated plan on the front: nothing to check")
    estimated = estimate_cases(split.astype(object), coefficient_set())[METRICS].to_numpy(float)
    return float(max(between, np.abs(estimated / split[METRICS].to_numpy(float) - 1).max()))


def accuracy(path: Path) -> None:
    """Errors of the estimates of measured split deployments, and what their prefill pools did."""
    table = pd.read_csv(path, dtype=str)
    found = estimate_cases(table.astype(object), coefficient_set())
    known = pd.DataFrame({name: table[f"measured_{name}_ms"].astype(float) for name in ("ttft", "tpot")})
    error = pd.DataFrame({name: (found[f"{name}_ms"].astype(float) / known[name] - 1).abs() for name in known})
    decoding = known["tpot"] * (table["osl"].astype(float) - 1)
    rate = table["concurrency"].astype(float) / (known["ttft"] + decoding) * 1e3
    full = decoding / (known["ttft"] + decoding) >= IN_DECODE
    for speculation, rows in table.groupby("speculation").groups.items():
        for name, some in (
            ("all", rows),
            (f"{IN_DECODE:.0%} in decode", rows[full[rows]]),
            ("less", rows[~full[rows]]),
        ):
            text = ", ".join(
                f"{metric.upper()} {error[metric][some].mean():.1%} (median {error[metric][some].median():.1%})"
                for metric in ("tpot", "ttft")
            )
            print(f"speculation {speculation}, {name}: {len(some)} rows, {text}")
    bears = found["requests_s"].astype(float) / found["prefill_busy"].astype(float)
    degrees = [name for name in table if name.startswith("prefill_") and name.endswith("_size")]
    kinds = table[["model", "gpu", "engine", "weights", "isl", *degrees]].agg(" ".join, axis=1)
    seen = pd.DataFrame({"rows": 1, "most": rate / bears, "ttft": error["ttft"]}).groupby(kinds)
    most = seen.agg({"rows": "sum", "most": "max", "ttft": "mean"}).sort_values("most")
    print(f"\nprefill workers ({', '.join(name[8:-5] for name in degrees)}): most seen over what the model bears")
    for kind, row in most[most["rows"] > 1].iterrows():
        print(f"{row['most']:6.2f}  {row['rows']:2.0f} rows, TTFT {row['ttft']:4.0%}  {kind}")
    plain = error["tpot"][table["speculation"] == "no"].mean()
    if plain > TPOT_AT_MOST:
        sys.exit(f"TPOT of rows without speculation: {plain:.1%}, at most {TPOT_AT_MOST:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default=SPACE, type=Path, help="a space, or a table of measured deployments")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.what.suffix == ".csv":
        accuracy(arguments.what)
    else:
        speed(load_space(arguments.what), arguments.rounds)


def speed(spec: SpaceSpec, rounds: int) -> None:
    """Times of the joint search, its answer checked."""
    results, times = [], []
    for _ in range(1 + rounds):
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
