"""Commands of the published models: their tables, runs and placements, and the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import CoefficientSet, Out, app, compile_cache, dicts, read_csv, show_table, width, write_csv


@app.command()
def published(
    method: Annotated[
        str, typer.Argument(help="shallowsim-prefill|shallowsim-decode|modelmeter|corrected-roofline|distserve")
    ],
    cases: Annotated[Path, typer.Argument(help="CSV with the method's columns.")],
    out: Out,
) -> None:
    """Run a published cost model over a table: its own columns in and out."""
    from dse.catalog.models import model, to_architecture
    from dse.published.tables import published as run

    compile_cache()
    result = run(method, read_csv(cases), lambda name: to_architecture(model(name)))
    write_csv(result, out, digits=15)  # closed forms are held to nine digits and more
    noted = int((result["reason"] != "").sum())
    typer.echo(f"{out}: {len(result)} rows" + (f", {noted} with a `reason`" if noted else ""))


@app.command()
def workloads(
    out: Annotated[Path, typer.Option("--out", help="Directory for one inference-perf file a run.")] = Path(
        "workloads"
    ),
) -> None:
    """Write the 99 runs that train and validate the corrected roofline, as inference-perf configurations."""
    from dse.files import atomic_write_all, output_directory
    from dse.published.workloads import as_yaml, plan

    runs = plan()
    output_directory(out)
    atomic_write_all({out / f"{run.name}.yaml": as_yaml(run) for run in runs})
    typer.echo(f"{out}: {len(runs)} configurations")


@app.command()
def placement(
    mean_isl: Annotated[
        float | None, typer.Option(min=4, help="Mean prompt tokens (lognormal); left out: DistServe's ShareGPT.")
    ] = None,
    mean_osl: Annotated[float | None, typer.Option(min=4, help="Mean output tokens (lognormal).")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to place; left out: OPT-13B on A100, by DistServe's own profile.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU, with --model.")] = "a100",
    cluster: Annotated[str, typer.Option(help="Cluster, with --model (the GPU's usual one).")] = "",
    gpus: Annotated[int, typer.Option(min=2, max=4096, help="GPUs that a placement may take.")] = 4,
    ttft_ms: Annotated[float, typer.Option(min=1, help="TTFT that 90% of requests must meet.")] = 200.0,
    tpot_ms: Annotated[float, typer.Option(min=1, help="TPOT that 90% of requests must meet.")] = 100.0,
    jointly: Annotated[bool, typer.Option(help="Both at once, not each by itself; with --model.")] = False,
    weights: Annotated[str, typer.Option(help="Weight format, with --model.")] = "native",
    kv: Annotated[str, typer.Option(help="KV format, with --model.")] = "auto",
    profile: Annotated[str, typer.Option(help="auto, own (the cost model) or distserve (OPT-13B only).")] = "auto",
    coefficients: CoefficientSet = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="CSV file to write as well: all columns.")] = None,
) -> None:
    """Place prefill and decode as DistServe does: every placement with its goodput, L_m and traffic, best first."""
    from dse.catalog.coefficients import coefficient_set
    from dse.errors import InputError, unknown
    from dse.published.tables import placement_table as published_placements
    from dse.space.placement import SHOWN, PlacementAsked, placement_table

    if profile not in ("auto", "own", "distserve"):
        raise unknown("profile", profile, ("auto", "own", "distserve"), "--profile")
    theirs = profile == "distserve" or (profile == "auto" and model is None)
    compile_cache()
    if (mean_isl is None) != (mean_osl is None) or (mean_isl is None and not theirs):
        missing = "--mean-isl" if mean_isl is None else "--mean-osl"
        raise InputError(f"{missing}: is missing (give both means; only DistServe's profile has lengths of its own)")
    if theirs:
        if model is not None and model.rsplit("/", 1)[-1].lower() != "opt-13b":
            raise InputError(f"--profile: distserve has a profile of OPT-13B only, not {model} (allowed: own)")
        if gpus > 64 or (mean_isl or 0.0) > 2048 or (mean_osl or 0.0) > 2048:
            raise InputError(
                "--profile: distserve takes up to 64 GPUs and 2048 tokens; give --model for the cost model"
            )
        table = shown = published_placements(mean_isl, mean_osl, gpus, ttft_ms, tpot_ms)
    else:
        asked = PlacementAsked(
            model=model or "OPT-13B",
            gpu=gpu,
            cluster=cluster,
            mean_isl=mean_isl or 0.0,
            mean_osl=mean_osl or 0.0,
            gpus=gpus,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            jointly=jointly,
            weights=weights,
            kv=kv,
        )
        table = placement_table(asked, coefficient_set(coefficients))
        shown = table[[*SHOWN]].head(20).round(3)
    if out is not None:
        write_csv(table, out)
    show_table("placements by requests/s a GPU", dicts(shown), False)


@app.command()
def traffic(
    cases: Annotated[Path, typer.Argument(help="CSV of estimate's columns.")],
    out: Out,
    coefficients: CoefficientSet = None,
) -> None:
    """Write the bytes a second that a GPU of each deployment sends over each level of its network."""
    from dse.catalog.coefficients import coefficient_set
    from dse.space.traffic import traffic_cases

    compile_cache()
    result = traffic_cases(read_csv(cases), coefficient_set(coefficients))
    write_csv(result, out)
    bad = int((result["reason"] != "").sum())
    typer.echo(f"{out}: {len(result)} rows" + (f", {bad} not counted (see `reason`)" if bad else ""))


@app.command()
def compare(
    cases: Annotated[Path, typer.Argument(help="CSV with model, gpu, isl, tp, dp, batch, phase.")],
    out: Annotated[Path, typer.Option("--out", help="Directory for the tables and the page.")] = Path("comparison"),
    coefficients: CoefficientSet = None,
) -> None:
    """Compare the published methods and this project's model on the same cases."""
    from rich.console import Console

    from dse.audit.compare import compare as run
    from dse.catalog.coefficients import coefficient_set
    from dse.files import output_directory
    from dse.report.compare import render, write_comparison

    compile_cache()
    output_directory(out)
    result = run(read_csv(cases), coefficient_set(coefficients))
    written = write_comparison(result, out)
    Console(width=width()).print(render(result))
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
