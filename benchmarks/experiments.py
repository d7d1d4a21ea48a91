"""How many runs asking for the most informative one saves: `python benchmarks/experiments.py [--machines 7]`.

Machines drawn from the prior, noise as in dse/calibrate/study.py; the runs that each way needed for the held-out error
of a fixed sweep, as a share of the sweep's. `random` picks from the same pool as `asked`.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dse.calibrate.study import race, setting
from dse.cli.console import compile_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machines", type=int, default=7)
    parser.add_argument("--sweep", choices=("profiles", "factorial"), default="profiles")
    arguments = parser.parse_args()
    machines = arguments.machines
    compile_cache()
    where = setting(arguments.sweep)
    found = []
    for seed in range(machines):
        began = time.perf_counter()
        r = race(where, seed)
        found.append(r)
        print(
            f"machine {seed}: error before {r.before:.1%}, sweep of {r.sweep_runs} runs {r.swept:.2%}; "
            + ", ".join(f"{way} {n} runs" for way, n in r.needed.items())
            + f" ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    for way in found[0].needed:
        print(f"{way}: median share of the sweep's runs {np.median([r.needed[way] / r.sweep_runs for r in found]):.2f}")


if __name__ == "__main__":
    main()
