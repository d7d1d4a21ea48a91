"""Coefficient sets: levels pool, files round-trip, what is said of an engine goes before its defaults."""

from dataclasses import replace

import numpy as np
import pytest

from dse.calibrate.parameters import FREE, Layout
from dse.calibrate.run import to_yaml
from dse.catalog.coefficients import LEVELS, CoefficientSet, coefficient_set, read, shipped, version_key


def test_a_set_round_trips_and_pools():
    layout = Layout.of(
        [
            {"generation": ["hopper"], "gpu": ["h100"], "engine": ["vllm", ""], "version": ["vllm 0.15.1", ""]}
            | {"model": ["Llama-2-70B", ""], "deployment": ["vllm 0.15.1 Llama-2-70B h100", ""]}
        ]
    )
    assert layout.size == len(FREE) * 7
    theta = layout.centre() + np.linspace(-0.1, 0.1, layout.size)
    chosen = layout.to_set(theta, "x", {"rows": 1})
    again = read("x", "x.yaml", to_yaml(chosen))
    assert again.base == dict(chosen.base)
    case = ("hopper", "h100", "vllm", "vllm 0.15.1", "Llama-2-70B", "vllm 0.15.1 Llama-2-70B h100")
    assert again.of(*case) == chosen.of(*case)
    assert len({again.of(*case[:levels]) for levels in range(len(case) + 1)}) == 7
    assert again.of("blackwell", "b200", "new-engine") == again.of()
    assert again.known(generation="hopper", gpu="h100", engine="sglang") == "x: hopper, h100"
    known = again.known(**dict(zip(LEVELS, case, strict=True)))
    assert known == "x: hopper, h100, vllm, vllm 0.15.1, Llama-2-70B, vllm 0.15.1 Llama-2-70B h100"


def test_what_a_set_says_of_an_engine_goes_before_the_engines_defaults():
    """Published kernels of TensorRT-LLM on Blackwell stand in for a pooled base, not for what is said of the engine."""
    keys = ("blackwell", "b200", "trtllm")
    pooled = CoefficientSet("pooled", base={"link_dispatch": 0.6}, factors={"gpu": {"b200": {"link_dispatch": 1.1}}})
    assert pooled.of(*keys).link_dispatch == CoefficientSet("physics").of(*keys).link_dispatch == 0.8
    assert pooled.of("blackwell", "b200", "vllm").link_dispatch == pytest.approx(0.66)
    own = replace(pooled, factors={"engine": {"trtllm": {"link_dispatch": 1.2}}})
    assert own.of(*keys).link_dispatch == pytest.approx(0.72)
    by_hand = CoefficientSet("mine", base={"link_dispatch": 0.5, "transfer_base": 0.02})
    assert (by_hand.of(*keys).link_dispatch, by_hand.of(*keys).transfer_base) == (0.5, 0.02)
    assert pooled.of(*keys).transfer_base == 0.1


@pytest.mark.parametrize(
    ("engine", "version", "key"),
    [
        ("vllm", "0.15.1", "vllm 0.15.1"),
        ("sglang", "v0.5.9.post2", "sglang 0.5.9"),
        ("vllm", "0.15", "vllm 0.15.0"),
        ("trtllm", "1.0.0rc3", "trtllm 1.0.0"),
        ("vllm", "nightly-5b8", ""),
        ("", "1.2", ""),
    ],
)
def test_versions_are_keys_by_three_numbers(engine, version, key):
    assert version_key(engine, version) == key


def test_shipped_sets_say_where_they_are_from():
    assert "measured" in shipped()
    best = coefficient_set()
    assert best.name == "measured"
    assert {"date", "data", "rows", "error_in_sample"} <= set(best.about)
    for level, table in best.factors.items():
        assert level in LEVELS
        found = [(name, f) for values in table.values() for name, f in values.items()]
        assert all(0.05 < f < 20 for name, f in found if name != "idle_seats")  # which is none or one
