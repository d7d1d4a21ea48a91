"""What every command needs of the terminal: the application, reading and writing tables, progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers in half the time
    help="Which parallel plan, batch, precision and GPUs to serve a large language model on, within latency targets "
    "and memory, and at what cost.",
)

SLOW = 2.0  # seconds after which a progress bar appears

Out = Annotated[Path, typer.Option("-o", "--out", help="CSV file to write.")]
CoefficientSet = Annotated[str | None, typer.Option("--coefficients", help="Coefficient set: a name, or a YAML file.")]


def compile_cache() -> None:
    """Compiled programs are kept between runs, in the user's cache directory: whole, and by XLA's persistent cache."""
    import os

    import jax

    from dse.programs import keep_in

    root = os.environ.get("DSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dse" / "jax"
    if keep_in(Path(root) / "programs"):
        return
    jax.config.update("jax_compilation_cache_dir", str(root))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def one_blas_thread() -> None:
    """For commands that fit, before they import NumPy: fits run side by side, XLA has threads of its own, and BLAS
    threads beside both wait for each other (five times as long where something else runs as well)."""
    import os

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and ETA on standard error, once a job has taken two seconds."""
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(label),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    started = time.monotonic()
    task: list[Any] = []

    def advance(done: int, total: int) -> None:
        elapsed = time.monotonic() - started
        if not task and elapsed > SLOW and done < total:
            bar.start()
            task.append(bar.add_task(label, total=total, rate=""))
        if task:
            bar.update(task[0], completed=done, total=total, rate=f"{done / elapsed / 1e6:.2f} M/s")

    try:
        yield advance
    finally:
        if task:
            bar.stop()


def read_csv(path: Path) -> pd.DataFrame:
    """A table as text cells; one message where the file itself is unusable."""
    from dse.files import read_csv

    return read_csv(path, dtype=str)


def dicts(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def refusals(refused: Any) -> None:
    """Rows that could not serve the fit, counted by reason: listed, never dropped silently."""
    reasons: dict[str, int] = {}
    for refusal in refused:
        reasons[refusal.reason] = reasons.get(refusal.reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        typer.echo(f"refused {count} rows: {reason}")


def write_csv(table: pd.DataFrame, path: Path, digits: int = 9) -> None:
    from dse.files import atomic_write

    atomic_write(path, csv_text(table, digits))


def csv_text(table: pd.DataFrame, digits: int = 9) -> str:
    """A table as `write_csv` writes it."""
    return str(table.to_csv(index=False, float_format=f"%.{digits}g"))


def width() -> int | None:
    """Of the terminal; 120 columns where the output goes elsewhere."""
    return None if sys.stdout.isatty() else 120


def show_table(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None, header_style="bold")
    for name, value in rows[0].items():
        table.add_column(name, justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(f"{v:g}" if isinstance(v, float) else str(v) for v in row.values()))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(table)
