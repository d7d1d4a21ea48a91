"""The command line: the only place that prints, exits and reads argv. Heavy imports happen inside commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dse.errors import DseError, InputError, NothingFeasible

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

BAD_INPUT, NOTHING_FEASIBLE = 2, 3
OUTPUTS = ("pareto.csv", "candidates.csv", "report.html", "run.json")
SLOW = 2.0  # seconds after which a progress bar appears

Out = Annotated[Path, typer.Option("-o", "--out", help="CSV file to write.")]
CoefficientSet = Annotated[str | None, typer.Option("--coefficients", help="Coefficient set: a name, or a YAML file.")]


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
) -> None:
    """Search a space of plans: print the best and the front, write tables and a report."""
    from rich.console import Console

    from dse.catalog.coefficients import coefficient_set
    from dse.files import output_directory
    from dse.report.files import write_outputs
    from dse.report.summary import summarise
    from dse.report.text import render
    from dse.search.run import search as run
    from dse.space.load import load_space

    _compile_cache()
    spec = load_space(space)
    output_directory(out)  # before the work, not after
    with _progress(f"{spec.name}: plans priced") as advance:
        result = run(
            spec,
            sampler=sampler,
            trials=trials,
            engine=engine,
            seed=seed,
            coefficients=coefficient_set(coefficients),
            compare=compare,
            progress=advance,
        )
    summary = summarise(result)
    written = write_outputs(result, out, summary)
    Console(width=_width()).print(render(summary))
    typer.echo(f"written: {', '.join(str(path) for path in written)}")
    if not len(result.front):
        binding = "; ".join(b.text for b in result.binding) or "no point could be priced"
        raise NothingFeasible(f"{space}: no plan meets every constraint; the nearest one breaks {binding}")


@app.command()
def estimate(
    cases: Annotated[Path, typer.Argument(help="CSV with model, gpu, isl, osl and optional columns.")],
    out: Out,
    coefficients: CoefficientSet = None,
) -> None:
    """Estimate deployments, one row each: TTFT, TPOT, throughput, memory, breakdown."""
    from dse.catalog.coefficients import coefficient_set
    from dse.space.cases import estimate_cases

    _compile_cache()
    result = estimate_cases(_read_csv(cases), coefficient_set(coefficients))
    _write_csv(result, out)
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

    _compile_cache()
    result = audit(load_plan(plan))
    if out is not None:
        atomic_write(out, report.html(result))
    if json:
        typer.echo(report.to_json(result))
    else:
        Console(width=_width()).print(report.render(result))


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

    _compile_cache()
    result = run(method, _read_csv(cases), lambda name: to_architecture(model(name)))
    _write_csv(result, out, digits=15)  # closed forms are held to nine digits and more
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

    _compile_cache()
    table = placement_table(mean_isl, mean_osl, gpus, ttft_ms, tpot_ms)
    if out is not None:
        _write_csv(table, out)
    _table("placements by requests/s a GPU", _dicts(table), False)


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

    _compile_cache()
    output_directory(out)
    result = run(_read_csv(cases), coefficient_set(coefficients))
    written = write_comparison(result, out)
    Console(width=_width()).print(render(result))
    typer.echo(f"written: {', '.join(str(path) for path in written)}")


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

    _compile_cache()
    table = pd.concat([_read_csv(path) for path in observations], ignore_index=True)
    result = run(table, name=out.stem, source=", ".join(path.name for path in observations))
    atomic_write(out, to_yaml(result.set))
    about = result.set.about
    typer.echo(f"{out}: {about['rows']} rows fitted in {result.fitted.seconds:.0f} s, {about['refused']} refused")
    for metric, error in about["error_in_sample"].items():
        typer.echo(f"in-sample error of {metric}: mean {error['mean']:.1%}, median {error['median']:.1%}")
    _refusals(result.refused)


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

    _compile_cache()
    table = pd.concat([_read_csv(path) for path in observations], ignore_index=True)
    result = run(table, seed)
    _table("errors on rows the fit never saw", _dicts(result.table), False)
    first = next(iter(result.rows.values()))
    wrong = worst(first)
    typer.echo(f"{len(wrong)} of {len(first)} rows of unseen series are off by more than a factor of two in TPOT")
    _refusals(result.refused)
    if out is not None:
        _write_csv(pd.concat([rows.assign(split=name) for name, rows in result.rows.items()]), out)


@app.command()
def models(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the catalogued models."""
    from dse.catalog.models import models as all_models
    from dse.catalog.models import parameter_count

    rows = []
    for entry in all_models().values():
        count = parameter_count(entry)
        rows.append(
            {
                "model": entry.name,
                "total_b": round(count.total / 1e9, 2),
                "active_b": round(count.active / 1e9, 2),
                "layers": entry.layers,
                "weights": entry.native_weights,
                "context": entry.max_context,
            }
        )
    _table("models", rows, json)


