"""Collectives against measurements: readers and refusals, limits, the law of each line, and the figures held to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from dse.calibrate.collective_calls import Exchange, Transfer, exchange_seconds, log_seconds, transfer_seconds
from dse.calibrate.collectives import collective_source, estimate_collectives, read_collectives
from dse.calibrate.fit import cross_validate, folds
from dse.calibrate.parameters import FREE, Layout
from dse.catalog import hardware
from dse.catalog.coefficients import coefficient_set
from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.types import Routed, replace
from dse.errors import InputError

MEASURED = Path(__file__).parents[2] / "shared" / "measured"
measured_only = pytest.mark.skipif(not MEASURED.exists(), reason="the measured tables are not here")

NCCL = pd.DataFrame(
    {
        "gpu": ["h100", "NVIDIA H200", "b200", "mi300x"],
        "op_name": ["all_reduce", "all_gather", "alltoall", "reduce_scatter"],
        "nccl_dtype": ["half", "int8", "half", "half"],
        "num_gpus": [8, 4, 2, 8],
        "message_size": [1024, 1 << 20, 1 << 24, 1 << 28],
        "latency": [0.016, 0.0136, 0.049, 3.0],
    }
)
EXCHANGES = pd.DataFrame(
    {
        "gpu": ["h100", "b200", "h800"],
        "node_num": [1, 1, 4],
        "hidden_size": [7168, 4096, 7168],
        "num_token": [4096, 128, 128],
        "num_topk": [8, 6, 8],
        "num_experts": [256, 128, 256],
        "dispatch_sms": [20, 8, 24],
    }
)
EXCHANGED = {"dispatch_transmit_us": "predicted_dispatch_us", "combine_transmit_us": "predicted_combine_us"}


# ------------------------------------------------------------------------------------------------- prices


def test_every_operation_is_priced_from_the_prior() -> None:
    for op, table in (
        ("nccl", NCCL),
        ("custom_allreduce", NCCL.rename(columns={"nccl_dtype": "allreduce_dtype"})),
        ("wideep_deepep_normal", EXCHANGES),
        ("wideep_deepep_ll", EXCHANGES.drop(columns="dispatch_sms")),
    ):
        got = estimate_collectives(op, table, "physics")
        predicted = [name for name in got.columns if str(name).startswith("predicted")]
        assert predicted == (
            ["predicted_ms"] if "node_num" not in table else ["predicted_dispatch_us", "predicted_combine_us"]
        )
        assert (got["reason"] == "").all()
        assert (got[predicted] > 0).all(axis=None)
        assert list(got.columns[: len(table.columns)]) == list(table.columns)


def test_measured_columns_are_never_read() -> None:
    other = NCCL.assign(latency=np.nan)
    one, two = (estimate_collectives("nccl", t, "physics")["predicted_ms"] for t in (NCCL, other))
    assert (one == two).all()
    bare = estimate_collectives("nccl", NCCL.drop(columns="latency"), "physics")
    assert (bare["predicted_ms"] == one).all()


def test_one_rank_costs_nothing() -> None:
    got = estimate_collectives("nccl", NCCL.assign(num_gpus=1), "physics")
    assert (got["predicted_ms"] == 0).all()


def test_a_table_is_priced_by_the_lines_of_the_cost_model() -> None:
    """H100, 8 ranks, 2 KiB: the LL ring; the same number as by hand."""
    topology, c = hardware.to_topology(hardware.cluster("h100-dgx")), Coefficients()
    line = coll.nccl_all_reduce(topology, coll.group(topology, 8.0, 1.0), c)[2]
    by_hand = c.collective_base + 14 * c.hop_ll * 1.9e-6 + 2 * 7 / 8 * 2048 / (450e9 * c.link_ll)
    assert float(line(2048.0)) == pytest.approx(by_hand, rel=1e-6)
    got = estimate_collectives("nccl", NCCL, "physics")["predicted_ms"][0]
    assert got == pytest.approx(by_hand * 1e3, rel=1e-6)


def test_bad_rows_get_a_reason_and_stop_nobody() -> None:
    table = pd.concat([NCCL] * 2, ignore_index=True).astype({"message_size": object, "num_gpus": object})
    table.loc[1, "gpu"] = "h1000"
    table.loc[2, "op_name"] = "broadcast"
    table.loc[3, "nccl_dtype"] = "string"
    table.loc[4, "num_gpus"] = 2.5
    table.loc[5, "message_size"] = "many"
    got = estimate_collectives("nccl", table, "physics")
    words = {1: "unknown gpu 'h1000'", 2: "op_name = 'broadcast'", 3: "'string'", 4: "num_gpus = 2.5", 5: "'many'"}
    for row, word in words.items():
        assert word in got["reason"][row]
        assert np.isnan(got["predicted_ms"][row])
    fine = [0, 6, 7]
    assert (got["reason"][fine] == "").all()
    assert got["predicted_ms"][fine].notna().all()


def test_unusable_tables_are_one_error() -> None:
    with pytest.raises(InputError, match="columns num_gpus missing"):
        estimate_collectives("nccl", NCCL.drop(columns="num_gpus"))
    with pytest.raises(InputError, match=r"unknown collective 'ncc' \(nearest: nccl"):
        estimate_collectives("ncc", NCCL)


def test_more_sms_copy_faster_until_the_links_are_full() -> None:
    table = pd.concat([EXCHANGES.iloc[[0]]] * 5, ignore_index=True).assign(dispatch_sms=[4, 8, 16, 32, 64])
    times = estimate_collectives("wideep_deepep_normal", table, "physics")["predicted_dispatch_us"].to_numpy()
    assert (np.diff(times) < 0).all()
    assert times[0] / times[1] > 1.8
    assert times[3] / times[4] < 1.15


def test_tensorrt_llm_exchanges_over_nvlink_with_all_sms() -> None:
    """Published for GB200, EP 8, DeepSeek-V3's sizes in bf16, every token to every rank (TensorRT-LLM's blog 18)."""
    published = {512: (89.5, 91.7), 1024: (166.3, 175.6), 2048: (311.8, 322.6)}  # tokens a rank: us
    topology = hardware.to_topology(hardware.cluster(hardware.gpu("gb200").default_cluster))
    everywhere = Routed(experts=256.0, top_k=256.0, d_in=7168.0, width=2048.0, matrices=3.0)
    g = coll.group(topology, 8.0, 1.0)
    seen = []
    for engine in ("trtllm", "sglang"):
        c = coefficient_set().of("blackwell", "gb200", engine)
        lines = [way(topology, g, everywhere, 2.0, 2 * 7168.0, c) for way in (coll.dispatch, coll.combine)]
        pairs = [
            (line(float(n)) * 1e6, us) for n, both in published.items() for line, us in zip(lines, both, strict=True)
        ]
        seen.append(np.array([float(ours) / us for ours, us in pairs]))
    assert abs(seen[0] - 1.0).max() < 0.15
    assert (seen[1] > seen[0]).all()  # twenty SMs


def test_few_tokens_go_by_low_latency_and_many_by_throughput() -> None:
    topology, c = hardware.to_topology(hardware.cluster("h100-dgx")), Coefficients()
    routed = Routed(experts=256.0, top_k=8.0, d_in=7168.0, width=2048.0, matrices=3.0)
    for of in (coll.dispatch, coll.combine):
        pipelined, series, low = of(topology, coll.group(topology, 8.0, 1.0), routed, 0.0, 7168.0, c).lines
        assert low(16.0) < min(series(16.0), pipelined(16.0))
        assert pipelined(8192.0) < min(series(8192.0), low(8192.0))
        deduplicated = of(topology, coll.group(topology, 8.0, 1.0), routed, 2.0, 7168.0, c)
        assert float(deduplicated(16.0)) == float(series(16.0))


def test_the_default_all_reduce_of_eight_h100_is_one_shot_then_a_protocol_then_multicast() -> None:
    topology, c = hardware.to_topology(hardware.cluster("h100-dgx")), Coefficients()
    lines = coll.all_reduce(topology, coll.group(topology, 8.0, 1.0), c)
    best = [int(np.argmin([float(line(size)) for line in lines])) for size in (8192.0, 262144.0, 6.7e7, 1e9)]
    assert best == [4, 4, 3, 3]


# --------------------------------------------------------------------------------------------- observations


def test_refusals_are_listed() -> None:
    again = NCCL.iloc[[0]]
    fast = NCCL.iloc[[3]].assign(latency=0.3)  # 512 MiB over 448 GB/s take 1.05 ms: this is another unit
    nothing, single = NCCL.iloc[[1]].assign(latency=np.nan), NCCL.iloc[[1]].assign(num_gpus=1)
    rows = read_collectives(pd.concat([NCCL, again, fast, nothing, single], ignore_index=True), "nccl")
    assert len(rows) == 4
    assert [r.row for r in rows.refused] == [4, 5, 6, 7]
    assert rows.refused[0].reason == "the same row again"
    assert rows.refused[1].reason.startswith("300 us; the links alone need 1049 us")
    assert "not a positive number" in rows.refused[2].reason
    assert rows.refused[3].reason == "one rank moves nothing"
    assert rows.measured[:, 0] == pytest.approx(np.log(NCCL["latency"] * 1e-3))
    assert rows.labels["gpu"] == ["h100", "h200", "b200", "mi300x"]
    assert rows.labels["engine"] == [""] * 4


def test_nothing_usable_is_one_error() -> None:
    with pytest.raises(InputError, match="no row can serve the fit"):
        read_collectives(NCCL.assign(latency=-1.0), "nccl")
    with pytest.raises(InputError, match="measured columns latency missing"):
        read_collectives(NCCL.drop(columns="latency"), "nccl")


def test_ranks_spread_over_nodes() -> None:
    table = pd.DataFrame(
        {
            "system": ["h100_dgx"] * 3,
            "op": ["all_reduce", "all_reduce", "send_recv"],
            "num_workers": [4, 16, 2],
            "devices_per_node": [2, 8, 1],
            "message_bytes": [1 << 24] * 3,
            "median_ms": [2.0, 2.0, 2.0],
        }
    )
    rows = read_collectives(table, "dgx")
    assert isinstance(rows.inputs, Transfer)
    shapes = [coll.group(rows.inputs.topology, n, s) for n, s in zip(rows.inputs.n, rows.inputs.stride, strict=True)]
    within = [[float(level[i]) for level in shape.within] for i, shape in enumerate(shapes)]
    assert [w[0] for w in within] == [2.0, 8.0, 1.0]


# --------------------------------------------------------------------------------------------------- the fit


def test_a_row_is_differentiable_in_every_coefficient() -> None:
    """Against central differences, in float64."""
    source = read_collectives(NCCL, "nccl"), _exchange_rows()
    own = [f.name for f in FREE]
    for rows in source:
        with jax.enable_x64(True):
            logs = jnp.log(jnp.array([float(getattr(Coefficients(), name)) for name in own]))

            def total(logs: Any, rows: Any = rows) -> Any:
                c = replace(Coefficients(), **{name: jnp.exp(logs[i]) for i, name in enumerate(own)})
                return jax.vmap(lambda x: log_seconds(c, x))(rows.inputs).sum()

            slope, total = np.asarray(jax.jit(jax.grad(total))(logs)), jax.jit(total)
            for i in range(len(own)):
                step = jnp.zeros(len(own)).at[i].set(1e-5)
                assert slope[i] == pytest.approx(float(total(logs + step) - total(logs - step)) / 2e-5, abs=1e-6)
        assert np.isfinite(slope).all()
        assert (slope != 0).sum() >= 6


def _exchange_rows() -> Any:
    table = EXCHANGES.assign(dispatch_transmit_us=[500.0, 60.0, 200.0], combine_transmit_us=[1000.0, 90.0, 300.0])
    return read_collectives(table, "wideep_deepep_normal")


def test_a_source_of_the_joint_fit_predicts_what_the_rows_do() -> None:
    rows = _exchange_rows()
    source = collective_source(rows)
    logs = np.log([[float(getattr(Coefficients(), f.name)) for f in FREE]] * len(rows))
    got = np.exp(source.log_seconds(logs))
    with jax.enable_x64(True):
        assert isinstance(rows.inputs, Exchange)
        dispatch, combine = jax.vmap(lambda x: exchange_seconds(Coefficients(), x))(rows.inputs)
    np.testing.assert_allclose(got, np.stack([dispatch, combine], axis=1), rtol=1e-9)
    assert source.slopes(logs).shape == (3, 2, len(FREE))


def test_no_transfer_is_slower_for_having_a_faster_network() -> None:
    rows = read_collectives(NCCL, "nccl").inputs
    assert isinstance(rows, Transfer)
    levels = tuple(replace(x, bandwidth=x.bandwidth * 2.0, latency=x.latency / 2.0) for x in rows.topology.levels)
    fast = replace(rows, topology=replace(rows.topology, levels=levels))
    one, two = (jax.vmap(lambda x: transfer_seconds(Coefficients(), x))(r) for r in (rows, fast))
    assert (np.asarray(two) < np.asarray(one)).all()


# ------------------------------------------------------------------------------------------ figures held to


def held_out(kinds: tuple[str, ...], column: str, folds_of: int, every: int) -> np.ndarray:
    """Errors (n, k) of the first kind's rows by fits that never saw their fold of `column`; each `every`th row."""
    tables = [pd.read_parquet(MEASURED / "kernels" / f"{kind}.parquet").iloc[::every] for kind in kinds]
    rows = [read_collectives(table, kind) for table, kind in zip(tables, kinds, strict=True)]
    sources = [collective_source(r) for r in rows]
    layout = Layout.of([s.labels for s in sources])
    found = cross_validate(sources, layout, 0, folds(rows[0].frame[column].astype(str).to_numpy(), folds_of))
    return np.abs(np.exp(found.predicted - sources[0].measured) - 1.0)


