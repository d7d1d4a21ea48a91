"""Gradients of every output by every continuous input: finite everywhere, and equal to finite differences.

Derivatives are taken op by op (not compiled): tracing 80 directions through one program takes XLA minutes.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from conftest import Columns, columns
from scenarios import with_priorities

from dse.cost.evaluate import Scenario, estimate, estimate_one
from dse.cost.types import replace, stack

LOAD = ("isl", "osl", "concurrency", "chunk", "prefix_hit", "acceptance", "waves")
SAMPLE = slice(0, 25)
STEP = 3e-6  # of the input
OF_ORDER_ONE = ("load.prefix_hit", "load.acceptance")  # may be 0: an absolute step
# Two steps of these sizes see a kink between them, or a curvature too great for the difference to be exact.
AGREE = 1e-5
STRAIGHT = 2e-5
FLOOR = 1e-8  # of the output per unit of the input's logarithm: what float64 leaves of a difference


def inputs(x: Scenario) -> dict[str, Any]:
    """Every continuous input by name."""
    named = {f"device.{k}": v for k, v in vars(x.device).items()}
    for i, level in enumerate(x.topology.levels):
        named |= {f"level{i}.{k}": getattr(level, k) for k in ("bandwidth", "latency", "oversubscription")}
    named |= {f"load.{k}": getattr(x.load, k) for k in LOAD}
    return named | {f"coefficients.{k}": v for k, v in vars(x.coefficients).items() if v is not None}


def with_inputs(x: Scenario, named: dict[str, Any]) -> Scenario:
    """The scenario with these in place of its own."""

    def of(part: str) -> dict[str, Any]:
        return {k.removeprefix(f"{part}."): v for k, v in named.items() if k.startswith(f"{part}.")}

    levels = tuple(replace(level, **of(f"level{i}")) for i, level in enumerate(x.topology.levels))
    return replace(
        x,
        device=replace(x.device, **of("device")),
        topology=replace(x.topology, levels=levels),
        load=replace(x.load, **of("load")),
        coefficients=replace(x.coefficients, **of("coefficients")),
    )


def outputs(named: dict[str, Any], x: Scenario) -> dict[str, Any]:
    return columns(estimate_one(with_inputs(x, named)))


def gradients(scenarios: list[Scenario], derive: Any) -> dict[str, dict[str, np.ndarray]]:
    """By output, then by input."""
    rows = jax.vmap(lambda x: derive(outputs)(inputs(x), x))(stack(scenarios))
    return {name: {k: np.asarray(v) for k, v in row.items()} for name, row in rows.items()}


def varied(scenarios: list[Scenario], how: str) -> list[Scenario]:
    """As they are, with rounded corners, or of engines that let prompts go first."""
    if how == "rounded":
        return [replace(x, coefficients=replace(x.coefficients, rounding=0.1)) for x in scenarios]
    return with_priorities(scenarios) if how == "prompts first" else scenarios


def assert_finite(found: dict[str, dict[str, np.ndarray]]) -> None:
    bad = [
        f"d {name} / d {by}: scenarios {np.flatnonzero(~np.isfinite(values))[:5]}"
        for name, row in found.items()
        for by, values in row.items()
        if not np.isfinite(values).all()
    ]
    assert not bad, "\n".join(bad[:20])


def priced(batches: list[Scenario], size: int) -> list[Columns]:
    """Batches of equal length, priced `size` rows at a time so that nothing is compiled for them."""
    rows = len(batches[0].load.isl)
    group = size // rows
    found = []
    for i in range(0, len(batches), group):
        part = batches[i : i + group]
        joined = jax.tree.map(lambda *leaves: np.resize(np.concatenate(leaves), size), *part)
        got = columns(jax.tree.map(np.asarray, estimate(joined)))
        found += [{k: v[j * rows : (j + 1) * rows] for k, v in got.items()} for j in range(len(part))]
    return found


def scale_name(name: str, here: Columns) -> str:
    """A part of a step, or a difference, has the rounding of the whole."""
    total = f"{'.'.join(name.split('.')[:2])}.total"
    if total in here and not name.endswith(".tokens"):
        return total
    return "ttft" if name == "served.queue" else name


@pytest.mark.parametrize("how", ["plain", "rounded", "prompts first"])
def test_forward_gradients_are_finite_and_equal_finite_differences(random_batch: list[Scenario], how: str) -> None:
    scenarios = varied(random_batch, how)
    with jax.enable_x64(True):
        found = gradients(scenarios, jax.jacfwd)
        assert_finite(found)
        sample = stack(scenarios[SAMPLE])
        named = inputs(sample)
        steps = {k: np.where((k in OF_ORDER_ONE) & (v == 0), STEP, STEP * np.abs(v)) for k, v in named.items()}
        moved = [with_inputs(sample, named | {k: named[k] + sign * steps[k]}) for k in named for sign in (1, -1)]
        here, *there = priced([sample, *moved], len(random_batch))

    compared, skipped, wrong = 0, 0, []
    for i, k in enumerate(named):
        step = np.where(steps[k] > 0, steps[k], 1.0)
        up, down = there[2 * i], there[2 * i + 1]
        for name, exact in found.items():
            right, left = (up[name] - here[name]) / step, (here[name] - down[name]) / step
            central, exactly = (right + left) / 2, exact[k][SAMPLE]
            size = np.abs(here[scale_name(name, here)])
            floor = FLOOR * size * STEP / step
            scale = np.maximum(np.abs(right), np.abs(left))
            usable = (steps[k] > 0) & (np.abs(right - left) <= STRAIGHT * scale + floor)
            error = np.abs(central - exactly) - AGREE * np.maximum(scale, np.abs(exactly)) - floor
            compared, skipped = compared + usable.sum(), skipped + ((steps[k] > 0) & ~usable).sum()
            wrong += [(name, k, int(j), exactly[j], central[j]) for j in np.flatnonzero(usable & (error > 0))]
    assert not wrong, f"{len(wrong)} of {compared}: " + "\n".join(map(str, wrong[:20]))
    assert skipped < 0.1 * compared, (skipped, compared)


@pytest.mark.parametrize("how", ["plain", "rounded", "prompts first"])
def test_reverse_gradients_are_finite_in_single(random_batch: list[Scenario], how: str) -> None:
    assert_finite(gradients(varied(random_batch[:100], how), jax.jacrev))
