"""The accuracy report: its numbers, from rows whose errors are known, and what the pages show of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from results import assert_well_formed, figures_of

from dse.calibrate.roofline import Beside, Health, Roofline
from dse.calibrate.run import Accuracy
from dse.calibrate.sources import Refusal
from dse.report.accuracy import summarise
from dse.report.accuracy_page import html, markdown, write_accuracy

MARKUP = "<b>m</b> & </script><script>alert('x')</script>"


def serving(model: str = "meta-llama/Llama-3.1-8B") -> pd.DataFrame:
    """Twelve rows: TPOT 10% high on h100 and 50% low on h200; TTFT right but for one row, three times too long."""
    count = 12
    gpu = np.where(np.arange(count) < 8, "h100", "h200")
    measured = np.linspace(5.0, 50.0, count)
    ttft = np.full(count, 200.0)
    ttft[3] = 600.0
    return pd.DataFrame(
        {
            "model": model,
            "gpu": gpu,
            "engine": "vllm",
            "weights": "fp8",
            "tp": "1",
            "isl": np.where(np.arange(count) % 2, "1024", "8193"),
            "osl": "1024",
            "concurrency": [str(n) for n in [1, 4, 5, 16, 17, 64, 65, 256, 257, 512, 2, 3]],
            "measured_ttft_ms": "200",
            "measured_tpot_ms": [f"{x:.6f}" for x in measured],
            "ttft_ms": ttft,
            "tpot_ms": measured * np.where(gpu == "h100", 1.1, 0.5),
        }
    )


def result(model: str = "meta-llama/Llama-3.1-8B") -> Accuracy:
    steps = pd.DataFrame({"workload": ["a", "a", "b"], "cycle_us": [100.0, 200.0, 400.0], "predicted_us": 200.0})
    refused = (Refusal(0, "the same row again"), Refusal(4, "the same row again"), Refusal(5, MARKUP))
    return Accuracy(pd.DataFrame(), {"unseen series": serving(model), "random folds": steps}, refused)


def beside() -> Beside:
    table = pd.DataFrame([{"metric": "tpot", "rows": 12, "roofline_mean": 0.235, "roofline_median": 0.13}])
    return Beside(
        table=table.assign(ours_mean=0.092, ours_median=0.063),
        fitted=Roofline(np.ones(10), np.eye(10)),
        health=(Health("beta_prefill", 2.2, 2.1, 2.4), Health("beta_reduce", 1.8, 0.0, 3.9, "unidentified")),
        flagged=pd.DataFrame(),
        refused=(),
    )


def test_errors_of_a_split() -> None:
    series, steps = summarise(result()).splits
    tpot, ttft = (p.errors for p in series.parities)
    assert tpot.rows == 12
    assert tpot.mean == pytest.approx((8 * 0.1 + 4 * 0.5) / 12)
    assert tpot.median == pytest.approx(0.1)
    assert tpot.bias == pytest.approx((1.1**8 * 0.5**4) ** (1 / 12))
    assert (ttft.mean, ttft.median) == (pytest.approx(2.0 / 12), pytest.approx(0.0))
    (cycle,) = steps.parities
    assert cycle.errors.mean == pytest.approx((1.0 + 0.0 + 0.5) / 3)


def test_buckets_tell_where_it_is_wrong() -> None:
    """Only settings with several values; ranges hold their upper edge."""
    split = summarise(result()).splits[0]
    found = {(column, name): errors[0] for column, name, errors in split.buckets}
    assert found["gpu", "h100"].mean == pytest.approx(0.1)
    assert found["gpu", "h200"].mean == pytest.approx(0.5)
    assert {column for column, _ in found} == {"gpu", "concurrency", "isl"}
    assert [name for column, name in found if column == "concurrency"] == [
        *("to 4", "5 to 16", "17 to 64", "65 to 256", "above 256")
    ]
    assert [found["concurrency", name].rows for name in ("to 4", "5 to 16", "above 256")] == [4, 2, 2]
    assert [name for column, name in found if column == "isl"] == ["513 to 2048", "above 8192"]


def test_worst_rows_come_first() -> None:
    split = summarise(result()).splits[0]
    assert [row[-1] for row in split.worst[:5]] == ["0.50"] * 4 + ["1.10"]
    assert split.worst[0][:2] == ("Llama-3.1-8B", "h200")


def test_page_is_whole_and_has_the_numbers() -> None:
    page = html(summarise(result(), "runs.csv", [beside()]))
    seen = "".join(assert_well_formed(page).seen)
    for text in (
        "runs.csv",
        "unseen series",
        "23%",
        "above 256",
        "23.5",
        "beta_reduce",
        "unidentified",
        "the same row again",
    ):
        assert text.replace("23.5", "24%") in seen, text
    assert page.count("plotly.js v") == 1
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert not re.search(r"https?://|@import|url\(", ours)
    assert set(figures_of(page)) == {"parity0", "parity1"}


def test_parity_plots_hold_every_row_on_equal_axes() -> None:
    figure = figures_of(html(summarise(result())))["parity0"]
    points = [trace for trace in figure["data"] if trace["mode"] == "markers"]
    assert sum(len(trace["x"]) for trace in points if trace["xaxis"] == "x") == 12
    assert {trace["name"] for trace in points} == {"h100", "h200"}
    for n in ("", "2"):
        assert figure["layout"][f"xaxis{n}"]["range"] == figure["layout"][f"yaxis{n}"]["range"]
    exact = next(trace for trace in figure["data"] if trace["mode"] == "lines")
    assert exact["x"] == exact["y"]


def test_names_are_escaped() -> None:
    page = html(summarise(result(MARKUP)))
    assert_well_formed(page)
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "<script>alert" not in ours
    for trace in figures_of(page)["parity0"]["data"]:
        assert all("<b>m" not in text for text in trace.get("hovertext", []))


def test_markdown_tables_are_even() -> None:
    text = markdown(summarise(result("a|b"), "runs.csv", [beside()]))
    assert text.startswith("# Accuracy\n")
    assert "Corrected roofline" in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(blocks) == 8
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_files_are_written_whole(tmp_path: Path) -> None:
    written = write_accuracy(result(), tmp_path / "out", "runs.csv")
    assert [path.name for path in written] == ["accuracy.html", "accuracy.md", "predictions.csv"]
    table = pd.read_csv(written[2])
    assert table["split"].value_counts().to_dict() == {"unseen series": 12, "random folds": 3}
