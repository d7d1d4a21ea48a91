"""Numbers, units, lists and ranges as a person may write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dse.space import parse_space, values
from dse.space.metrics import METRICS

GOOD: dict[str, Any] = {"models": ["Llama-3.1-8B"], "clusters": ["h100"], "gpus": 8, "workloads": {"isl": 1, "osl": 1}}


@pytest.mark.parametrize(
    ("written", "unit", "meant"),
    [
        (2000, "ms", 2000.0),
        ("2 s", "ms", 2000.0),
        ("2s", "ms", 2000.0),
        ("500 ms", "ms", 500.0),
        ("1e3 us", "ms", 1.0),
        ("80 GiB", "GiB", 80.0),
        ("80 GB", "GiB", 80e9 / 2**30),
        ("100 tokens/ms", "tokens/s", 1e5),
        ("90 %", "fraction", 0.9),
        ("1e5", "tokens/s", 1e5),  # YAML reads 1e5 as text
        ("1_000", "", 1000.0),
        ("0.5 USD", "USD", 0.5),
    ],
)
def test_units(written: Any, unit: str, meant: float) -> None:
    assert values.number(written, unit) == pytest.approx(meant, rel=1e-15)


@pytest.mark.parametrize(
    "written", ["", " ", "s", "2 2", "2..5", "--2", "nan", "inf", "1e999", float("nan"), None, [], True]
)
def test_what_is_no_number(written: Any) -> None:
    with pytest.raises(ValueError, match="allowed"):
        values.number(written, "ms")


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_a_plain_refusal(text: str) -> None:
    outcome = "allowed"
    try:
        assert values.number(text, "ms") >= 0
    except ValueError as error:
        outcome = str(error)
    assert "allowed" in outcome


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (8, (8,)),
        ([4, 2, 1], (4, 2, 1)),
        ({"min": 1, "max": 16}, (1, 2, 4, 8, 16)),
        ({"min": 3, "max": 20}, (4, 8, 16)),
        ({"min": 2, "max": 10, "step": 3}, (2, 5, 8)),
        ({"min": 3, "max": 30, "factor": 3}, (3, 9, 27)),
        ({"min": 1, "max": 8, "factor": 1.5}, (1, 2, 3, 5, 8)),
    ],
)
def test_lists_and_ranges(written: Any, meant: tuple[int, ...]) -> None:
    assert values.numbers(written, values.integer) == meant


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(1, 10**4))
def test_stepped_ranges_are_pythons(low: int, more: int, step: int) -> None:
    if more // step < values.MOST_VALUES:
        spec = {"min": low, "max": low + more, "step": step}
        assert values.numbers(spec, values.integer) == tuple(range(low, low + more + 1, step))


@given(st.integers(1, 1000), st.integers(0, 10**6), st.floats(1.01, 4))
def test_scaled_ranges_rise_within_their_bounds(low: int, more: int, factor: float) -> None:
    found = values.numbers({"min": low, "max": low + more, "factor": factor}, values.integer)
    assert found[0] == low
    assert list(found) == sorted(set(found))
    assert found[-1] <= low + more


def test_ranges_of_fractions_end_where_they_should() -> None:
    spec = parse_space({**GOOD, "axes": {"utilisation": {"min": 0.7, "max": 0.9, "step": 0.05}}})
    assert spec.axes.utilisation == (0.7, 0.75, 0.8, 0.85, 0.9)


def test_aliases_and_defaults() -> None:
    spec = parse_space({**GOOD, "axes": {"mtp": [0, 1], "moe_ep": 2, "replicas": 4, "weights": ["FP16", "nvfp4"]}})
    assert (spec.axes.draft_tokens, spec.axes.ep, spec.axes.dp) == ((0, 1), (2,), (4,))
    assert spec.axes.weights == ("bf16", "fp4")
    assert (spec.axes.tp, spec.axes.pp, spec.axes.kv) == ("auto", (1,), ("auto",))
    assert spec.objectives == (("output_tok_s_gpu", "max"), ("tpot_ms", "min"))


def test_every_metric_takes_a_bound_in_its_unit() -> None:
    spec = parse_space({**GOOD, "constraints": {name: {"max": 5} for name in METRICS}})
    assert {name: bound.max for name, bound in spec.constraints.items()} == dict.fromkeys(METRICS, 5.0)
    assert set(dict(spec.objectives)) <= set(METRICS)


def test_objectives_keep_their_order() -> None:
    written = {"usd_per_mtok": "minimise", "tok_s_user": "max", "gpus": "MIN"}
    spec = parse_space({**GOOD, "objectives": written})
    assert spec.objectives == (("usd_per_mtok", "min"), ("tok_s_user", "max"), ("gpus", "min"))


def test_where_is_not_a_key_of_the_file() -> None:
    assert parse_space(GOOD, "a.yaml").where == "a.yaml"
