"""The summary as terminal text, Markdown and one self-contained page."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
from results import OBJECTIVES, assert_well_formed, figures_of, nothing, result, rows, text_of

from dse.report.figures import memory_figure, steps_figure
from dse.report.html import html
from dse.report.summary import summarise
from dse.report.text import markdown

MARKUP = "<b>model</b> & </script><script>alert('x')</script>"


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_text_fits(width: int) -> None:
    text = text_of(summarise(result()), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "Highest output throughput" in text
    assert "hidden by overlap" in text
    assert "concurrency" in text  # the load stays when columns have to go


def test_terminal_text_shows_markup_as_it_is() -> None:
    text = text_of(summarise(result(rows(model="[red]m[/red]\x1b[2J"), name="[bold]x")))
    assert "[bold]x" in text
    assert "[red]m[/red] [2J on" in text
    assert "\x1b" not in text


def test_markdown_tables_are_even() -> None:
    text = markdown(summarise(result(rows(model="a|b<c>"), name="x_y")))
    assert text.startswith("# x\\_y\n")
    assert "a\\|b&lt;c>" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_page_is_one_whole_file_with_the_numbers() -> None:
    page = html(summarise(result()))
    seen = "".join(assert_well_formed(page).seen)
    for text in ("900 tokens/s/GPU at TPOT 48 ms", "450: dp does not use the GPUs", "12.5 M points/s", "jax 0.10"):
        assert text in seen
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]  # without plotly.js
    assert not re.search(r"https?://|@import|url\(", ours)
    assert page.count("plotly.js v") == 1
    assert set(figures_of(page)) == {"front", "steps", "memory"}


def test_page_offers_no_way_out() -> None:
    page = html(summarise(result()))
    assert "default-src 'none'" in page
    assert "form-action 'none'" in page
    assert 'plotlyServerURL: ""' in page
    assert "modeBarButtons: [[" in page  # the default set has a button that sends the chart to a server


def test_page_escapes_names() -> None:
    front = rows(model=MARKUP, gpu=[MARKUP + str(i % 2) for i in range(5)])
    page = html(summarise(result(front, name=MARKUP, cuts={MARKUP: 600})))
    seen = "".join(assert_well_formed(page).seen)
    assert MARKUP in seen
    ours = page[: page.index("<script>")] + page[page.rindex("<script>") :]
    assert "<script>alert" not in ours
    assert "<b>model" not in ours
    for trace in figures_of(page)["front"]["data"]:
        for text in [trace.get("name", ""), *trace.get("hovertext", [])]:
            assert "<b>" not in text  # plotly reads markup too
            assert "<script" not in text


def test_page_without_a_feasible_plan() -> None:
    page = html(summarise(nothing()))
    seen = "".join(assert_well_formed(page).seen)
    assert "No plan meets every limit" in seen
    assert "TTFT 54.4 ms, 2.72 times the limit of 20 ms" in seen
    assert set(figures_of(page)) == {"steps", "memory"}


def test_step_bars_show_what_is_hidden_and_memory_its_limit() -> None:
    plan = summarise(result()).best
    assert plan is not None
    assert plan.memory is not None
    figure = steps_figure(plan)
    *parts, hidden = figure["data"]
    assert hidden["name"] == "hidden by overlap"
    assert hidden["base"] == [100.0] * 3
    reach = np.sum([t["x"] for t in parts], axis=0)
    np.testing.assert_allclose(reach, np.add(hidden["base"], hidden["x"]))  # the hatching ends where the parts end
    assert parts[-1]["name"] == "sequence exchange"  # communication last: what is hidden lies under the hatching
    bar = memory_figure(plan.memory)
    assert sum(t["x"][0] for t in bar["data"]) == pytest.approx(55.5)
    assert bar["layout"]["shapes"][0]["x0"] == 71.7


def test_infinite_and_missing_values_do_not_break_the_page() -> None:
    front = rows(usd_per_mtok=[np.inf, np.nan, 1, 2, 3])
    summary = summarise(result(front, objectives=(*OBJECTIVES, ("usd_per_mtok", "min"))))
    assert_well_formed(html(summary))
    assert "∞" in markdown(summary)
    figures_of(html(summary))


def test_plotly_is_imported_by_the_page_alone() -> None:
    code = (
        "import sys, dse.report.summary, dse.report.text, dse.report.html, dse.report.files as f\n"
        "assert not any(m.split('.')[0] == 'plotly' for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
