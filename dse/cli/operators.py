"""Commands on single operators: the time of kernels and collectives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dse.cli.console import app, compile_cache, read_csv, write_csv

if TYPE_CHECKING:
    import pandas as pd


@app.command()
def kernels(
    op: Annotated[
        str,
        typer.Argument(
            help="gemm|context_attention|generation_attention|context_mla|generation_mla|moe|nccl|custom_allreduce|"
            "wideep_deepep_normal|wideep_deepep_ll"
        ),
    ],
    cases: Annotated[Path, typer.Argument(help="CSV or parquet with the operator's columns and `gpu`.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write: .parquet, else CSV.")],
    coefficients: Annotated[
        str | None, typer.Option("--coefficients", help="YAML file of coefficients in place of the shipped ones.")
    ] = None,
) -> None:
    """Estimate the time of single operators: one row in, one row out."""
    from dse.calibrate.kernels import estimate_kernels

    compile_cache()
    result = estimate_kernels(op, _read(cases), coefficients)
    _write(result, out)
    noted = int((result["reason"] != "").sum())
    typer.echo(f"{out}: {len(result)} rows" + (f", {noted} with a `reason`" if noted else ""))


def _read(path: Path) -> pd.DataFrame:
    if path.suffix.lower() != ".parquet":
        return read_csv(path)
    from dse.files import read_parquet

    return read_parquet(path)


def _write(table: pd.DataFrame, path: Path) -> None:
    if path.suffix.lower() != ".parquet":
        write_csv(table, path)
        return
    from dse.errors import InputError
    from dse.files import atomic_write

    try:
        data = table.to_parquet(index=False)
    except ImportError:
        raise InputError(f"{path}: writing parquet needs pyarrow: pip install 'dse[parquet]', or name a .csv") from None
    atomic_write(path, data)
