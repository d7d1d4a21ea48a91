"""Commands on what to measure: what ails a calibration, and which runs would tell most."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.calibrate import Given, Observations
from dse.cli.console import CoefficientSet, app, compile_cache, dicts, read_csv, refusals, show_table, write_csv


@app.command()
def diagnose(
    observations: Observations,
    given: Given = None,
    worst: Annotated[int, typer.Option(min=0, help="Rows to explain.")] = 20,
    held_out: Annotated[bool, typer.Option(help="Judge rows by fits that never saw them (slower).")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Directory for the whole tables as CSV.")] = None,
) -> None:
    """Fit, then say what ails it: coefficients the data do not tell, errors by bucket, worst rows and their cause."""
    from dse.calibrate.diagnose import diagnose as run
    from dse.calibrate.logs import parse_given
    from dse.calibrate.read import read_files
    from dse.calibrate.run import calibrate
    from dse.files import output_directory

    if out is not None:
        output_directory(out)
    compile_cache()
    fitted = calibrate(read_files(observations, parse_given(given or [])), seed=seed, intervals=held_out)
    found = run(fitted, worst)
    whole = {"coefficients": found.coefficients, "buckets": found.buckets, "worst": found.worst}
    flags = found.coefficients["flags"].str.split(", ").explode().replace("", "none").value_counts()
    typer.echo(
        f"{len(found.coefficients)} fitted numbers: " + ", ".join(f"{count} {name}" for name, count in flags.items())
    )
    base = found.flagged[found.flagged["level"] == "base"]
    if len(base):
        numbers = {name: base[name].map("{:.4g}".format) for name in ("value", "prior", "prior_sd", "sd")}
        show_table("flagged at the base", dicts(base.drop(columns=["level", "key"]).assign(**numbers)), False)
    show_table("errors by bucket", dicts(found.buckets), False)
    if len(found.worst):
        shown = ("model", "gpu", "engine", "isl", "osl", "concurrency", "standard_deviations", "cause")
        names = [name for name in shown if name in found.worst]
        show_table("worst rows", dicts(found.worst[names]), False)
    refusals(fitted.refused)
    if out is not None:
        for name, table in whole.items():
            write_csv(table, out / f"{name}.csv")
        typer.echo(f"written: {', '.join(str(out / f'{name}.csv') for name in whole)}")


@app.command()
def experiments(
    budget: Annotated[float, typer.Option(min=0, help="GPU-minutes to spend.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for plan.csv and the runs' files.")],
    candidates: Annotated[
        Path | None, typer.Argument(help="CSV of runs in estimate's columns (default: the W1-W5 and V1 profiles).")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Of the default profiles.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Of the default profiles.")] = None,
    engine: Annotated[str, typer.Option(help="Of the default profiles.")] = "vllm",
    weights: Annotated[str, typer.Option(help="Of the default profiles.")] = "native",
    most: Annotated[int | None, typer.Option(min=1, help="Runs at most.")] = None,
    aim: Annotated[
        str, typer.Option(help="information: on all coefficients; predictions: narrower ones of the candidates.")
    ] = "information",
    coefficients: CoefficientSet = None,
) -> None:
    """Which runs to measure next: most expected information a GPU-minute, as inference-perf and vllm bench files."""
    from dse.calibrate.experiment_files import files_of, profiles
    from dse.calibrate.experiments import next_experiments
    from dse.catalog.coefficients import coefficient_set
    from dse.errors import InputError
    from dse.files import atomic_write_all, output_directory

    if candidates is None and (model is None or gpu is None):
        raise InputError("experiments: give a CSV of candidates, or --model and --gpu for the W1-W5 and V1 profiles")
    if candidates is not None and (model is not None or gpu is not None):
        raise InputError("experiments: --model and --gpu are of the default profiles; a CSV of candidates says its own")
    compile_cache()
    known = coefficient_set(coefficients)
    if candidates is not None:
        table = read_csv(candidates)
    else:
        table = profiles(str(model), str(gpu), engine, weights, known=known)
    found = next_experiments(table, budget, known, most, aim)
    files = files_of(found)
    output_directory(out)
    atomic_write_all(
        {out / "plan.csv": found.table.to_csv(index=False), **{out / name: text for name, text in files.items()}}
    )
    shown = ["run", *(n for n in ("profile", "tp", "isl", "osl", "concurrency", "rate") if n in found.table)]
    shown += ["gpu_minutes", "gain_nats", "ttft_sd_before", "ttft_sd_after", "tpot_sd_before", "tpot_sd_after"]
    show_table(f"next runs ({known.name})", dicts(found.table[shown]), False)
    typer.echo(f"{out}: {len(found.table)} runs, {found.minutes:.1f} of {budget:g} GPU-minutes")
    for row in found.refused.itertuples():
        typer.echo(f"refused row {row.row}: {row.reason}")
