"""Limits, monotonicity and invariances that hold whatever the coefficients are."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from conftest import Columns, columns, in_double
from scenarios import log_uniform

from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.evaluate import Scenario, estimate
from dse.cost.overlap import LayerTimes, overlapped
from dse.cost.types import CP_METHODS, OVERLAPS, Level, Routed, Topology, replace, stack

PARTS = ("projections", "attention", "dense", "experts", "elementwise", "head")
STEPS = ("decode", "mixed", "prefill")


def changed(scenarios: list[Scenario], part: str, **numbers: Any) -> list[Scenario]:
    return [replace(x, **{part: replace(getattr(x, part), **numbers)}) for x in scenarios]


def scaled(scenarios: list[Scenario], part: str, factor: float, *names: str) -> list[Scenario]:
    def grown(tree: Any) -> Any:
        return replace(tree, **{name: factor * getattr(tree, name) for name in names})

    if part == "levels":
        return [
            replace(x, topology=replace(x.topology, levels=tuple(grown(level) for level in x.topology.levels)))
            for x in scenarios
        ]
    return [replace(x, **{part: grown(getattr(x, part))}) for x in scenarios]


def single_gpu(scenarios: list[Scenario]) -> list[Scenario]:
    one = dict.fromkeys(("tp", "pp", "attention_dp", "cp", "moe_tp", "moe_ep"), 1.0)
    return changed(scenarios, "plan", **one)


# ------------------------------------------------------------------------------------------- limits


def test_one_gpu_pays_for_no_communication(random_batch: list[Scenario]) -> None:
    alone = single_gpu(changed(random_batch, "plan", overlap_prefill=0.0, overlap_decode=0.0))
    got = columns(in_double(alone))
    for step in STEPS:
        for part in ("reduce", "exchange", "sequence"):
            assert (got[f"served.{step}.{part}"] == 0).all()
        assert np.abs(got[f"served.{step}.hidden"] / got[f"served.{step}.total"]).max() < 1e-12
    assert (got["memory.buffers"] == 0).all()


@pytest.mark.parametrize("stride", [1.0, 8.0])
def test_collectives_of_one_rank_are_free(stride: float) -> None:
    link = Level(size=8.0, bandwidth=4e11, latency=2e-6)
    topology = Topology(levels=(link, replace(link, bandwidth=5e10)), multicast=1.0)
    one, c = coll.group(topology, 1.0, stride), Coefficients()
    routed = Routed(experts=256.0, top_k=8.0, d_in=7168.0, width=2048.0, matrices=3.0, group_limit=4.0)
    for lines in (coll.all_reduce, coll.all_gather, coll.all_to_all):
        assert float(coll.seconds(lines(topology, one, c), 1e9)) == 0.0
    assert float(coll.point_to_point(topology, one, c)(1e9)) == 0.0
    for mode in range(5):
        assert float(coll.dispatch(topology, one, routed, float(mode), 7168.0, c)(4096.0)) == 0.0


def test_endless_bandwidth_leaves_compute(random_batch: list[Scenario]) -> None:
    """With no latencies either: then halving the peaks doubles every step."""
    ideal = [replace(x, coefficients=Coefficients.ideal()) for x in scaled(random_batch, "levels", 0.0, "latency")]
    endless = scaled(scaled(ideal, "device", 1e15, "bandwidth"), "levels", 1e15, "bandwidth")
    peaks = ("peak_bf16", "peak_fp8", "peak_fp4", "peak_int8")
    one, half = columns(in_double(endless)), columns(in_double(scaled(endless, "device", 0.5, *peaks)))
    for step in STEPS:
        np.testing.assert_allclose(half[f"served.{step}.total"], 2 * one[f"served.{step}.total"], rtol=1e-6)


def test_endless_compute_leaves_memory(random_batch: list[Scenario]) -> None:
    ideal = [replace(x, coefficients=Coefficients.ideal()) for x in single_gpu(random_batch)]
    peaks = ("peak_bf16", "peak_fp8", "peak_fp4", "peak_int8")
    endless = scaled(ideal, "device", 1e15, *peaks)
    one, half = columns(in_double(endless)), columns(in_double(scaled(endless, "device", 0.5, "bandwidth")))
    for step in STEPS:
        np.testing.assert_allclose(half[f"served.{step}.total"], 2 * one[f"served.{step}.total"], rtol=1e-6)


# ------------------------------------------------------------------------------------- monotonicity


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("device", ("bandwidth",)),
        ("device", ("peak_bf16",)),
        ("device", ("peak_fp8",)),
        ("device", ("peak_fp4", "peak_int8")),
        ("levels", ("bandwidth",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("factor", [1.05, 3.0])
def test_faster_hardware_is_never_slower(
    random_batch: list[Scenario], double: Columns, part: str, names: tuple[str, ...], factor: float
) -> None:
    faster = columns(in_double(scaled(random_batch, part, factor, *names)))
    for metric in ("ttft", "tpot"):
        worse = np.flatnonzero(faster[metric] > double[metric] * (1 + 1e-9))
        shown = [(int(i), double[metric][i], faster[metric][i]) for i in worse[:5]]
        assert len(worse) == 0, f"{metric} rises in {len(worse)} of {len(random_batch)}: {shown}"


def test_lower_latency_is_never_slower(random_batch: list[Scenario], double: Columns) -> None:
    faster = columns(in_double(scaled(random_batch, "levels", 0.3, "latency")))
    for metric in ("ttft", "tpot"):
        assert (faster[metric] <= double[metric] * (1 + 1e-9)).all()


def test_auto_context_parallelism_is_the_least_of_its_methods(random_batch: list[Scenario]) -> None:
    methods = [columns(in_double(changed(random_batch, "plan", cp_method=float(m)))) for m in range(len(CP_METHODS))]
    for step in ("prefill", "mixed"):
        auto, *others = (m[f"served.{step}.sequence"] for m in methods)
        assert (auto <= np.min(others, axis=0) * (1 + 1e-12)).all()


def test_auto_dispatch_is_the_least_of_its_modes(random_batch: list[Scenario]) -> None:
    auto, *others = (
        columns(in_double(changed(random_batch, "plan", dispatch=float(m))))["served.decode.exchange"] for m in range(5)
    )
    assert (auto <= np.min(others, axis=0) * (1 + 1e-12)).all()


# -------------------------------------------------------------------------------------- invariances


def test_a_row_does_not_depend_on_its_neighbours(random_batch: list[Scenario], single: Columns) -> None:
    order = np.random.default_rng(3).permutation(len(random_batch))
    shuffled = columns(jax.tree.map(np.asarray, estimate(stack([random_batch[i] for i in order]))))
    for name, values in single.items():
        np.testing.assert_array_equal(shuffled[name], values[order], err_msg=name)


def test_nor_on_the_size_of_the_batch(random_batch: list[Scenario], single: Columns) -> None:
    few = columns(jax.tree.map(np.asarray, estimate(stack(random_batch[:3]))))
    for name, values in single.items():
        step = f"{'.'.join(name.split('.')[:2])}.total"
        scale = single.get(step, single["ttft"] if name == "served.queue" else values)[:3]
        # XLA vectorises the rest of a batch apart from its whole lanes: the last bits may differ
        assert (np.abs(few[name] - values[:3]) <= 5e-6 * np.maximum(np.abs(scale), np.abs(values[:3]))).all(), name


# ------------------------------------------------------------------------------------------- overlap

RULE = {name: float(i) for i, name in enumerate(OVERLAPS)}


def random_times(seed: int, n: int = 2000) -> LayerTimes:
    rng = np.random.default_rng(seed)
    names = ("attention", "shared", "routed", "reduce", "dispatch", "combine")
    parts = {name: np.array([log_uniform(rng, 1e-6, 1e-3) for _ in range(n)]) for name in names}
    return LayerTimes(routed_down=parts["routed"] / 3, **parts)


def test_overlap_rules_are_ordered() -> None:
    """full <= partial <= none. Partial hides a share of the communication, so it is below full where that share is
    longer than all compute: the rule's own formula, left out here.
    """
    c, t = replace(Coefficients(), sm_share=0.0), random_times(1)
    none, partial, full = (np.asarray(overlapped(RULE[rule], t, c)) for rule in ("none", "partial", "full"))
    compute, talk = t.attention + t.shared + t.routed, t.reduce + t.dispatch + t.combine
    possible = c.partial_overlap * talk <= compute
    assert possible.mean() > 0.5
    assert (full[possible] <= partial[possible] * (1 + 1e-6)).all()
    assert (partial <= none * (1 + 1e-6)).all()
    for rule in ("shared_expert", "shallowsim"):
        time = np.asarray(overlapped(RULE[rule], t, c))
        assert (full <= time * (1 + 1e-6)).all()
        assert (time <= none * (1 + 1e-6)).all()
    np.testing.assert_allclose(full, np.maximum(compute, talk), rtol=1e-6)


def test_without_communication_every_rule_is_compute() -> None:
    t = replace(random_times(2), reduce=0.0, dispatch=0.0, combine=0.0)
    for rule in OVERLAPS:
        np.testing.assert_allclose(
            np.asarray(overlapped(RULE[rule], t, Coefficients())), t.attention + t.shared + t.routed, rtol=1e-6
        )


def test_two_batches_lose_where_weights_are_all_the_time(random_batch: list[Scenario]) -> None:
    """One request in flight: its weights are read twice."""
    few = changed(changed(random_batch, "load", concurrency=1.0, draft_tokens=0.0), "plan", overlap_prefill=0.0)
    none = columns(in_double(changed(few, "plan", overlap_decode=RULE["none"])))["served.decode.total"]
    full = columns(in_double(changed(few, "plan", overlap_decode=RULE["full"])))["served.decode.total"]
    two = columns(in_double(changed(few, "plan", overlap_decode=RULE["two_batch"])))["served.decode.total"]
    assert (two > full).all()
    assert (two > none).mean() > 0.6


# -------------------------------------------------------------------------------- pipeline, memory, units


def test_pipeline_bubbles(random_batch: list[Scenario]) -> None:
    """A static batch of one prompt of exactly one chunk: the pipeline gives nothing, M chunks of P stages idle
    (P-1)/(P-1+M) of the time.
    """
    plain = changed(single_gpu(random_batch), "load", static_batch=1.0, concurrency=1.0, prefix_hit=0.0, waves=1.0)
    plain = [replace(x, coefficients=replace(x.coefficients, arrival_overhead=0.0)) for x in plain]
    for pieces, stages in ((1.0, 4.0), (8.0, 4.0)):
        cut = changed(changed(plain, "load", chunk=1024.0, isl=1024.0 * pieces), "plan", pp=stages)
        links = scaled(scaled(cut, "levels", 1e12, "bandwidth"), "levels", 0.0, "latency")
        free = [replace(x, coefficients=replace(x.coefficients, all_to_all_base=0.0)) for x in links]
        got = columns(in_double(free))
        fits = got["memory.requests"] >= 1
        once = got["served.prefill.head"] + got["served.prefill.overhead"]  # not what every stage does
        layers = got["served.prefill.total"] - once
        busy = pieces * layers / (got["ttft"] - pieces * once)
        np.testing.assert_allclose(busy[fits], 1 - (stages - 1) / (stages - 1 + pieces), rtol=1e-6)


def test_memory_is_the_sum_of_its_parts(random_batch: list[Scenario], double: Columns) -> None:
    parts = sum(double[f"memory.{name}"] for name in ("weights", "kv", "activations", "buffers", "reserve"))
    np.testing.assert_allclose(double["memory.total"], parts, rtol=1e-12)
    asked = np.array([max(x.load.concurrency / x.plan.attention_dp, 1.0) for x in random_batch])
    fits = double["memory.total"] <= double["memory.usable"]
    near = np.abs(double["memory.requests"] / asked - 1) < 1e-9
    np.testing.assert_array_equal(fits[~near], (double["memory.requests"] >= asked)[~near])
    np.testing.assert_allclose(double["memory.kv"], double["memory.kv_request"] * asked, rtol=1e-12)


def test_metrics_hang_together(random_batch: list[Scenario], double: Columns) -> None:
    """Units: seconds, tokens/s a GPU, USD a million tokens, joules a token."""
    load = {k: np.array([getattr(x.load, k) for x in random_batch]) for k in ("isl", "osl", "concurrency")}
    price, power = (np.array([getattr(x.device, k) for x in random_batch]) for k in ("price", "power"))
    e2e = double["ttft"] + np.maximum(load["osl"] - 1, 0) * double["tpot"]
    replicas = np.array([x.plan.replicas for x in random_batch])
    gpus = double["gpus"] / replicas
    checks = {
        "e2e": e2e,
        "output_rate": load["concurrency"] * load["osl"] / e2e / gpus,
        "total_rate": load["concurrency"] * (load["osl"] + load["isl"]) / e2e / gpus,
        "request_rate": load["concurrency"] / e2e * replicas,
        "user_rate": 1 / double["tpot"],
        "usd_per_mtok": price / 3600 / double["output_rate"] * 1e6,
        "joules_per_token": power / double["output_rate"],
    }
    for name, value in checks.items():
        np.testing.assert_allclose(double[name], value, rtol=1e-12, err_msg=name)
    assert (double["served.queue"] <= double["ttft"]).all()


def test_replicas_multiply_requests_and_nothing_else(random_batch: list[Scenario], double: Columns) -> None:
    tripled = columns(in_double([replace(x, plan=replace(x.plan, replicas=3 * x.plan.replicas)) for x in random_batch]))
    for name, values in double.items():
        factor = 3.0 if name in ("request_rate", "gpus") else 1.0
        np.testing.assert_allclose(tripled[name], factor * values, rtol=1e-12, err_msg=name)
