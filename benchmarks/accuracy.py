"""How far predictions are from measurements: held-out rows, plan choice, published figures. Not a test: it prints.

    python benchmarks/accuracy.py [--shared ../shared] [--quick]

Held-out errors are of fits that never saw the row's series, model, GPU or experiment. Plan choice and published figures
use the default coefficient set; the published ones are in no fit. `--quick` leaves out what takes minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from published_runs import headlines, unseen
from rich.console import Console
from rich.table import Table

from dse.calibrate.collectives import collective_source, read_collectives
from dse.calibrate.fit import cross_validate, folds
from dse.calibrate.kernels import kernel_accuracy
from dse.calibrate.parameters import Layout
from dse.calibrate.read import read_files
from dse.calibrate.roofline import beside_accuracy, held_out
from dse.calibrate.roofline_rows import step_rows
from dse.calibrate.run import Accuracy, accuracy
from dse.calibrate.sources import series
from dse.catalog.coefficients import coefficient_set
from dse.errors import InputError
from dse.space.cases import estimate_cases

# (source, split, column of the accuracy table) -> (what, the largest error that issue 4 allows)
HELD_TO = {
    ("serving", "unseen series", "tpot"): (0.08, 0.05),
    ("serving", "a model left out", "tpot"): (0.14, 0.09),
    ("serving", "a GPU left out", "tpot"): (0.11, 0.08),
    ("serving", "unseen series", "ttft"): (0.25, 0.15),
    ("steps", "random folds", "cycle"): (0.03, None),
    ("steps", "an experiment left out", "cycle"): (0.05, None),
}
# Medians: kernels at unseen shapes and on a GPU left out; collectives at unseen sizes.
KERNELS = dict.fromkeys(("gemm", "context_attention", "generation_attention", "context_mla", "generation_mla"), 0.07)
KERNELS |= {"moe": 0.12}
KERNEL_GPU = 0.20
COLLECTIVES = {
    "nccl": "message_size",
    "custom_allreduce": "message_size",
    "wideep_deepep_normal": "num_token",
    "wideep_deepep_ll": "num_token",
}
COLLECTIVE = 0.10
REGRET = 0.01  # mean loss of the plan chosen by predicted throughput a GPU
SAME_LOAD = ("model", "gpu", "engine", "weights", "isl", "osl", "concurrency")
CHOICE = ("tp", "moe_tp", "moe_ep")
Missed = list[str]


def show(title: str, frame: pd.DataFrame) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for name in frame.columns:
        text = frame[name].map(lambda value: isinstance(value, str)).all()
        table.add_column(str(name), justify="left" if text else "right", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row))
    Console(width=170).print(table)
    print()


# -------------------------------------------------------------------------------------------------- held out


def held_out_errors(measured: Path) -> tuple[Accuracy, Missed]:
    """The held-to table of serving runs and engine steps, fitted jointly with whatever else is there."""
    files = [measured / name for name in ("serving_calibration.csv", "step_cycles_h100.csv")]
    began = time.perf_counter()
    result = accuracy(read_files([path for path in files if path.exists()]))
    lines, missed = [], []
    for (source, split, metric), (mean, median) in HELD_TO.items():
        table = result.table
        row = table[(table["source"] == source) & (table["split"] == split)]
        if row.empty:
            print(f"no rows for {source}, {split}: left out")
            continue
        reached = [float(row[f"{metric}_{kind}"].iloc[0]) for kind in ("mean", "median")]
        allowed = [mean, median]
        ok = all(bar is None or value <= bar for value, bar in zip(reached, allowed, strict=True))
        lines.append(
            {"source": source, "left out": split, "of": metric, "rows": int(row["rows"].iloc[0])}
            | {"mean": reached[0], "allowed": mean, "median": reached[1], "allowed ": median or "–"}
            | {"": "" if ok else "MISSED"}
        )
        missed += [] if ok else [f"{metric}, {split}"]
    show(f"Held-out errors ({time.perf_counter() - began:.0f} s)", pd.DataFrame(lines))
    return result, missed


def present(measured: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """Kernel tables that are here, with their files; the others are named."""
    for name in names:
        path = measured / "kernels" / f"{name}.parquet"
        if path.exists():
            yield name, path
        else:
            print(f"{path.name}: not here, left out")


def kernels(measured: Path) -> Missed:
    """Single operators, by the kernel tables' own fit."""
    lines = []
    for op, path in present(measured, KERNELS):
        table = kernel_accuracy(op, pd.read_parquet(path)).drop_duplicates("split").set_index("split")
        for split, allowed in (("unseen shapes", KERNELS[op]), ("a GPU left out", KERNEL_GPU)):
            reached, rows = float(table.loc[split, "median"]), int(table.loc[split, "rows"])
            lines.append({"operator": op, "left out": split, "rows": rows, "median": reached, "allowed": allowed})
    return _judged("Kernels", lines, "operator")


def collectives(measured: Path) -> Missed:
    """Each table of collectives fitted by itself, message sizes (or tokens) in five folds."""
    lines = []
    for kind, path in present(measured, COLLECTIVES):
        source = collective_source(read_collectives(path, kind))
        fold = folds(series(source.frame, (COLLECTIVES[kind],)), 5)
        predicted = cross_validate([source], Layout.of([source.labels]), 0, fold).predicted
        error = np.abs(np.exp(predicted - source.measured) - 1.0)
        for k, metric in enumerate(source.metrics):
            lines.append(
                {"collective": f"{kind} {metric}", "left out": "unseen sizes", "rows": len(source)}
                | {"median": float(np.nanmedian(error[:, k])), "allowed": COLLECTIVE}
            )
    return _judged("Collectives", lines, "collective")