@measured_only
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kinds", "column", "every"),
    [
        (("nccl", "custom_allreduce"), "message_size", 1),
        (("custom_allreduce", "nccl"), "message_size", 1),
        (("wideep_deepep_normal",), "num_token", 4),
        (("wideep_deepep_ll",), "num_token", 1),
    ],
)
def test_unseen_sizes_within_ten_percent(kinds: tuple[str, ...], column: str, every: int) -> None:
    assert (np.median(held_out(kinds, column, 5, every), axis=0) <= 0.10).all()


@measured_only
@pytest.mark.slow
def test_a_gpu_left_out_within_twenty_percent() -> None:
    assert np.median(held_out(("nccl", "custom_allreduce"), "gpu", 0, 2)) <= 0.20
    assert (np.median(held_out(("wideep_deepep_ll",), "gpu", 0, 1), axis=0) <= 0.20).all()


@measured_only
def test_defaults_without_factors_stay_within_a_quarter() -> None:
    """The defaults, no GPU's own factors: half of all rows of any table within 25%.

    They are rounded from a fit to these tables (source [C]): a guard against drift, no word about new rows.
    """
    for kind, pairs in (
        ("nccl", {"latency": "predicted_ms"}),
        ("custom_allreduce", {"latency": "predicted_ms"}),
        ("wideep_deepep_normal", EXCHANGED),
        (
            "wideep_deepep_ll",
            {"dispatch_avg_t_us": "predicted_dispatch_us", "combine_avg_t_us": "predicted_combine_us"},
        ),
    ):
        table = pd.read_parquet(MEASURED / "kernels" / f"{kind}.parquet")
        got = estimate_collectives(kind, table, "physics")
        assert (got["reason"] == "").all()
        for name, predicted in pairs.items():
            assert (got[predicted] / table[name] - 1.0).abs().median() <= 0.25


