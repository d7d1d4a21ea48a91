"""Legality against a brute-force enumeration that knows nothing of tables, prefixes or arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dse.catalog.hardware import to_device
from dse.catalog.model_schema import ModelEntry
from dse.catalog.precision import resolve
from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS
from dse.errors import InputError
from dse.space import CompiledSpace, compile_space, parse_space
from dse.space.legal import MOST_DESIGNS

MODELS = ("Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V3", "gpt-oss-20b", "Qwen3-Next-80B-A3B", "Llama-2-13B")
DEGREES = ("tp", "pp", "cp", "attention_dp", "ep", "moe_tp", "dp")
BASE: dict[str, Any] = {
    "models": ["Qwen3-30B-A3B"],
    "clusters": ["h100-dgx"],
    "gpus": [4, 8],
    "workloads": [{"isl": 1024, "osl": 128}],
}


def space(**changes: Any) -> CompiledSpace:
    axes = {"concurrency": [1, 2, 3], **changes.pop("axes", {})}
    return compile_space(parse_space({**BASE, **changes, "axes": axes}, "test.yaml"))


@dataclass(frozen=True)
class Shape:
    """What the brute force needs to know of a model, read off its entry the plain way."""

    heads: list[int]
    kv: list[int]
    widths: list[int]
    experts: list[int]
    expert_widths: list[int]
    layers: int
    limited: bool

    @classmethod
    def of(cls, e: ModelEntry) -> Shape:
        routed = [f.routed for f in e.ffns if f.routed is not None]
        inner = [g.k for m in e.mixers if m.core is None for g in m.gemms if g.split == "k"]
        return cls(
            heads=[m.core.heads for m in e.mixers if m.core is not None] + inner,
            kv=[m.core.kv_heads for m in e.mixers if m.core is not None],
            widths=[f.width for f in e.ffns],
            experts=[r.experts for r in routed],
            expert_widths=[r.width for r in routed],
            layers=e.layers,
            limited=any(r.group_limit > 0 for r in routed),
        )


def degrees(c: CompiledSpace, shape: Shape, size: int, g: int, d: dict[str, int | None]) -> dict[str, int] | None:
    """The degrees a raw combination stands for, or None where it is not legal. None in `d`: derived."""
    tp, pp, cp, adp = (d[n] or 1 for n in ("tp", "pp", "cp", "attention_dp"))
    if g > size or any(h % tp for h in shape.heads) or any(w % tp for w in shape.widths):
        return None
    if any(tp % kv and kv % tp for kv in shape.kv):
        return None
    if shape.layers < pp if c.spec.options.uneven_pp else shape.layers % pp:
        return None
    stage = tp * cp * adp
    if g % (stage * pp):
        return None
    ep, moe_tp = d["ep"], d["moe_tp"]
    if not shape.experts:
        if adp > 1:
            return None
        ep = moe_tp = 1
    else:
        ep = stage // moe_tp if ep is None and moe_tp is not None else ep
        moe_tp = stage // ep if moe_tp is None and ep else moe_tp
        if ep is None or moe_tp is None or ep * moe_tp != stage:
            return None
        if any(e % ep for e in shape.experts) or any(w % moe_tp for w in shape.expert_widths):
            return None
    replicas = d["dp"] or g // (stage * pp)
    if replicas * stage * pp != g:
        return None
    return {
        "tp": tp, "pp": pp, "cp": cp, "attention_dp": adp,
        "moe_ep": ep, "moe_tp": moe_tp, "replicas": replicas, "gpus": g,
    }  # fmt: skip


def rules(c: CompiledSpace, shape: Shape, x: dict[str, int], raw: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the other axes come to under these degrees, or None."""
    alone = x["tp"] * x["pp"] * x["cp"] * x["attention_dp"] == 1
    exchange = bool(shape.experts) and x["attention_dp"] * x["cp"] > 1 and x["moe_ep"] > 1

    def overlap(rule: str) -> str:
        return "none" if alone or (rule == "shared_expert" and not exchange) else rule

    dispatch = raw["dispatch"] if exchange else "auto"
    if dispatch == "node_limited" and not shape.limited:
        dispatch = "node_dedup"
    replicas = raw["eplb_replicas"] if shape.experts and x["moe_ep"] > 1 else 0
    if replicas and any((e + replicas) % x["moe_ep"] for e in shape.experts):
        return None
    method = raw["cp_method"] if x["cp"] > 1 else "auto"
    if method == "ulysses" and any(x["cp"] * min(x["tp"], kv) > kv for kv in shape.kv):
        return None
    micro = raw["microbatches"] if x["pp"] > 1 and raw["microbatches"] != x["pp"] else 0
    return (
        OVERLAPS.index(overlap(raw["overlap_prefill"])),
        OVERLAPS.index(overlap(raw["overlap_decode"])),
        DISPATCHES.index(dispatch),
        replicas,
        CP_METHODS.index(method),
        int(raw["sequence_parallel"] and x["tp"] > 1),
        micro,
        raw["utilisation"],
    )


