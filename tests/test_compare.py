"""The published methods and the project's model on the same cases; one bandwidth against a network of levels."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from dse.audit.compare import OWN, Comparison, compare
from dse.catalog.coefficients import coefficient_set
from dse.errors import InputError
from dse.published.tables import published
from dse.report.compare import OUTPUTS, bars_figure, html, networks_figure, render, write_comparison
from dse.space.cases import estimate_cases

CASES = pd.DataFrame(
    {
        "model": ["DeepSeek-R1", "OPT-13B", "nothing", "DeepSeek-V3", "Llama-3.1-70B"],
        "gpu": ["h200", "a100", "h200", "h100", "h200"],
        "isl": [4096, 512, 10, 2048, 2048],
        "tp": [4, 1, 1, 1, 8],
        "dp": [8, 1, 1, 16, 1],
        "batch": [64, 16, 1, 32, 4],
        "phase": ["", "", "", "decode", "prefill"],
    }
)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(CASES, coefficient_set("physics"))


def total(c: Comparison, case: int, phase: str, method: str) -> float:
    (found,) = (e for e in c.entries if (e.case, e.phase, e.method) == (case, phase, method))
    assert found.parts, found.reason
    assert all(seconds >= 0.0 for seconds in found.parts.values())
    return found.total


def test_methods_say_here_what_they_say_alone(comparison: Comparison) -> None:
    row = pd.DataFrame({"gpu": ["H200"], "seq_len": [4096], "decode_len": [0], "dp": [8], "tp": [4], "EP": [32]})
    row = row.assign(kv_cache_rate=0, BatchSize=64)
    for phase, column in (("prefill", "Sum"), ("decode", "TPOT")):
        alone = published(f"shallowsim-{phase}", row)[column][0]
        assert total(comparison, 0, phase, f"shallowsim-{phase}") * 1e3 == pytest.approx(alone)
    opt = published("distserve", pd.DataFrame({"isl": [512], "batch": [16], "context": [512]}))
    assert total(comparison, 1, "prefill", "distserve") * 1e3 == pytest.approx(opt["prefill_ms"][0])
    assert total(comparison, 1, "decode", "distserve") * 1e3 == pytest.approx(opt["decode_ms"][0])


def test_own_model_says_here_what_it_estimates(comparison: Comparison) -> None:
    """One request alone on a replica, one output token: the estimate's prefill step is the case's."""
    case = {"model": "Llama-3.1-70B", "gpu": "h200", "isl": 2048, "osl": 1, "tp": 8, "concurrency": 1}
    alone = estimate_cases(pd.DataFrame([case]), coefficient_set("physics"))
    assert total(comparison, 4, "prefill", OWN) * 1e3 == pytest.approx(alone["prefill_step_ms"][0], rel=1e-6)


def test_refused_methods_say_why(comparison: Comparison) -> None:
    why = {(e.case, e.phase, e.method): e.reason for e in comparison.entries if not e.parts}
    assert "outside the method" in why[1, "prefill", "shallowsim-prefill"]
    assert "OPT-13B only" in why[0, "prefill", "distserve"]
    assert "unknown model 'nothing'" in why[2, "decode", OWN]
    assert "unknown GPU 'h100'" in why[3, "decode", "shallowsim-decode"]
    assert {e.phase for e in comparison.entries if e.case == 3} == {"decode"}
    assert all(e.parts or e.reason for e in comparison.entries)


def test_differences_name_the_furthest_first_with_the_reason(comparison: Comparison) -> None:
    ratios = [max(d.ratio, 1.0 / d.ratio) for d in comparison.differences]
    assert ratios == sorted(ratios, reverse=True)
    roofline = next(d for d in comparison.differences if d.method == "corrected-roofline")
    assert "no expert parallelism" in roofline.text
    assert all(re.search(r"\): \w", d.text) for d in comparison.differences)  # each has a reason


def test_one_bandwidth_overstates_a_network_of_levels(comparison: Comparison) -> None:
    dp_ep, sp_ep = comparison.networks
    assert dp_ep.devices == sp_ep.devices == (8, 16, 32, 64, 128, 256)
    assert dp_ep.bandwidth_gbs[:2] == (450.0, 50.0)
    for curve in (dp_ep, sp_ep):
        assert all(a > b > 0 for a, b in zip(curve.collapsed_exchange, curve.hierarchical_exchange, strict=True))
    jump = dp_ep.collapsed_exchange[1] / dp_ep.collapsed_exchange[0]
    assert jump > 8.0 > dp_ep.hierarchical_exchange[1] / dp_ep.hierarchical_exchange[0]  # the cliff at the node


def test_table_and_files(comparison: Comparison, tmp_path: Path) -> None:
    paths = write_comparison(comparison, tmp_path / "out")
    assert [p.name for p in paths] == list(OUTPUTS)
    table = pd.read_csv(paths[0])
    assert len(table) == len(comparison.entries)
    parts = table.filter(regex="_ms$").drop(columns="total_ms")
    priced = table["total_ms"].notna()
    assert parts[priced].sum(axis=1).to_list() == pytest.approx(table["total_ms"][priced].to_list())
    assert (table["ratio"][table["method"].eq(OWN) & priced] == 1.0).all()
    assert len(pd.read_csv(paths[1])) == 12
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(OUTPUTS)


def test_page_and_figures(comparison: Comparison) -> None:
    page = html(comparison)
    (data,) = re.findall(r'id="figures">(.*?)</script>', page)
    figures = json.loads(data)
    assert {"networks", "bars-0-prefill", "bars-0-decode", "bars-4-prefill"} <= set(figures)
    assert all(f'<div id="{name}"' in page for name in figures)
    assert "<script src" not in page
    bars = bars_figure([e for e in comparison.entries if (e.case, e.phase) == (0, "prefill")])
    heights = [sum(t["x"][i] for t in bars["data"]) for i in range(len(bars["data"][0]["y"]))]
    assert heights[-1] == pytest.approx(total(comparison, 0, "prefill", OWN) * 1e3)
    assert len(networks_figure(comparison.networks)["data"]) == 4
    console = Console(width=120, file=io.StringIO())
    console.print(render(comparison))
    assert "corrected-roofline" in console.file.getvalue()  # type: ignore[attr-defined]


def test_estimates_own_columns_are_read() -> None:
    row = {"model": "DeepSeek-R1", "gpu": "h200", "isl": 4096, "osl": 256, "tp": 4, "attention_dp": 8}
    mine = compare(pd.DataFrame([{**row, "concurrency": 64 * 32}]), coefficient_set("physics"))
    first = compare(CASES[:1], coefficient_set("physics"))
    assert [e.total for e in mine.entries] == pytest.approx([e.total for e in first.entries])


def test_unusable_tables() -> None:
    with pytest.raises(InputError, match="no rows"):
        compare(pd.DataFrame({"isl": []}))
    with pytest.raises(InputError, match="column isl missing"):
        compare(pd.DataFrame({"model": ["DeepSeek-R1"]}))
    bad = compare(pd.DataFrame({"isl": [100, -1], "phase": ["prefill", "sideways"]}))
    assert next(e.reason for e in bad.entries if e.case == 1).startswith("isl: -1 is out of range")
