"""Commands on measurements: fit coefficients, measure accuracy, price engine steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import (
    CoefficientSet,
    Out,
    app,
    compile_cache,
    dicts,
    one_blas_thread,
    read_csv,
    refusals,
    show_table,
    write_csv,
)

Observations = Annotated[
    list[Path],
    typer.Argument(help="Serving runs, engine steps, collectives: CSV, parquet, benchmark tools' JSON, nccl-tests."),
]
Given = Annotated[
    list[str] | None, typer.Option("--given", help="What the files do not say, as name=value (gpu=h100).")
]


@app.command()
def calibrate(
    observations: Observations,
    out: Annotated[Path, typer.Option("-o", "--out", help="Coefficient file to write (YAML).")],
    given: Given = None,
    known: Annotated[
        str | None, typer.Option("--from", help="Few-shot: keep this set, fit only a few numbers of a new machine.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="With --from: the coefficients to fit, separated by commas.")] = None,
    restarts: Annotated[int, typer.Option(min=0, help="Random starts beside the prior's centre.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the starts and folds.")] = 0,
    intervals: Annotated[bool, typer.Option(help="Also learn from held-out rows how sure the set is.")] = True,
) -> None:
    """Fit coefficients to measurements of all kinds jointly, by gradients through the whole model."""
    one_blas_thread()
    from dse.calibrate.fewshot import USUAL, few_shot
    from dse.calibrate.logs import parse_given
    from dse.calibrate.read import read_files
    from dse.calibrate.run import calibrate as run
    from dse.calibrate.run import to_yaml
    from dse.catalog.coefficients import coefficient_set
    from dse.errors import InputError
    from dse.files import atomic_write, output_file

    if only is not None and known is None:
        raise InputError("--only: goes with --from SET, whose other coefficients are kept")
    output_file(out)  # before the work, not after
    compile_cache()
    tables = read_files(observations, parse_given(given or []))
    if known is not None:
        names = [name.strip() for name in only.split(",")] if only is not None else list(USUAL)
        chosen = few_shot(tables, coefficient_set(known), names, name=out.stem)
        atomic_write(out, to_yaml(chosen))
        fitted = "; ".join(
            f"{gpu}: {', '.join(f'{name} x {factor:g}' for name, factor in table.items())}"
            for gpu, table in chosen.about["fitted"].items()
        )
        typer.echo(f"{out}: {chosen.about['rows']} rows on top of {chosen.about['from']}: {fitted}")
        return
    files = ", ".join(path.name for path in observations)
    result = run(tables, name=out.stem, source=files, restarts=restarts, seed=seed, intervals=intervals)
    atomic_write(out, to_yaml(result.set))
    about = result.set.about
    rows = ", ".join(f"{count} of {name}" for name, count in about["rows"].items())
    typer.echo(f"{out}: {rows} rows fitted in {result.fitted.seconds:.0f} s, {len(result.refused)} refused")
    for source, table in about["error_in_sample"].items():
        for metric, error in table.items():
            typer.echo(f"in-sample error of {source} {metric}: mean {error['mean']:.1%}, median {error['median']:.1%}")
    for split, table in about.get("coverage_of_90", {}).items():
        found = ", ".join(f"{metric} {share:.0%}" for metric, share in table.items())
        typer.echo(f"90% intervals hold, {split} left out: {found}")
    refusals(result.refused)


@app.command()
def accuracy(
    observations: Observations,
    given: Given = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds.")] = 0,
    compare: Annotated[
        str | None, typer.Option(help="corrected-roofline: that method, fitted to the same rows and folds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory for accuracy.html, accuracy.md, predictions.csv.")
    ] = None,
) -> None:
    """Errors on measurements that the fit never saw: series, models, GPUs and experiments left out."""
    one_blas_thread()
    from dse.calibrate.logs import parse_given
    from dse.calibrate.read import read_files
    from dse.calibrate.roofline import beside_accuracy
    from dse.calibrate.run import accuracy as run
    from dse.calibrate.run import worst
    from dse.errors import unknown
    from dse.files import output_directory
    from dse.report.accuracy_page import write_accuracy

    if compare not in (None, "corrected-roofline"):
        raise unknown("method", compare, ("corrected-roofline",), "--compare")
    if out is not None:
        output_directory(out)  # before the work, not after
    compile_cache()
    result = run(read_files(observations, parse_given(given or [])), seed)
    for source, table in result.table.groupby("source", sort=False):
        show_table(f"{source}: errors on rows the fit never saw", dicts(table.dropna(axis=1, how="all")), False)
    if "unseen series" in result.rows:
        first = result.rows["unseen series"]
        typer.echo(
            f"{len(worst(first))} of {len(first)} rows of unseen series are off by more than a factor of two in TPOT"
        )
    others = beside_accuracy(result.rows, seed) if compare else ()
    for other in others:
        show_table("corrected roofline, same rows and folds", dicts(other.table.round(4)), False)
        for h in other.health:
            typer.echo(
                f"{h.name} {h.value:.3g} ({h.low:.3g} to {h.high:.3g})" + (f": {h.complaint}" if h.complaint else "")
            )
    refusals(result.refused)
    if out is not None:
        written = write_accuracy(result, out, ", ".join(path.name for path in observations), others)
        typer.echo(f"written: {', '.join(str(path) for path in written)}")


@app.command()
def steps(
    cases: Annotated[Path, typer.Argument(help="CSV of engine steps: model, tp, the batch's requests and tokens.")],
    out: Out,
    coefficients: CoefficientSet = None,
) -> None:
    """Time of single engine steps, one row each: adds predicted_us."""
    from dse.catalog.coefficients import coefficient_set
    from dse.space.steps import estimate_steps

    compile_cache()
    result = estimate_steps(read_csv(cases), coefficient_set(coefficients))
    write_csv(result, out)
    unpriced = int(result["predicted_us"].isna().sum())
    typer.echo(f"{out}: {len(result)} steps" + (f", {unpriced} without a time (see `reason`)" if unpriced else ""))