RULES = (
    "overlap_prefill",
    "overlap_decode",
    "dispatch",
    "eplb_replicas",
    "cp_method",
    "sequence_parallel",
    "microbatches",
    "utilisation",
)
COLUMNS = ("tp", "pp", "cp", "attention_dp", "moe_ep", "moe_tp", "replicas", "gpus")


def brute_force(c: CompiledSpace) -> tuple[set[tuple[Any, ...]], int]:
    """All distinct legal designs, and how many raw combinations there are. `auto` is expanded to every divisor."""
    axes = c.spec.axes
    lists = {name: [None] if getattr(axes, name) == "auto" else list(getattr(axes, name)) for name in DEGREES}
    others = {name: getattr(axes, name) or ("none",) for name in RULES}
    found: set[tuple[Any, ...]] = set()
    count = 0
    for i, entry in enumerate(c.models):
        shape = Shape.of(entry)
        for j, machine in enumerate(c.machines):
            size = math.prod(level.size.value for level in machine.cluster.levels)
            formats = list(precisions(c, entry, j))
            for g, *values in itertools.product(c.spec.gpus, *lists.values()):
                x = degrees(c, shape, size, g, dict(zip(DEGREES, values)))
                for combination in itertools.product(*others.values()):
                    count += len(axes.weights) * len(axes.activations) * len(axes.kv)
                    if x is None:
                        continue
                    y = rules(c, shape, x, dict(zip(RULES, combination)))
                    if y is not None:
                        found |= {(i, j, *(x[n] for n in COLUMNS), *y, f) for f in formats}
    return found, count


def precisions(c: CompiledSpace, entry: ModelEntry, machine: int) -> Iterator[tuple[float, ...]]:
    device = to_device(c.machines[machine].gpu)
    for weights, activations, kv in itertools.product(c.spec.axes.weights, c.spec.axes.activations, c.spec.axes.kv):
        yield relevant(vars(resolve(entry, device, weights, kv, activations)), entry)


def relevant(precision: dict[str, Any], entry: ModelEntry) -> tuple[float, ...]:
    dense = not any(f.routed for f in entry.ffns)
    skip = ("expert", "dispatch", "combine") if dense else ()
    return tuple(float(x) for name, x in precision.items() if not name.startswith(skip) or not skip)


def compiled_designs(c: CompiledSpace) -> list[tuple[Any, ...]]:
    d = c.designs
    columns = [getattr(d, name).tolist() for name in ("model", "machine", *COLUMNS, *RULES)]
    leaves = vars(c.precisions)
    rows = []
    for *values, index, model in zip(*columns, d.precision_index.tolist(), d.model.tolist()):
        row = {name: leaf[index] for name, leaf in leaves.items()}
        rows.append((*values, relevant(row, c.models[model])))
    return rows


def check(c: CompiledSpace) -> None:
    found, raw = brute_force(c)
    designs = compiled_designs(c)
    assert len(designs) == len(set(designs)), "a design is listed twice"
    assert set(designs) == found
    assert c.enumerated == c.legal + sum(c.cuts.values())
    assert c.enumerated == raw * len(c.operating)
    assert c.legal == len(designs) * len(c.operating)
    assert all(count > 0 for count in c.cuts.values())


def some(values: list[Any], most: int = 3) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


