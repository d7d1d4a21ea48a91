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
    mean_isl: Annotated[float, typer.Option(min=4, max=2048, help="Mean prompt tokens (lognormal).")],
    mean_osl: Annotated[float, typer.Option(min=4, max=2048, help="Mean output tokens (lognormal).")],
    gpus: Annotated[int, typer.Option(min=2, max=64, help="A100-80G GPUs.")] = 4,
    ttft_ms: Annotated[float, typer.Option(min=1, help="TTFT that 90% of requests must meet.")] = 200.0,
    tpot_ms: Annotated[float, typer.Option(min=1, help="TPOT that 90% of requests must meet.")] = 100.0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="CSV file to write as well.")] = None,
) -> None:
    """Place OPT-13B as DistServe does: every prefill and decode placement with its goodput, best first."""
    from dse.published.tables import placement_table

    compile_cache()
    table = placement_table(mean_isl, mean_osl, gpus, ttft_ms, tpot_ms)
    if out is not None:
        write_csv(table, out)
    show_table("placements by requests/s a GPU", dicts(table), False)


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
