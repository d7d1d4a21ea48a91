"""How long a goodput search takes: `python benchmarks/goodput.py`. Every plan of search_spaces/goodput_70b.yaml (more
than 100,000) gets its goodput by bisection inside jit; compilation is told apart; answers are checked point by point.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from dse.cli.console import compile_cache
from dse.search.grid import Tiling, sweep
from dse.search.recheck import recheck
from dse.search.run import of_machines
from dse.space.compile import compile_space
from dse.space.load import load_space

SPACE = Path(__file__).parent.parent / "search_spaces" / "goodput_70b.yaml"


def main() -> None:
    compile_cache()
    started = time.perf_counter()
    space = compile_space(load_space(SPACE))
    c = of_machines(space, None)
    print(f"{space.legal:,} plans, laid out in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    sweep(space, c, tiles=range(1))
    first = time.perf_counter() - started
    started = time.perf_counter()
    swept = sweep(space, c)
    seconds = time.perf_counter() - started
    tiles = len(Tiling.of(space))
    print(f"compiling and the first of {tiles} tiles {first:.1f} s; then all {swept.evaluated:,} plans {seconds:.1f} s")
    print(f"{swept.evaluated / seconds:,.0f} plans/s; 100,000 plans in {1e5 / swept.evaluated * seconds:.1f} s")
    exact = recheck(space, c, swept.front.indices)
    worst = np.max(np.abs(exact.objectives[:, 0] / swept.front.values[:, 0] - 1.0))
    print(f"{len(swept.front.indices)} plans kept, priced again in float64: goodput differs by {worst:.1e} at most")
    best = exact.rows.loc[exact.objectives[:, 0].argmin()]
    print(f"best: {best['goodput_req_s_gpu']:.3f} req/s/GPU, tp {best['tp']}, {best['weights']}, chunk {best['chunk']}")


if __name__ == "__main__":
    main()
