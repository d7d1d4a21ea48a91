"""Commands on the catalogue: models, GPUs, clusters, imports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dse.cli.console import app, show_table


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
    show_table("models", rows, json)


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
    show_table("GPUs (dense peaks; 0: no such unit)", rows, json)


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
    show_table("clusters (units x bandwidth a GPU a direction)", rows, json)


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
