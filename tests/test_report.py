"""What a search's result says, as data: sentences, plans, funnel, front."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from results import OBJECTIVES, assert_well_formed, nothing, result, rows, text_of

from dse.report.figures import front_figure
from dse.report.html import html
from dse.report.names import number, percent, quantity, setting
from dse.report.summary import MOST_POINTS, funnel, knee_of, summarise
from dse.report.text import steps_grid
from dse.space.columns import STEPS


def test_best_plan_and_what_holds_it_back() -> None:
    summary = summarise(result())
    first, second, *_ = summary.headlines
    assert (first.title, first.text) == ("Highest output throughput", "900 tokens/s/GPU at TPOT 48 ms")
    assert "Llama-3.1-70B on 2 × h100: tp 2, weights fp8, kv fp8, 87 in flight, chunk 1024" in first.plan
    assert (second.title, second.text) == ("Lowest TPOT", "3 ms at 500 tokens/s/GPU")
    told = {h.title: h.text for h in summary.headlines}
    assert (
        told["What the front trades"]
        == "output throughput (500 to 900 tokens/s/GPU) against TPOT (3 to 48 ms), over 5 plans"
    )
    assert told["What holds the first plan back"] == "TPOT 48 ms of at most 50 ms (96%)"
    assert told["Within every limit"] == "100 of 400 plans (25%); most are cut by “meets TPOT ≤ 50 ms”: 190 of 290"
    assert summary.best is not None
    assert summary.shown is summary.best
    assert summary.best.metrics["output_tok_s_gpu"] == 900
    assert [limit.used for limit in summary.best.limits] == pytest.approx([0.4622, 0.96])


def test_breakdown_adds_up() -> None:
    plan = summarise(result()).best
    assert plan is not None
    assert [s.step for s in plan.steps] == list(STEPS)
    for step in plan.steps:
        assert sum(p.value for p in step.parts) == pytest.approx(step.total_ms + step.hidden_ms)
        assert sum(p.share for p in step.parts) == pytest.approx(1 + step.hidden_share)
        assert step.part("experts") is None  # this model has none
    assert plan.memory is not None
    assert sum(p.value for p in plan.memory.parts) == pytest.approx(plan.memory.total)
    assert plan.memory.free == pytest.approx(71.7 - 55.5)
    hidden, whole = steps_grid(plan).rows[-2:]
    assert hidden[:3] == ("hidden by overlap", "−11", "−28%")
    assert whole[:3] == ("step", "40", "100%")


def test_funnel_counts_shares_and_reasons() -> None:
    stages = funnel(result())
    assert [s.name for s in stages][2:] == ["fits in memory", "meets TTFT ≤ 2,000 ms", "meets TPOT ≤ 50 ms"]
    legal = stages[1]
    assert (legal.count, legal.cut, legal.kept, legal.of_all) == (400, 600, 0.4, 0.4)
    assert legal.why == (("dp does not use the GPUs", 450), ("tp does not divide the heads", 150))
    assert stages[-1].why == (("TPOT over 50 ms", 190),)
    assert sum(s.cut for s in stages) + stages[-1].count == 1000


def test_knee_is_the_point_farthest_from_the_ends() -> None:
    front = pd.DataFrame({"tpot_ms": [1.0, 2.0, 2.2, 100.0], "output_tok_s_gpu": [1.0, 50.0, 80.0, 100.0]})
    objectives = (("tpot_ms", "min"), ("output_tok_s_gpu", "max"))
    assert knee_of(front, objectives) == 2
    speeds = pd.DataFrame({"tok_s_user": 1000 / front.tpot_ms, "output_tok_s_gpu": front.output_tok_s_gpu})
    assert knee_of(speeds, (("tok_s_user", "max"), ("output_tok_s_gpu", "max"))) == 2  # a speed and its time agree
    assert knee_of(front.iloc[:2], objectives) == -1
    assert knee_of(front, objectives[:1]) == -1
    line = pd.DataFrame({"tpot_ms": [0.0, 1.0, 2.0], "output_tok_s_gpu": [0.0, 0.1, 2.0]})
    assert knee_of(line, objectives) == -1  # the ends are best


def test_table_keeps_what_differs() -> None:
    table = summarise(result()).front
    keys = [c.key for c in table.columns]
    assert keys[:2] == ["output_tok_s_gpu", "tpot_ms"]
    assert {"tp", "gpus", "concurrency"} <= set(keys)
    assert not {"model", "weights", "dispatch", "pp"} & set(keys)
    same = dict(table.same)
    assert (same["model"], same["weights"]) == ("Llama-3.1-70B", "fp8")
    assert not {"dispatch", "pp"} & set(same)  # goes without saying
    assert table.marks[0] == "best"
    assert table.rows[0][:2] == (900.0, 48.0)
    assert table.total == len(table.rows) == 5


def test_nothing_feasible_names_the_plan_and_by_how_much() -> None:
    summary = summarise(nothing())
    assert not summary.feasible
    assert summary.best is None
    assert summary.scatter is None
    assert summary.front.rows == ()
    told = {h.title: h for h in summary.headlines}
    assert told["Where it ends"].text == "“meets TTFT ≤ 20 ms” leaves none of the 300 plans before it"
    missed = told["The least-violating plan misses"]
    assert missed.text == (
        "TTFT 54.4 ms, 2.72 times the limit of 20 ms; "
        "output throughput 900 tokens/s/GPU, 10% short of the limit of 1,000 tokens/s/GPU"
    )
    assert "2 × h100" in missed.plan
    assert summary.shown is not None
    assert summary.shown.role == "least-violating plan"
    assert [x.used for x in summary.shown.limits] == pytest.approx([2.72, 1.1111], rel=1e-4)


def test_stopped_before_anything_was_priced() -> None:
    summary = summarise(result(pd.DataFrame(), evaluated=0, feasible=0, partial=True, funnel=(("enumerated", 9),)))
    assert summary.headlines[0].title == "Nothing priced"
    assert summary.shown is None
    assert "Partial run: 0 of 400" in summary.notes[0]
    assert "Nothing priced" in html(summary)
    assert "Nothing priced" in text_of(summary)


def test_notes_say_what_the_numbers_are() -> None:
    partial = summarise(result(partial=True, evaluated=50)).notes
    assert partial[0].startswith("Partial run: 50 of 400 legal plans")
    sampled = summarise(result(sampler="tpe", evaluated=50, hypervolume_ratio=0.98765)).notes
    assert sampled[0] == "50 of 400 legal plans were sampled (tpe), not all."
    assert "99% of the exhaustive" in sampled[1]
    mix = summarise(result(rows(isl="2048|512")))
    assert any("means over the mix" in note for note in mix.notes)
    assert not any(h.title == "What holds the first plan back" for h in mix.headlines)  # a mean is not the worst
    assert any("one stage" in note for note in summarise(result(rows(pp=2))).notes)
    assert summarise(result()).notes == ()


@pytest.mark.parametrize("names", [1, 2, 3, 4])
def test_any_number_of_objectives(names: int) -> None:
    objectives = (*OBJECTIVES, ("usd_per_mtok", "min"), ("gpus", "min"))[:names]
    front = rows() if names > 1 else rows(1)
    summary = summarise(result(front, objectives=objectives, candidates=rows(9)))
    assert summary.scatter is not None
    assert len(summary.scatter.axes) == max(names, 2)
    assert sum(h.title.startswith(("Highest", "Lowest")) for h in summary.headlines) == names
    figure = front_figure(summary, summary.scatter)
    assert len([key for key in figure["layout"] if key.startswith("xaxis")]) == max(names - 1, 1)
    drawn = [x for t in figure["data"] if t.get("xaxis") == "x" and t["name"] != "other good plans" for x in t["x"]]
    assert sorted(drawn) == sorted(front.output_tok_s_gpu)
    assert_well_formed(html(summary))


def test_groups_of_a_front_are_few_and_told_apart() -> None:
    scatter = summarise(result(rows(12, gpu=[f"gpu{i}" for i in range(12)], tp=[1, 2] * 6))).scatter
    assert scatter is not None
    assert scatter.by == "tp"  # twelve GPUs are too many colours
    assert scatter.groups == ("tp 1", "tp 2")
    many = summarise(result(rows(30, gpu=["a"] * 10 + ["b"] * 10 + [f"g{i}" for i in range(10)], tp=1, gpus=1))).scatter
    assert many is not None
    assert many.by == "GPU"
    assert len(many.groups) == 8
    assert many.groups[:2] == ("a", "b")
    assert many.groups[-1] == "other"


def test_a_large_front_is_thinned_and_says_so() -> None:
    front = rows(3 * MOST_POINTS, output_tok_s_gpu=np.linspace(900, 1, 3 * MOST_POINTS))
    front["tpot_ms"] = np.geomspace(48, 1, len(front))
    summary = summarise(result(front))
    assert summary.scatter is not None
    assert len(summary.scatter.front) <= MOST_POINTS + 2
    assert summary.front.total == 3 * MOST_POINTS
    assert any("evenly along it" in note for note in summary.notes)
    assert [summary.front.rows[i][0] for i in (0, -1)] == [900, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.90775, "0.908"), (46.47, "46.5"), (9.999, "10.0"), (999.9, "1,000"), (12345.6, "12,346"), (50, "50"), (0, "0")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_units_and_shares() -> None:
    assert (quantity("gpus", 1), quantity("gpus", 8), quantity("tpot_ms", 46.47)) == ("1 GPU", "8 GPUs", "TPOT 46.5 ms")
    assert [percent(x) for x in (0, 1e-6, 0.0741, 0.25, 0.9999, 1)] == ["0%", "<0.1%", "7.4%", "25%", ">99.9%", "100%"]
    assert (number(np.nan), number(np.inf), setting(16384), setting(0.9), setting("fp8")) == (
        *("–", "∞"),
        *("16384", "0.9", "fp8"),
    )
