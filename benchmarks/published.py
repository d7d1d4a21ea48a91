"""How fast the published closed forms are, and how DistServe's optimum moves with the lengths assumed.

`python benchmarks/published.py`: one line a method. Float32, four CPU devices with a shard of the rows each, compile
time apart; the answers of every timed batch are checked against float64 on a sample.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

CORES = 4
jax.config.update("jax_num_cpu_devices", CORES)

from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from dse.published import corrected_roofline as cr  # noqa: E402
from dse.published import distserve as ds  # noqa: E402
from dse.published import modelmeter as mm  # noqa: E402
from dse.published import placement as pl  # noqa: E402
from dse.published import shallowsim as ss  # noqa: E402
from dse.published.shallowsim_gpus import GPUS  # noqa: E402

ROWS = 2**20
CHUNK = 2**12
REPEATS = 5
TARGET = 5e6  # rows/s


def _batch(rng: np.random.Generator, tree: Any) -> Any:
    """Every leaf a column of ROWS numbers: a range (low, high), a list to choose from, or a number."""

    def column(leaf: Any) -> np.ndarray:
        if isinstance(leaf, tuple):
            return rng.uniform(*leaf, ROWS)
        if isinstance(leaf, list):
            return rng.choice(np.array(leaf, float), ROWS)
        return np.full(ROWS, float(leaf))

    return jax.tree.map(column, tree, is_leaf=lambda leaf: isinstance(leaf, (tuple, list)))


def cases(rng: np.random.Generator) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Method -> one row's function (all its columns) and its batch."""
    which = rng.integers(0, len(GPUS), ROWS)
    gpus = jax.tree.map(lambda *leaves: np.array(leaves, float)[which], *GPUS.values())
    degrees = [1.0, 2.0, 4.0, 8.0]
    prompt = _batch(
        rng,
        ss.PrefillCase(seq_len=(100, 60000), kv_cache_rate=(0, 1), tp=degrees, dp=degrees),  # type: ignore[arg-type]
    )
    step = _batch(
        rng,
        ss.DecodeCase(
            seq_len=(100, 60000),  # type: ignore[arg-type]
            decode_len=(1, 4000),  # type: ignore[arg-type]
            BatchSize=(1, 1000),  # type: ignore[arg-type]
            TP=degrees,
            EP=[8.0, 16.0, 36.0, 72.0, 144.0, 320.0],
        ),
    )
    model = _batch(rng, mm.Case(seq_len=(1000, 1e6), batch=(1, 512), devices=[8.0, 64.0, 256.0]))  # type: ignore[arg-type]
    machine = _batch(rng, mm.Machine(tensor=(300, 4000), cuda=67, io=(2, 8), p2p=(50, 900), bisection=(100, 9000)))  # type: ignore[arg-type]
    shapes = jax.tree.map(lambda *leaves: np.array(leaves, float)[which % len(cr.SHAPES)], *cr.SHAPES.values())
    mixed = cr.step_of(*(_batch(rng, bounds) for bounds in ((0, 4), (1, 4096), (0, 9000), (0, 256), (1, 9000))))
    fitted = _batch(rng, cr.Beta())
    peak = _batch(rng, cr.Peak(flops=(3e14, 2e15), bandwidth=(2e12, 8e12)))  # type: ignore[arg-type]
    pair = _batch(
        rng,
        ds.Case(
            tp_prefill=[1.0, 2.0, 4.0],
            pp_prefill=degrees,
            tp_decode=[1.0, 2.0, 4.0],
            pp_decode=degrees,
            isl=(10, 2000),  # type: ignore[arg-type]
            osl=(1, 1000),  # type: ignore[arg-type]
            rate=(0, 5),  # type: ignore[arg-type]
        ),
    )
    return {
        "shallowsim prefill": (ss.prefill_one, (gpus, prompt)),
        "shallowsim decode": (ss.decode_one, (gpus, step)),
        "modelmeter dp_ep": (mm.dp_ep, (model, machine)),
        "modelmeter sp_ep": (mm.sp_ep, (model, machine)),
        "corrected roofline": (
            _roofline_row,
            (shapes, _batch(rng, degrees), peak, mixed, fitted),
        ),
        "distserve": (ds.serve_one, (pair,)),
    }


def _roofline_row(shape: cr.Shape, tp: Any, peak: cr.Peak, step: cr.Step, beta: cr.Beta) -> Any:
    features = cr.features_one(shape, tp, peak, step)
    return features, cr.step_time(features, beta)