@measured_only
def test_published_deepep_figures_across_nodes() -> None:
    """DeepEP on H800, low latency, EP 16-256, 128 tokens a rank: within a quarter, 12% in the median.

    Not a held-out check: `link_network` was chosen with these figures in view; everything else was not.
    """
    table = pd.read_csv(MEASURED / "collectives_multinode.csv")
    table = table[table["op"].str.startswith("deepep_ll") & (table["n_ranks"] > 8)].reset_index(drop=True)
    calls = pd.DataFrame(
        {"gpu": "h800", "node_num": table["n_nodes"], "hidden_size": 7168, "num_token": 128, "num_topk": 8}
    ).assign(num_experts=256)
    got = estimate_collectives("wideep_deepep_ll", calls, "physics")
    predicted = got["predicted_dispatch_us"].where(table["op"].str.endswith("dispatch"), got["predicted_combine_us"])
    error = (predicted / table["time_us"] - 1.0).abs()
    assert len(error) == 10
    assert error.max() <= 0.25
    assert error.median() <= 0.12


@measured_only
def test_every_row_of_the_tables_is_accounted_for() -> None:
    for kind, path in (("dgx", "collectives_dgx.csv"), ("multinode", "collectives_multinode.csv")):
        table = pd.read_csv(MEASURED / path)
        rows = read_collectives(table, kind)
        assert len(rows) + len(rows.refused) == len(table)
        assert all(r.reason for r in rows.refused)
