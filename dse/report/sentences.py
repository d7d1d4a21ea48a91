"""What a result says, in sentences: the best plans, what binds, what the front trades; and what to keep in mind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dse.report.names import amount, label, number, percent
from dse.report.plan import Row, delivers, headline, row_at, summarise_plan
from dse.search.result import Binding, SearchResult

CLOSE = 0.9  # of a limit: this plan is held back by it
WORTH = 0.005  # a gain that is told


@dataclass(frozen=True)
class Headline:
    """One thing to know: `title: text (plan)`."""

    title: str
    text: str
    plan: str = ""

    def __str__(self) -> str:
        return f"{self.title}: {self.text}." + (f" {self.plan}." if self.plan else "")


def headlines(
    result: SearchResult, knee: int, least: Row | None, funnel: Sequence[tuple[str, int]]
) -> tuple[Headline, ...]:
    """Most important first. `knee`: a position in the front, -1 where there is none."""
    if not len(result.front):
        return tuple(_nothing(result, least, funnel))
    first = row_at(result.front, 0)
    trade = _trade(result) if len(result.front) > 1 and len(result.objectives) > 1 else []
    return (
        *_best(result),
        *_split(result),
        *trade,
        *_knee(result, first, knee),
        *_binds(result, first),
        *_passed(result, funnel),
    )


def _best(result: SearchResult) -> list[Headline]:
    """The best plan by each objective; of equals the first on the front."""
    names = [name for name, _ in result.objectives]
    found = []
    for name, direction in result.objectives:
        values = result.front[name].to_numpy(float)
        row = row_at(result.front, int(np.nanargmin(values if direction == "min" else -values)))
        others = [n for n in names if n != name] or [n for n in ("tpot_ms", "ttft_ms") if n in row and n != name]
        title = f"{'Lowest' if direction == 'min' else 'Highest'} {label(name).long}"
        found.append(Headline(title, f"{amount(name, row[name])} at {delivers(row, others)}", headline(row)))
    return found


def _split(result: SearchResult) -> list[Headline]:
    """Whether prefill and decode on pools of their own pay against undivided serving, and where."""
    found = result.run.get("disaggregated", {})
    if "metric" not in found:
        return []
    metric, pools, whole = found["metric"], found["disaggregated"], found["aggregated"]
    what = label(metric)
    if pools is None or whole is None:
        text = (
            "only undivided serving meets the limits" if pools is None else "undivided serving does not meet the limits"
        )
        return [Headline("Disaggregated", text)]
    text = f"{found['gain']:+.1%} {what.unit or what.long} at the same targets"
    text += f" ({number(pools)} against {number(whole)} of undivided serving)"
    levels = [(level, gain) for level, gain in found.get("levels", []) if gain > WORTH]
    if levels:
        second = label(found["second"])
        ends = [number(x) for x in (min(x for x, _ in levels), max(x for x, _ in levels))]
        at, most = max(levels, key=lambda x: x[1])
        span = f"between {ends[0]} and {ends[1]} {second.unit}" if ends[0] != ends[1] else f"at {ends[0]} {second.unit}"
        text += f"; it pays {span} of {second.long}, by up to {percent(most)} at {amount(found['second'], at)}"
    elif "levels" in found:
        text += "; it pays nowhere along the front"
    return [Headline("Disaggregated", text)]


def _trade(result: SearchResult) -> list[Headline]:
    """The range of each objective along the front."""
    parts = []
    for name, _ in result.objectives:
        low, high = (number(x) for x in (result.front[name].min(), result.front[name].max()))
        ends = low if low == high else f"{low} to {high}"
        parts.append(f"{label(name).long} ({ends} {label(name).unit}".rstrip() + ")")
    return [Headline("What the front trades", f"{' against '.join(parts)}, over {len(result.front):,} plans")]


def _knee(result: SearchResult, best: Row, knee: int) -> list[Headline]:
    """What the knee gives up of the first objective, and what that buys."""
    if knee < 0:
        return []
    (first, _), *rest = result.objectives
    at = row_at(result.front, knee)
    bought = " and ".join(text for text in (_change(name, best, at) for name, _ in rest) if text)
    text = delivers(at, [name for name, _ in result.objectives])
    if bought and _change(first, best, at):
        text += f"; against the first plan {_change(first, best, at)} for {bought}"
    return [Headline("Knee of the front", text, headline(at))]


def _change(name: str, before: Row, after: Row) -> str:
    """`36% less output throughput`, `2.1 times the cost`; empty where nothing changes."""
    a, b = float(before[name]), float(after[name])
    if a == b or not a > 0:
        return ""
    what = label(name).long.removeprefix("number of ")
    if b / a >= 2:
        return f"{number(b / a)} times the {what}"
    less = "fewer" if name == "gpus" else "less"
    return f"{percent(abs(b / a - 1))} {'more' if b > a else less} {what}"


def _binds(result: SearchResult, row: Row) -> list[Headline]:
    """What holds the first plan back. Limits hold for each workload of a mix, its columns are means: not told there."""
    plan = summarise_plan(row, "", result.constraints)
    near = [] if _is_mix(row) else [x.text for x in plan.limits if x.used >= CLOSE]
    if plan.memory and plan.memory.share >= CLOSE:
        near.append(f"memory, {number(plan.memory.total)} of {number(plan.memory.usable)} GiB")
    return [Headline("What holds the first plan back", "; ".join(near))] if near else []


def _passed(result: SearchResult, funnel: Sequence[tuple[str, int]]) -> list[Headline]:
    """How many plans meet everything, and what cuts most of them."""
    checks = [(before[1] - after[1], before[1], after[0]) for before, after in pairwise(funnel) if _is_check(after[0])]
    if not checks:
        return []
    passed, priced = funnel[-1][1], dict(funnel).get("evaluated", result.legal)
    cut, before, stage = max(checks, key=lambda x: x[0])
    text = f"{passed:,} of {priced:,} plans ({percent(passed / max(priced, 1))})"
    if cut:
        text += f"; most are cut by “{stage}”: {cut:,} of {before:,}"
    return [Headline("Within every limit", text)]


def _nothing(result: SearchResult, least: Row | None, funnel: Sequence[tuple[str, int]]) -> list[Headline]:
    """Nothing feasible: which limit leaves nothing, and how near the nearest plan comes."""
    if result.evaluated == 0:
        return [Headline("Nothing priced", "the run was stopped before any plan was priced")]
    found = [Headline("Nothing feasible", f"none of {result.evaluated:,} plans meets every limit")]
    for (_, before), (stage, left) in pairwise(funnel):
        if before and not left:
            found.append(Headline("Where it ends", f"“{stage}” leaves none of the {before:,} plans before it"))
    if least is not None:
        missed = "; ".join(miss(b) for b in result.binding) or "see its limits"
        found.append(Headline("The least-violating plan misses", missed, headline(least)))
    return found


def miss(binding: Binding) -> str:
    """`TTFT 54.4 ms, 2.72 times the limit of 20 ms`."""
    over = binding.value / binding.bound if binding.bound else float("inf")
    if binding.op == "max":
        how = f"{number(over)} times" if over >= 2 else f"{percent(over - 1)} over"
    else:
        how = f"{percent(1 - over)} short of"
    reached = f"{label(binding.metric).long} {amount(binding.metric, binding.value)}"
    return f"{reached}, {how} the limit of {amount(binding.metric, binding.bound)}"


def notes(result: SearchResult, shown: int) -> tuple[str, ...]:
    """What a reader must know to read the numbers right."""
    texts = []
    priced = f"{result.evaluated:,} of {result.legal:,} legal plans"
    if result.partial:
        texts.append(f"Partial run: {priced} were priced before it was stopped; better ones may be among the rest.")
    elif result.evaluated < result.legal:
        texts.append(f"{priced} were sampled ({result.sampler}), not all.")
    if result.hypervolume_ratio is not None:
        texts.append(f"This front covers {percent(result.hypervolume_ratio)} of the exhaustive front's hypervolume.")
    example = result.front if len(result.front) else result.least
    if example is not None and len(example):
        if _is_mix(row_at(example, 0)):
            texts.append(
                "Numbers are means over the mix of workloads; limits hold for each workload; memory is the largest."
            )
        if "pp" in example and (example["pp"] > 1).any():
            texts.append("With pipeline parallelism a step is that of one stage.")
    if shown < len(result.front):
        texts.append(f"{shown:,} of the front's {len(result.front):,} plans are shown, evenly along it.")
    return tuple(texts)


def _is_mix(row: Row) -> bool:
    return "|" in str(row.get("isl", ""))


def _is_check(stage: str) -> bool:
    return stage.startswith(("fits", "meets"))