def _filled(tree: Any) -> Any:
    """Constant costs (a strategy that does not communicate) as columns too; flags as numbers."""
    return jax.tree.map(lambda leaf: jax.numpy.broadcast_to(leaf, (CHUNK,)).astype(float), tree)


def measure(one: Callable[..., Any], batch: tuple[Any, ...]) -> tuple[float, float, float]:
    """Rows/s (best of REPEATS), seconds of the first call, and the worst relative error of a sample."""
    mesh = Mesh(np.array(jax.devices("cpu")[:CORES]), ("rows",))
    spec = PartitionSpec("rows")

    def shard(*trees: Any) -> Any:
        blocks = jax.tree.map(lambda leaf: leaf.reshape(-1, CHUNK), trees)
        results = jax.lax.map(lambda block: _filled(jax.vmap(one)(*block)), blocks)
        return jax.tree.map(lambda leaf: leaf.reshape(-1), results)

    function = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec))
    placed = jax.device_put(jax.tree.map(np.float32, batch), NamedSharding(mesh, spec))
    start = time.perf_counter()
    jax.block_until_ready(function(*placed))
    first = time.perf_counter() - start
    best, result = np.inf, None
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*placed))
        best = min(best, time.perf_counter() - start)
    index = np.linspace(0, ROWS - 1, 2048).astype(int)
    with jax.enable_x64(True):  # the same single-precision inputs, in double
        exact = jax.jit(jax.vmap(one))(*jax.tree.map(lambda leaf: np.float64(np.float32(leaf[index])), batch))
    errors = []
    for found, true in zip(jax.tree.leaves(result), jax.tree.leaves(exact), strict=True):
        single, double = np.asarray(found, float)[index], np.asarray(true, float)
        assert np.array_equal(np.isfinite(single), np.isfinite(double)), "single and double precision disagree"
        finite = np.isfinite(double)
        errors.append(np.abs(single[finite] - double[finite]) / np.maximum(np.abs(double[finite]), 1e-9))
    return ROWS / best, first, float(np.quantile(np.concatenate(errors), 0.99))


def optimum() -> None:
    """DistServe's OPT-13B on 4 A100, TTFT 200 ms, TPOT 100 ms, P90: the authors' lengths, and lognormal ones."""
    found = pl.placements(4)
    print(
        f"distserve placement: {len(found.gpus)} placements of up to 4 GPUs; published: prefill tp2 decode tp1 at 1.56"
    )
    start, searches = time.perf_counter(), 0
    traces = {"the authors' ShareGPT, 10,000 requests": pl.sharegpt(10_000), "the same, 300": pl.sharegpt(300)}
    for mean_in, mean_out, cv in (
        *((160, 180, 1.0), (200, 250, 1.0), (220, 330, 1.0), (220, 330, 2.0), (400, 250, 1.0)),
        *((600, 200, 1.0), (750, 200, 0.6), (750, 200, 1.0), (900, 200, 1.0), (1100, 200, 1.0)),
    ):
        traces[f"lognormal {mean_in} in (cv {cv:g}), {mean_out} out"] = pl.sharegpt_like(mean_in, mean_out, cv_in=cv)
    for name, trace in traces.items():
        good = pl.goodput(found, trace, pl.Target())
        i = pl.best(found, good)
        searches += 1
        print(
            f"  {name}; sampled means {trace.isl.mean():.0f}/"
            f"{trace.osl.mean():.0f}, P90 in {np.quantile(trace.isl, 0.9):.0f}: prefill tp{found.tp_prefill[i]:g} "
            f"pp{found.pp_prefill[i]:g}, decode tp{found.tp_decode[i]:g} pp{found.pp_decode[i]:g}, "
            f"{good.per_gpu[i]:.2f} req/s/GPU"
        )
    print(f"  {searches} searches in {time.perf_counter() - start:.2f} s, compilation included")


def main() -> int:
    print(
        f"{ROWS} rows, float32, {CORES} cores, chunks of {CHUNK}; all columns; error: 99th percentile against float64"
    )
    slow = []
    for name, (one, batch) in cases(np.random.default_rng(0)).items():
        rate, first, error = measure(one, batch)
        print(f"{name:20s} {rate / 1e6:8.1f} M rows/s   first call {first:5.2f} s   error {error:.1e}")
        if rate < TARGET or error > 1e-3:
            slow.append(name)
    optimum()
    if slow:
        print(f"below {TARGET / 1e6:g} M rows/s or inexact: {', '.join(slow)}")
    return int(bool(slow))


if __name__ == "__main__":
    sys.exit(main())