@app.command()
def gpus(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the catalogued GPUs and the cluster that each is usually in."""
    from dse.catalog.hardware import gpus as all_gpus

    rows = [
        {
            "gpu": entry.name,
            "bf16_tflops": entry.peak_bf16_tflops.value,
            "fp8_tflops": entry.peak_fp8_tflops.value,
            "fp4_tflops": entry.peak_fp4_tflops.value,
            "hbm_gb_s": entry.hbm_gb_s.value,
            "capacity_gib": entry.capacity_gib.value,
            "usd_hour": entry.price_usd_hour.value,
            "cluster": entry.default_cluster,
        }
        for entry in all_gpus()
    ]
    _table("GPUs (dense peaks; 0: no such unit)", rows, json)


@app.command()
def clusters(json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """List the catalogued clusters, innermost network level first."""
    from dse.catalog.hardware import clusters as all_clusters

    rows = [
        {
            "cluster": entry.name,
            "levels": " > ".join(f"{x.size.value:g} x {x.bandwidth_gb_s.value:g} GB/s" for x in entry.levels),
        }
        for entry in all_clusters()
    ]
    _table("clusters (units x bandwidth a GPU a direction)", rows, json)


@app.command(name="import-model")
def import_model(
    config: Annotated[Path, typer.Argument(help="A Hugging Face config.json.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="YAML file to write (default: print).")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the entry (default: the file's).")] = None,
) -> None:
    """Turn a Hugging Face config.json into a catalogue entry."""
    from dse.catalog.model_schema import dump
    from dse.catalog.models import load_model_file, parameter_count
    from dse.files import atomic_write

    entry = load_model_file(config)
    if name:
        entry = entry.model_copy(update={"name": name})
    text = dump(entry)
    if out is None:
        typer.echo(text, nl=False)
        return
    atomic_write(out, text)
    count = parameter_count(entry)
    typer.echo(f"{out}: {entry.name}, {count.total / 1e9:.2f}B parameters, {count.active / 1e9:.2f}B active a token")


# ------------------------------------------------------------------------------------------------ helpers


def _compile_cache() -> None:
    """Compiled programs are kept between runs (XLA persistent cache), in the user's cache directory."""
    import os

    import jax

    root = os.environ.get("DSE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dse" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(root))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
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


def _read_csv(path: Path) -> pd.DataFrame:
    """A table as text cells; one message where the file itself is unusable."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=True)
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; give a CSV file") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as CSV ({reason})") from None
    if table.columns.has_duplicates:
        raise InputError(f"{path}: column {table.columns[table.columns.duplicated()][0]!r} stands twice; keep one")
    return table


def _dicts(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]


def _refusals(refused: Any) -> None:
    """Rows that could not serve the fit, counted by reason: listed, never dropped silently."""
    reasons: dict[str, int] = {}
    for refusal in refused:
        reasons[refusal.reason] = reasons.get(refusal.reason, 0) + 1
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        typer.echo(f"refused {count} rows: {reason}")


def _write_csv(table: pd.DataFrame, path: Path, digits: int = 9) -> None:
    from dse.files import atomic_write

    atomic_write(path, table.to_csv(index=False, float_format=f"%.{digits}g"))


def _width() -> int | None:
    """Of the terminal; 120 columns where the output goes elsewhere."""
    return None if sys.stdout.isatty() else 120


def _table(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
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


def main() -> None:
    """Run a command; a known error is one message on standard error and an exit code, never a traceback."""
    try:
        app()
    except NothingFeasible as error:
        typer.echo(f"dse: {error}", err=True)
        sys.exit(NOTHING_FEASIBLE)
    except DseError as error:
        typer.echo(f"dse: {error}", err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