@st.composite
def small_spaces(draw: st.DrawFn) -> dict[str, Any]:
    """Explicit axes, so that the brute force sees the same raw values; each with 1, so that most spaces are legal."""
    degree = some([1, 2, 4, 8], 2).map(lambda v: sorted({1, *v}))
    axes: dict[str, Any] = {name: draw(degree) for name in ("tp", "pp", "cp", "attention_dp")}
    axes["ep"] = draw(degree)
    axes["moe_tp"] = draw(st.one_of(st.just("auto"), degree))
    axes["dp"] = draw(st.one_of(st.just("auto"), degree))
    axes |= {
        "weights": draw(some(["native", "bf16", "fp8", "fp4", "int4"], 2)),
        "activations": draw(some(["auto", "fp8", "bf16"], 2)),
        "kv": draw(some(["auto", "bf16", "fp8"], 2)),
        "overlap_prefill": draw(some(["none", "full", "shared_expert"], 2)),
        "overlap_decode": draw(some(["none", "two_batch"], 2)),
        "dispatch": draw(some(["auto", "flat", "node_dedup", "node_limited"], 2)),
        "cp_method": draw(some(list(CP_METHODS), 2)),
        "sequence_parallel": draw(some([False, True], 2)),
        "microbatches": draw(some([1, 2, 4], 2)),
        "eplb_replicas": draw(some([0, 8, 32], 2)),
        "utilisation": draw(some([0.8, 0.9], 2)),
    }
    return {
        "models": draw(some(list(MODELS), 2)),
        "clusters": draw(some(["h100-dgx", "b200-hgx", "a100-dgx", "pcie-host-box"], 2)),
        "gpus": draw(some([1, 2, 4, 8, 16], 3).map(lambda v: sorted({*v, 16}))),
        "axes": axes,
        "options": {"uneven_pp": draw(st.booleans())},
    }


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(small_spaces())
def test_designs_are_those_of_a_brute_force_enumeration(changes: dict[str, Any]) -> None:
    refusal = ""
    try:
        check(space(**changes))
    except InputError as error:  # a value legal nowhere (pp 8 of 61 layers, experts for dense models)
        refusal = str(error)
    assert not refusal or "(allowed: " in refusal or "none of" in refusal, refusal


@pytest.mark.parametrize("name", MODELS)
def test_every_model_alone_with_explicit_degrees(name: str) -> None:
    moe = name not in ("Llama-3.1-8B", "Llama-2-13B")
    axes = {
        "tp": [1, 2, 4],
        "pp": 1,
        "cp": [1, 2],
        "ep": [1, 2, 4, 8] if moe else 1,
        "attention_dp": [1, 2] if moe else 1,
    }
    check(space(models=[name], workloads=[{"isl": 512, "osl": 64}], axes=axes))


def test_expert_degrees_can_be_derived_either_way() -> None:
    by_ep = space(axes={"tp": [1, 2, 4], "attention_dp": [1, 2], "ep": [1, 2, 4, 8]})
    by_moe_tp = space(axes={"tp": [1, 2, 4], "attention_dp": [1, 2], "moe_tp": [1, 2, 4, 8]})
    explicit = space(axes={"tp": [1, 2, 4], "attention_dp": [1, 2], "ep": [1, 2, 4, 8], "moe_tp": [1, 2, 4, 8]})
    for c in (by_ep, by_moe_tp, explicit):
        check(c)
    assert set(compiled_designs(by_ep)) == set(compiled_designs(by_moe_tp)) == set(compiled_designs(explicit))


def test_auto_is_every_value_that_can_be_legal() -> None:
    names = ("tp", "pp", "cp", "attention_dp", "ep")
    auto = space(gpus=[6, 8, 48], axes=dict.fromkeys(names, "auto"))
    everything = {n: [k for k in range(1, 49) if 48 % k == 0] for n in names}
    everything["tp"] = [1, 2, 4, 8, 16]  # of 32 heads; 3 would be an error
    everything["ep"] = [1, 2, 4, 8, 16]  # of 128 experts
    assert set(compiled_designs(auto)) == set(compiled_designs(space(gpus=[6, 8, 48], axes=everything)))


def test_dense_and_moe_models_share_a_space() -> None:
    c = space(models=["Llama-3.1-8B", "Qwen3-30B-A3B"], axes={"tp": [1, 4], "attention_dp": [1, 2], "ep": [2, 4]})
    check(c)
    dense = c.designs.model == 0
    assert dense.any()
    assert (~dense).any()
    assert set(c.designs.moe_ep[dense]) == set(c.designs.moe_tp[dense]) == {1}
    assert "ep and moe_tp do not matter without experts" in c.cuts


