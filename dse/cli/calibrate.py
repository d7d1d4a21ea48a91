"""Commands on measurements: fit coefficients, measure accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import app, compile_cache, dicts, read_csv, refusals, show_table, write_csv


@app.command()
def calibrate(
    observations: Annotated[list[Path], typer.Argument(help="CSVs of serving measurements.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Coefficient file to write (YAML).")],
) -> None:
    """Fit coefficients to serving measurements, by gradients through the whole model."""
    import pandas as pd

    from dse.calibrate.run import calibrate as run
    from dse.calibrate.run import to_yaml
    from dse.files import atomic_write

    compile_cache()
    table = pd.concat([read_csv(path) for path in observations], ignore_index=True)
    result = run(table, name=out.stem, source=", ".join(path.name for path in observations))
    atomic_write(out, to_yaml(result.set))
    about = result.set.about
    typer.echo(f"{out}: {about['rows']} rows fitted in {result.fitted.seconds:.0f} s, {about['refused']} refused")
    for metric, error in about["error_in_sample"].items():
        typer.echo(f"in-sample error of {metric}: mean {error['mean']:.1%}, median {error['median']:.1%}")
    refusals(result.refused)


@app.command()
def accuracy(
    observations: Annotated[list[Path], typer.Argument(help="CSVs of serving measurements.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="CSV of every held-out prediction.")] = None,
) -> None:
    """Errors on measurements that the fit never saw: series, models and GPUs left out."""
    import pandas as pd

    from dse.calibrate.run import accuracy as run
    from dse.calibrate.run import worst

    compile_cache()
    table = pd.concat([read_csv(path) for path in observations], ignore_index=True)
    result = run(table, seed)
    show_table("errors on rows the fit never saw", dicts(result.table), False)
    first = next(iter(result.rows.values()))
    wrong = worst(first)
    typer.echo(f"{len(wrong)} of {len(first)} rows of unseen series are off by more than a factor of two in TPOT")
    refusals(result.refused)
    if out is not None:
        write_csv(pd.concat([rows.assign(split=name) for name, rows in result.rows.items()]), out)
