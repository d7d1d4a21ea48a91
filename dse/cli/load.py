"""Commands on load: a trace replayed on plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import CoefficientSet, Out, app, compile_cache, csv_text, progress, read_csv, width


@app.command()
def replay(
    trace: Annotated[Path, typer.Argument(help="Trace, a CSV of arrival_s, input_tokens, output_tokens.")],
    plans: Annotated[Path, typer.Argument(help="Plans, a CSV of estimate's columns (isl, osl are not needed).")],
    out: Annotated[Path, typer.Option("--out", help="Directory for replay.csv, requests.csv and replay.html.")] = Path(
        "replay"
    ),
    rate: Annotated[float | None, typer.Option(help="Requests a second: arrivals are stretched to it.")] = None,
    policy: Annotated[
        str, typer.Option(help="prefill (prompts first), mixed, decode, or auto: what the row's engine does.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="First requests of the trace only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of Poisson arrivals, where the trace has none.")] = 0,
    seats: Annotated[int, typer.Option("--max-running", help="Requests that run at once on a rank, at most.")] = 256,
    ttft_ms: Annotated[float | None, typer.Option(help="Target: TTFT of a request, ms.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Target: TPOT of a request, ms.")] = None,
    requests: Annotated[
        int | None, typer.Option(help="Row (from 0) of the plan in requests.csv; the best one.")
    ] = None,
    coefficients: CoefficientSet = None,
) -> None:
    """Replay a trace on plans as it would have happened: TTFT, TPOT and E2E distributions, queues, KV use."""
    from rich.console import Console

    from dse.catalog.coefficients import coefficient_set
    from dse.files import output_directory
    from dse.report.replay import render, write_replay
    from dse.space.replay import replay as run
    from dse.space.traces import read_trace

    compile_cache()
    output_directory(out)  # before the work, not after
    recorded, rows = read_trace(trace), read_csv(plans)
    with progress(f"{trace.name}: requests served") as advance:
        done = run(
            recorded,
            rows,
            coefficient_set(coefficients),
            rate=rate,
            limit=limit,
            seed=seed,
            policy=policy,
            seats=seats,
            ttft_ms=ttft_ms,
            tpot_ms=tpot_ms,
            progress=advance,
        )
    written = write_replay(done, out, requests)
    Console(width=width()).print(render(done))
    refused = len(rows) - len(done.ranking)
    typer.echo(
        f"written: {', '.join(str(path) for path in written)}" + (f"; {refused} plans not run" if refused else "")
    )


@app.command()
def goodput(
    cases: Annotated[Path, typer.Argument(help="CSV of estimate's columns; concurrency: most requests run at once.")],
    out: Out,
    ttft_ms: Annotated[float, typer.Option(help="TTFT that a request must meet, ms.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="TPOT that it must meet too, ms.")] = 50.0,
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet both.")] = 0.9,
    trace: Annotated[Path | None, typer.Option(help="Lengths from this trace (CSV), not isl and osl.")] = None,
    isl_cv: Annotated[float, typer.Option(help="Lognormal prompts: standard deviation over mean.")] = 0.0,
    osl_cv: Annotated[float, typer.Option(help="Lognormal answers: standard deviation over mean.")] = 0.0,
    correlation: Annotated[float, typer.Option(help="Of the logarithms of both lengths.")] = 0.0,
    cv: Annotated[float, typer.Option(help="Burstiness of arrivals: variation of their gaps (1: Poisson).")] = 1.0,
    crossover: Annotated[
        Path | None, typer.Option(help="HTML page to write as well: tensor parallelism against pipeline stages.")
    ] = None,
    coefficients: CoefficientSet = None,
) -> None:
    """Find the goodput of deployments: the most requests a second that enough of which meet their targets."""
    from dse.catalog.coefficients import coefficient_set
    from dse.files import atomic_write_all, output_file
    from dse.report.crossover import html
    from dse.space.goodput import Asked, crossings, goodput_cases
    from dse.space.traces import read_trace

    compile_cache()
    for path in (out, *([crossover] if crossover else [])):
        output_file(path)  # before the work, not after
    asked = Asked(
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        attainment=attainment,
        trace=None if trace is None else read_trace(trace),
        isl_cv=isl_cv,
        osl_cv=osl_cv,
        correlation=correlation,
        cv=cv,
    )
    rows, chosen = read_csv(cases), coefficient_set(coefficients)
    result = goodput_cases(rows, chosen, asked)
    pages = {} if crossover is None else {crossover: html(crossings(rows, chosen))}
    atomic_write_all({out: csv_text(result), **pages})
    without = int((result["reason"] != "").sum())
    typer.echo(f"{out}: {len(result)} rows" + (f", {without} without a goodput (see `reason`)" if without else ""))