def test_kv_heads_are_split_evenly_or_copied_whole() -> None:
    axes = {"tp": [1, 3], "ep": 1}
    c = space(models=["MiniMax-M2.5", "OPT-175B"], gpus=[1, 3, 6], axes=axes, options={"extended_context": True})
    check(c)  # 48 heads of 8 KV heads by 3; 96 of 96
    assert set(c.designs.tp[c.designs.model == 0]) == {1}
    assert set(c.designs.tp[c.designs.model == 1]) == {1, 3}


def test_a_derived_moe_tp_divides_the_expert_width() -> None:
    c = space(models=["gpt-oss-20b"], gpus=[128], axes={"tp": 8, "attention_dp": 16, "ep": [1, 2]})
    check(c)  # width 2880 by 128 or 64
    assert c.designs.moe_tp.tolist() == [64]
    assert c.cuts == {"moe_tp does not divide the expert width": 3}


def test_cuts_name_what_binds() -> None:
    level = {"name": "box", "size": 8, "bandwidth_gb_s": 20, "latency_us": 5}
    box = {"clusters": {"box": {"levels": [level], "default_gpus": ["l40s"]}}}
    c = space(clusters=["box", "h100-dgx"], hardware=box, gpus=[4, 64], axes={"tp": [1, 8], "ep": [1, 8]})
    assert c.cuts["more GPUs than the cluster has"] * 4 == c.enumerated  # one of two machines, one of two counts
    assert "tp*attention_dp*cp is not ep*moe_tp" in c.cuts


def test_models_whose_context_is_too_short_are_cut_unless_extended() -> None:
    changes: dict[str, Any] = {"models": ["Llama-2-13B", "Llama-3.1-8B"], "workloads": [{"isl": 8000, "osl": 100}]}
    cut = space(**changes)
    assert set(cut.designs.model) == {1}
    assert cut.cuts["prompt and answer longer than the model's context"] * 2 == cut.enumerated
    assert set(space(**changes, options={"extended_context": True}).designs.model) == {0, 1}


def test_uneven_pipelines_need_the_option() -> None:
    with pytest.raises(InputError, match=r"axes.pp: 4 does not divide layers=61 of DeepSeek-V3.*uneven_pp: true"):
        space(models=["DeepSeek-V3"], axes={"pp": [1, 4]})
    assert set(space(models=["DeepSeek-V3"], axes={"pp": [1, 4]}, options={"uneven_pp": True}).designs.pp) == {1, 4}


def test_the_raw_product_is_counted_not_made() -> None:
    axes = {name: "auto" for name in ("tp", "pp", "cp", "attention_dp", "ep")}
    c = space(
        models=["DeepSeek-V3"],
        gpus={"min": 1, "max": 512},
        axes={**axes, "weights": ["fp8", "bf16"], "concurrency": {"min": 1, "max": 100_000, "step": 1}},
    )
    assert c.enumerated > 10**10
    assert c.enumerated == c.legal + sum(c.cuts.values())


def test_too_many_designs_are_refused_quickly() -> None:
    axes: dict[str, Any] = {
        name: "all"
        for name in ("overlap_prefill", "overlap_decode", "dispatch", "cp_method", "kv", "sequence_parallel")
    }
    axes |= {name: "auto" for name in ("tp", "pp", "cp", "attention_dp", "ep")}
    axes["utilisation"] = {"min": 0.5, "max": 0.95, "step": 0.01}
    with pytest.raises(InputError, match=f"test.yaml: axes.*more than {MOST_DESIGNS} legal plans"):
        space(gpus={"min": 1, "max": 64}, axes=axes)


def test_designs_come_in_the_order_of_the_axes() -> None:
    c = space(axes={"tp": [4, 1, 2], "pp": [2, 1], "ep": "auto", "kv": ["fp8", "bf16"]})
    d = c.designs
    rank = {4: 0, 1: 1, 2: 2}
    keys = list(zip(d.gpus, -d.pp, [rank[int(t)] for t in d.tp], d.moe_ep, d.kv))
    assert keys == sorted(keys)
    assert all(getattr(d, name).dtype == np.int32 for name in vars(d) if name != "utilisation")
