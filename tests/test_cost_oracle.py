"""The model against a plain-Python scalar oracle, over random scenarios of the whole feature space."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Columns, columns, in_double
from oracle import names, price, rhythm
from scenarios import (
    ABSENT_CORE,
    ABSENT_INDEXER,
    ABSENT_ROUTED,
    ABSENT_STATE,
    as_dict,
    random_scenarios,
    with_priorities,
)

from dse.cost.evaluate import Scenario, estimate_one
from dse.cost.serving import accepted_tokens
from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS, replace

# Parts of a step are held to the step's total: one that is far below the sum has the sum's rounding.
STEPS = tuple(f"served.{step}." for step in ("decode", "mixed", "prefill"))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    result: dict[str, float] = {}
    for key, value in tree.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def expect(scenarios: list[Scenario]) -> Columns:
    rows = [flat(price(as_dict(x))) for x in scenarios]
    rows = [{name: value for name, value in row.items() if not name.endswith(".body")} for row in rows]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def expected(random_batch: list[Scenario]) -> Columns:
    return expect(random_batch)


def scale_of(name: str, wanted: Columns) -> np.ndarray:
    """What an error is relative to."""
    step = next((s for s in STEPS if name.startswith(s) and not name.endswith(".tokens")), None)
    if step is not None:
        return wanted[f"{step}total"]
    if name == "served.queue":  # a difference of two waits
        return wanted["ttft"]
    return np.where(wanted[name] == 0, 1.0, np.abs(wanted[name]))


def assert_close(got: Columns, wanted: Columns, tolerance: float) -> None:
    assert set(got) == set(wanted)
    for name, values in wanted.items():
        error = np.abs(got[name] - values) / scale_of(name, wanted)
        worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
        assert error[worst] <= tolerance, f"{name}: scenario {worst}: {got[name][worst]!r} for {values[worst]!r}"


def test_agrees_in_double(double: Columns, expected: Columns) -> None:
    assert_close(double, expected, 1e-10)


def test_prompts_that_go_first_agree(random_batch: list[Scenario]) -> None:
    """Prompts in steps of their own never, always or at times: one more step in the program."""
    first = with_priorities(random_batch)
    assert {x.coefficients.prefill_priority for x in first} > {0.0, 1.0}
    assert_close(columns(in_double(first)), expect(first), 1e-10)


def test_agrees_in_single(single: Columns, expected: Columns, random_batch: list[Scenario]) -> None:
    """1e-5, but where the inputs themselves say less: requests that fit (or do not) as a small difference of large
    sizes, `usable - weights - ...` over one request's KV, and a prefill slot that is all but saturated, 1 / (1 - rho).
    There, as many digits as the difference leaves.
    """
    assert single["ttft"].dtype == np.float32
    loops = [rhythm(names(as_dict(x)), fits) for x, fits in zip(random_batch, expected["memory.requests"])]
    asked = np.array([loop.asked for loop in loops])
    slack = np.array([1.0 - loop.arriving / loop.budget for loop in loops])
    fixed = sum(expected[f"memory.{name}"] for name in ("weights", "activations", "buffers", "reserve"))
    one, usable = expected["memory.kv_request"], expected["memory.usable"]
    fits = (usable - fixed) / one
    lost = usable / one / np.minimum(np.abs(fits), np.where(fits < asked, np.abs(asked - fits), np.inf))
    sound = (lost < 50) & (np.abs(slack) > 0.02)
    assert sound.mean() > 0.8
    assert_close({k: v[sound] for k, v in single.items()}, {k: v[sound] for k, v in expected.items()}, 1e-5)
    assert_close({k: v[~sound] for k, v in single.items()}, {k: v[~sound] for k, v in expected.items()}, 1e-3)


def test_everything_is_finite_and_rightly_signed(double: Columns, single: Columns) -> None:
    for got, slack in ((double, 1e-12), (single, 1e-5)):
        for name, values in got.items():
            assert np.isfinite(values).all(), name
            floor = -slack * got[f"{name.rsplit('.', 1)[0]}.total"] if name.startswith(STEPS) else 0.0
            # overlap may cost more than it saves (two_batch, SMs taken): `hidden` has either sign
            assert name.endswith("hidden") or (values >= floor).all(), name


def test_the_scenarios_cover_the_feature_space(random_batch: list[Scenario], double: Columns) -> None:
    def seen(values: Any) -> set[float]:
        return set(Counter(float(v) for v in values))

    plans = [x.plan for x in random_batch]
    cores = [m.core for x in random_batch for m in x.architecture.mixers if m.count > 0]
    assert seen(p.overlap_prefill for p in plans) == seen(p.overlap_decode for p in plans) == set(range(len(OVERLAPS)))
    assert seen(p.cp_method for p in plans if p.cp > 1) == set(range(len(CP_METHODS)))
    assert seen(p.dispatch for p in plans if p.moe_ep > 1 and p.attention_dp > 1) == set(range(len(DISPATCHES)))
    for name in ("mixer_rate", "ffn_rate", "expert_rate"):
        assert seen(getattr(p.precision, name) for p in plans) == {0.0, 1.0, 2.0, 3.0}
    assert any(p.tp > c.kv_heads > 1 for p, x in zip(plans, random_batch) for c in (x.architecture.mixers[0].core,))
    assert any(p.moe_ep > 1 and p.moe_tp > 1 for p in plans)
    assert any(p.pp > 1 and p.microbatches > p.pp for p in plans)
    assert any(c.ratio == 0 and c.window_fill < 1 for c in cores)
    assert any(0 < c.ratio < 1 for c in cores)
    assert any(c.rematerialise > 0 and c.top_k < 1e6 for c in cores)
    assert any(c.heads == 0 for c in cores)
    assert {sum(level.size > 1 for level in x.topology.levels) for x in random_batch} >= {1, 2, 3}
    starved = double["memory.requests"] < [x.load.concurrency / x.plan.attention_dp for x in random_batch]
    assert 0.1 < starved.mean() < 0.9
    assert (double["memory.requests"] == 0).any()


def test_accepted_tokens_is_the_sum_of_powers() -> None:
    with jax.enable_x64(True):
        for draft in range(5):
            for chance in (0.0, 0.3, 0.9, 0.999):
                assert accepted_tokens(float(draft), chance) == pytest.approx(sum(chance**i for i in range(draft + 1)))
            assert accepted_tokens(float(draft), 1.0) == pytest.approx(draft + 1, rel=1e-4)


# ---------------------------------------------------------------- optional parts: absent is the same as neutral


def bare(x: Scenario) -> Scenario:
    """The scenario without its neutral parts: None, shorter tuples, fewer levels."""
    arch, plan, load = x.architecture, x.plan, x.load
    mixers = tuple(
        replace(
            m,
            gemms=tuple(g for g in m.gemms if g.k > 0),
            core=None if m.core == ABSENT_CORE else m.core,
            indexer=None if m.indexer == ABSENT_INDEXER else m.indexer,
            state=None if m.state == ABSENT_STATE else m.state,
        )
        for m in arch.mixers
        if m.count > 0
    )
    ffns = tuple(replace(f, routed=None if f.routed == ABSENT_ROUTED else f.routed) for f in arch.ffns if f.count > 0)
    depth = max(i for i, level in enumerate(x.topology.levels) if level.size > 1 or i == 0) + 1
    return replace(
        x,
        architecture=replace(arch, mixers=mixers, ffns=ffns),
        topology=replace(x.topology, levels=x.topology.levels[:depth]),
        plan=replace(
            plan,
            sequence_parallel=plan.sequence_parallel or None,
            cp_method=None if plan.cp == 1 else plan.cp_method,
            dispatch=plan.dispatch or None,
        ),
        load=replace(load, draft_tokens=load.draft_tokens or None, static_batch=load.static_batch or None),
    )


def test_absent_parts_equal_neutral_numbers() -> None:
    scenarios = random_scenarios(12, seed=7)
    padded = columns(in_double(scenarios))
    with jax.enable_x64(True):
        for i, x in enumerate(scenarios):
            one = columns(estimate_one(jax.tree.map(float, bare(x))))
            for name, values in padded.items():
                assert np.abs(one[name] - values[i]) <= 1e-12 * scale_of(name, padded)[i], (name, i)


def test_rounding_of_nought_is_the_hard_corner(random_batch: list[Scenario], double: Columns) -> None:
    sharp = [replace(x, coefficients=replace(x.coefficients, rounding=0.0)) for x in random_batch]
    for name, values in columns(in_double(sharp)).items():
        np.testing.assert_allclose(values, double[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_a_rounded_corner_agrees_with_the_oracle(random_batch: list[Scenario]) -> None:
    smooth = [replace(x, coefficients=replace(x.coefficients, rounding=0.1)) for x in random_batch]
    assert_close(columns(in_double(smooth)), expect(smooth), 1e-9)
