"""Fit the kernel tables and print their errors on rows no fit saw; `--write` renews the shipped coefficients.

python benchmarks/kernels.py ../shared/measured/kernels --write
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd

from dse.calibrate.kernels import FittedKernel, fit_kernels, kernel_accuracy, kernels_yaml
from dse.catalog.kernel_coefficients import KERNELS
from dse.files import atomic_write

SHIPPED = Path(__file__).parents[1] / "dse" / "catalog" / "coefficients" / "kernels.yaml"
SOURCE = "aiconfigurator operator tables at 095f58a (TensorRT-LLM 1.0.0 to 1.3.0rc23), Apache-2.0; a random part"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path, help="folder of OP.parquet")
    parser.add_argument("--ops", nargs="*", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="renew the shipped coefficients (all operators)")
    arguments = parser.parse_args()
    fits: list[FittedKernel] = []
    errors: dict[str, dict[str, float]] = {}
    for op in arguments.ops:
        table = pd.read_parquet(arguments.tables / f"{op}.parquet")
        fits.append(fit_kernels(op, table, arguments.seed))
        began = time.perf_counter()
        accuracy = kernel_accuracy(op, table, arguments.seed)
        print(f"{op}: fitted in {fits[-1].seconds:.1f} s, errors in {time.perf_counter() - began:.1f} s")
        print(accuracy.round(3).to_string(index=False), flush=True)
        totals = accuracy[accuracy["gpu"] == "all"]
        errors[op] = dict(zip(totals["split"], totals["median"].round(4).tolist()))
    if arguments.write:
        atomic_write(SHIPPED, kernels_yaml(fits, {"data": SOURCE, "median_error_held_out": errors}))


if __name__ == "__main__":
    main()