def _judged(title: str, lines: list[dict[str, object]], name: str) -> Missed:
    if not lines:
        return []
    table = pd.DataFrame(lines)
    missed = table["median"] > table["allowed"]
    show(title, table.assign(**{"": np.where(missed, "MISSED", "")}))
    return [f"{row[name]}, {row['left out']}" for _, row in table[missed].iterrows()]


def roofline(result: Accuracy | None, measured: Path) -> None:
    """The corrected roofline beside ours, on the same rows and folds; ours where it was fitted."""
    steps = measured / "step_cycles_h100.csv"
    rows = dict(result.rows) if result is not None else {}
    if steps.exists():
        rows.setdefault("random folds", pd.read_csv(steps))
    found = beside_accuracy(rows)
    lines = [other.table for other in found]
    if "random folds" in rows:
        data = step_rows(rows["random folds"])
        left_out = held_out(data, pd.factorize(data.frame["experiment_id"])[0])
        error = np.abs(left_out / np.exp(data.measured) - 1.0)
        line = {"metric": "cycle, an experiment left out", "rows": len(data)}
        lines.append(pd.DataFrame([line | {"roofline_mean": error.mean(), "roofline_median": float(np.median(error))}]))
    if lines:
        show("Corrected roofline, fitted by gradients, beside ours", pd.concat(lines, ignore_index=True))
    for h in (h for other in found for h in other.health):
        print(f"  {h.name:20s} {h.value:10.4g}   [{h.low:.3g}, {h.high:.3g}]   {h.complaint}")
    print()


# ------------------------------------------------------------------------------------------------ plan choice


def regret(rows: pd.DataFrame) -> pd.DataFrame:
    """One line a load that was measured with several TP/EP choices: the loss of the one predicted best.

    `rows` has measured_* and ttft_ms, tpot_ms; throughput a GPU = concurrency osl / (ttft + (osl-1) tpot) / tp.
    """
    number = rows[["concurrency", "osl", "tp"]].apply(pd.to_numeric)

    def rate(ttft: str, tpot: str) -> pd.Series:
        first, each = (pd.to_numeric(rows[name]) for name in (ttft, tpot))
        return number["concurrency"] * number["osl"] / (first + (number["osl"] - 1) * each) * 1e3 / number["tp"]

    table = rows.assign(truth=rate("measured_ttft_ms", "measured_tpot_ms"), guess=rate("ttft_ms", "tpot_ms"))
    table = table[np.isfinite(table["guess"])]
    lines = []
    for key, group in table.groupby(list(SAME_LOAD)):
        plans = group.groupby([name for name in CHOICE if name in group])[["truth", "guess"]].mean()
        if len(plans) > 1:
            chosen, best = plans["truth"].iloc[int(plans["guess"].argmax())], plans["truth"].max()
            lines.append(dict(zip(SAME_LOAD, key, strict=True)) | {"choices": len(plans), "loss": 1 - chosen / best})
    return pd.DataFrame(lines)


def plan_choice(result: Accuracy | None, measured: Path) -> Missed:
    """Mean loss over the measured choices, by held-out predictions and by the default set's."""
    table = pd.read_csv(measured / "serving_calibration.csv", dtype=str)
    sources = {"default set": estimate_cases(table, coefficient_set())}
    if result is not None and "unseen series" in result.rows:
        sources["held out (unseen series)"] = result.rows["unseen series"]
    lines, missed = [], []
    for name, rows in sources.items():
        loss = regret(rows)
        ok = loss["loss"].mean() <= REGRET
        lines.append(
            {"predictions": name, "loads": len(loss), "mean loss": loss["loss"].mean(), "allowed": REGRET}
            | {"best chosen": float((loss["loss"] == 0).mean()), "worst loss": loss["loss"].max()}
            | {"": "" if ok else "MISSED"}
        )
        missed += [] if ok else [f"plan choice, {name}"]
    show("Plan choice: throughput lost against the best measured plan", pd.DataFrame(lines))
    return missed


# ---------------------------------------------------------------------------------------------------- others


def published() -> None:
    """Headline figures, tokens/s a GPU."""
    show("Published headline figures (no fit saw them), tokens/s/GPU", headlines())


def runs_of_others(measured: Path) -> None:
    """Runs of other projects, by source."""
    table, why = unseen(measured / "published_runs.csv")
    show("Published runs that no fit saw: |predicted/measured - 1|, bias = geometric mean of the ratio", table)
    for reason, count in why.most_common():
        print(f"  {count:4d} not priced: {reason}")
    print()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="where the measurements are")
    parser.add_argument("--quick", action="store_true", help="without the fits of held-out rows")
    options = parser.parse_args()
    measured = options.shared / "measured"
    published()
    missed: Missed = []
    result: Accuracy | None = None
    sections: tuple[tuple[str, Callable[[], Missed | None]], ...] = (
        ("published_runs.csv", lambda: runs_of_others(measured)),
        ("serving_calibration.csv", lambda: plan_choice(result, measured)),
    )
    if not measured.is_dir():
        print(f"{measured}: not here; measured sections are left out")
        return 0
    if not options.quick:
        try:
            result, missed = held_out_errors(measured)
        except InputError as error:
            print(f"held-out errors left out: {error}")
        roofline(result, measured)
        missed += kernels(measured) + collectives(measured)
    for needed, run in sections:
        if (measured / needed).exists():
            missed += run() or []
        else:
            print(f"{needed}: not here, left out")
    if missed:
        print(f"missed: {'; '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
