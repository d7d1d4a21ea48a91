"""Commands on plans: search a space, estimate cases, check a written plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import CoefficientSet, Out, app, compile_cache, progress, read_csv, width, write_csv
from dse.errors import NothingFeasible

Intervals = Annotated[
    bool, typer.Option("--intervals", help="Also the ends between which 90% of measurements are to lie.")
]
OUTPUTS = ("pareto.csv", "candidates.csv", "report.html", "run.json")


@app.command()
def search(
    space: Annotated[Path, typer.Argument(help="Search space, a YAML file (see search_spaces/).")],
    out: Annotated[Path, typer.Option("--out", help=f"Directory for {', '.join(OUTPUTS)}.")] = Path("results"),
    sampler: Annotated[str, typer.Option(help="grid (every legal plan), tpe, nsga2 or random.")] = "grid",
    trials: Annotated[int, typer.Option(min=1, help="Plans to try with tpe, nsga2 and random.")] = 1000,
    engine: Annotated[str, typer.Option(help="local, or dask for several machines.")] = "local",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampler.")] = 0,
    compare: Annotated[bool, typer.Option(help="Compare a sampled front with the exhaustive one.")] = True,
    coefficients: CoefficientSet = None,
    intervals: Intervals = False,
) -> None:
    """Search a space of plans: print the best and the front, write tables and a report."""
    from rich.console import Console

    from dse.catalog.coefficients import coefficient_set
    from dse.files import output_directory
    from dse.report.files import write_outputs
    from dse.report.summary import summarise
    from dse.report.text import render
    from dse.search.run import search as run
    from dse.space.load import load_any

    compile_cache()
    spec = load_any(space)
    output_directory(out)  # before the work, not after
    with progress(f"{spec.name}: plans priced") as advance:
        result = run(
            spec,
            sampler=sampler,
            trials=trials,
            engine=engine,
            seed=seed,
            coefficients=coefficient_set(coefficients),
            compare=compare,
            progress=advance,
            intervals=intervals,
        )
    summary = summarise(result)
    written = write_outputs(result, out, summary)
    Console(width=width()).print(render(summary))
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
    if not len(result.front):
        binding = "; ".join(b.text for b in result.binding) or "no point could be priced"
        raise NothingFeasible(f"{space}: no plan meets every constraint; the nearest one breaks {binding}")


@app.command()
def estimate(
    cases: Annotated[Path, typer.Argument(help="CSV with model, gpu, isl, osl and optional columns.")],
    out: Out,
    coefficients: CoefficientSet = None,
    intervals: Intervals = False,
) -> None:
    """Estimate deployments, one row each: TTFT, TPOT, throughput, memory, breakdown."""
    from dse.catalog.coefficients import coefficient_set
    from dse.space.cases import estimate_cases

    compile_cache()
    result = estimate_cases(read_csv(cases), coefficient_set(coefficients), intervals)
    write_csv(result, out)
    unpriced = int(result["ttft_ms"].isna().sum())
    typer.echo(f"{out}: {len(result)} rows" + (f", {unpriced} without an estimate (see `reason`)" if unpriced else ""))


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(help="A written plan, a YAML file (see search_spaces/plans/).")],
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="HTML page to write as well.")] = None,
) -> None:
    """Audit a written plan: every claim recomputed, and the nearest plan that meets its targets, or why none can."""
    from rich.console import Console

    from dse.audit.load import load_plan
    from dse.audit.run import audit
    from dse.files import atomic_write
    from dse.report import audit as report

    compile_cache()
    result = audit(load_plan(plan))
    if out is not None:
        atomic_write(out, report.html(result))
    if json:
        typer.echo(report.to_json(result))
    else:
        Console(width=width()).print(report.render(result))
