"""Result files of benchmark tools: each written here as its tool writes it, from requests whose times are known."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dse.calibrate.logs import is_log, parse_given, read_log
from dse.calibrate.observations import read_serving
from dse.calibrate.read import read_files
from dse.errors import InputError

GIVEN = {"gpu": "h100", "tp": "1", "weights": "bf16", "engine": "vllm", "model": "meta-llama/Llama-3.1-8B"}
CONCURRENCY = 16
# As all_reduce_perf of nccl-tests prints it.
NCCL = """# nThread 1 nGpus 2 minBytes 8 maxBytes 16 step: 2(factor) warmup iters: 5 iters: 20 validation: 1
# Collective test starting: all_reduce_perf
# Using devices
#  Rank  0 Group  0 Pid  42 on  node0 device  0 [0x1b] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid  42 on  node0 device  1 [0x43] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
           8             2     float     sum      -1    12.10    0.00    0.00      0    11.90    0.00    0.00      0
          16             4     float     sum      -1    12.20    0.00    0.00      0    11.80    0.00    0.00      0
# Out of bounds values : 0 OK
"""


@dataclass(frozen=True)
class Requests:
    """Seconds and tokens of each request, as a client saw them; the truth that every format must give back."""

    ttft: np.ndarray
    e2e: np.ndarray
    isl: np.ndarray
    osl: np.ndarray
    failed: int = 0

    @property
    def tpot(self) -> np.ndarray:
        some = self.osl > 1
        return (self.e2e[some] - self.ttft[some]) / (self.osl[some] - 1)

    @property
    def duration(self) -> float:
        return float(self.e2e.sum() / CONCURRENCY)


@pytest.fixture(scope="module")
def requests() -> Requests:
    rng = np.random.default_rng(0)
    isl, osl = rng.integers(820, 1025, 160), rng.integers(205, 257, 160)
    ttft = rng.lognormal(np.log(0.08), 0.3, 160)
    return Requests(ttft, ttft + (osl - 1) * rng.lognormal(np.log(0.011), 0.05, 160), isl, osl)


def vllm_json(r: Requests, **changes: Any) -> dict[str, Any]:
    """vllm/benchmarks/serve.py: setup, traffic, then the results, ms."""
    stats: dict[str, float] = {}
    itl = np.repeat(r.tpot, r.osl[r.osl > 1] - 1)
    for name, values in (("ttft", r.ttft), ("tpot", r.tpot), ("itl", itl)):
        ms = values * 1000
        stats |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": np.median(ms), f"std_{name}_ms": ms.std()}
        stats[f"p99_{name}_ms"] = np.percentile(ms, 99)
    return {
        "date": "20260101-000000",
        "endpoint_type": "vllm",
        "backend": "vllm",
        "label": None,
        "model_id": "meta-llama/Llama-3.1-8B",
        "tokenizer_id": "meta-llama/Llama-3.1-8B",
        "num_prompts": len(r.osl) + r.failed,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": CONCURRENCY,
        "duration": r.duration,
        "completed": len(r.osl),
        "failed": r.failed,
        "total_input_tokens": int(r.isl.sum()),
        "total_output_tokens": int(r.osl.sum()),
        "request_throughput": len(r.osl) / r.duration,
        **stats,
    } | changes


def sglang_json(r: Requests, **changes: Any) -> dict[str, Any]:
    """python/sglang/bench_serving.py: arguments, then results, ms; `concurrency` is its own mean in flight."""
    bench = vllm_json(r)
    stats = {k: v for k, v in bench.items() if k.endswith("_ms")}
    return {
        "backend": "sglang",
        "dataset_name": "random",
        "request_rate": math.inf,
        "max_concurrency": CONCURRENCY,
        "sharegpt_output_len": None,
        "random_input_len": 1024,
        "random_output_len": 256,
        "random_range_ratio": 0.8,
        "duration": r.duration,
        "completed": len(r.osl),
        "total_input_tokens": int(r.isl.sum()),
        "total_output_tokens": int(r.osl.sum()),
        "total_output_tokens_retokenized": int(r.osl.sum()) - 3,
        **stats,
        "mean_e2e_latency_ms": r.e2e.mean() * 1000,
        "median_e2e_latency_ms": np.median(r.e2e) * 1000,
        "concurrency": r.e2e.sum() / r.duration,
        "accept_length": None,
    } | changes


def block(values: np.ndarray, unit: str) -> dict[str, Any]:
    points = {f"p{p}": np.percentile(values, p) for p in (25, 50, 90, 99)}
    return {"unit": unit, "avg": values.mean(), **points, "std": values.std(), "count": len(values)}


def aiperf_json(r: Requests, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """profile_export_aiperf.json, schema 1.5; GenAI-Perf's differs by `config` and has no versions."""
    return {
        "schema_version": "1.5",
        "aiperf_version": "0.13.0",
        "was_cancelled": False,
        "input_config": config
        or {
            "models": {"items": [{"name": "meta-llama/Llama-3.1-8B"}]},
            "phases": [{"name": "warmup", "concurrency": 2}, {"name": "profiling", "concurrency": CONCURRENCY}],
        },
        "request_count": {"unit": "requests", "avg": float(len(r.osl))},
        "error_request_count": {"unit": "requests", "avg": float(r.failed)},
        "request_throughput": {"unit": "requests/sec", "avg": len(r.osl) / r.duration},
        "request_latency": block(r.e2e * 1e3, "ms"),
        "time_to_first_token": block(r.ttft * 1e3, "ms"),
        "inter_token_latency": block(r.tpot * 1e3, "ms"),
        "input_sequence_length": block(r.isl, "tokens"),
        "output_sequence_length": block(r.osl, "tokens"),
    } | changes


def inference_perf_json(r: Requests, load: dict[str, Any] | None = None, tokens: float = 1.0) -> dict[str, Any]:
    """stage_0_lifecycle_metrics.json, seconds; `tokens` > 1: TPOT over that many times the tokens (issue 564)."""

    def summary(values: np.ndarray) -> dict[str, float]:
        return {
            "mean": values.mean(),
            "min": values.min(),
            "max": values.max(),
            "median": np.median(values),
            "p99": np.percentile(values, 99),
        }

    latency = {
        "request_latency": summary(r.e2e),
        "time_to_first_token": summary(r.ttft),
        "time_per_output_token": summary(r.tpot / tokens),
        "inter_token_latency": summary(r.tpot / tokens),
    }
    lengths = {"prompt_tokens": {"total": float(r.isl.sum()), **summary(r.isl)}, "output_tokens": summary(r.osl)}
    stage = {"count": len(r.osl), "requested_rate": 5.0, "achieved_rate": 5.0, "concurrency": CONCURRENCY}
    return {
        "load_summary": stage if load is None else load,
        "successes": {
            "count": len(r.osl),
            "latency": latency,
            "throughput": {"requests_per_sec": len(r.osl) / r.duration},
            **lengths,
        },
        "failures": {"count": r.failed, "request_latency": None},
    }


FORMATS = (vllm_json, sglang_json, aiperf_json, inference_perf_json)


def written(folder: Path, data: Any, name: str = "result.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(data, default=float))
    return path


def only_row(path: Path, given: dict[str, str] | None = None) -> dict[str, Any]:
    result = read_log(path, GIVEN if given is None else given)
    assert not result.refused, result.refused
    (row,) = result.rows
    return dict(row)


def why_not(path: Path, given: dict[str, str] | None = None) -> str:
    result = read_log(path, GIVEN if given is None else given)
    assert not result.rows
    return result.refused[0][1]


@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_the_requests_back(make, requests, tmp_path):
    row = only_row(written(tmp_path, make(requests)))
    assert row["measured_ttft_ms"] == pytest.approx(requests.ttft.mean() * 1e3)
    assert row["measured_tpot_ms"] == pytest.approx(requests.tpot.mean() * 1e3)
    assert row["measured_ttft_p99_ms"] == pytest.approx(np.percentile(requests.ttft, 99) * 1e3)
    assert row["measured_tpot_p50_ms"] == pytest.approx(np.median(requests.tpot) * 1e3)
    assert row["isl"] == pytest.approx(requests.isl.mean(), abs=0.051)
    assert row["osl"] == pytest.approx(requests.osl.mean(), abs=0.051)
    assert row["concurrency"] == CONCURRENCY
    assert row["requests"] == len(requests.osl)
    assert row["speculation"] == ""
    assert {row[k] for k in ("gpu", "tp", "weights")} == {"h100", "1", "bf16"}


@pytest.mark.parametrize("make", FORMATS)
def test_failed_requests(make, requests, tmp_path):
    few = Requests(requests.ttft, requests.e2e, requests.isl, requests.osl, failed=4)
    many = Requests(requests.ttft, requests.e2e, requests.isl, requests.osl, failed=40)
    if make is sglang_json:  # it counts only what completed
        assert "no request" in why_not(written(tmp_path, sglang_json(requests, completed=0)))
        return
    assert only_row(written(tmp_path, make(few)))["requests_failed"] == 4
    assert "40 of 200 requests failed" in why_not(written(tmp_path, make(many)))


@pytest.mark.parametrize("make", FORMATS)
def test_what_a_log_does_not_say_must_be_given(make, requests, tmp_path):
    path = written(tmp_path, make(requests))
    text = why_not(path, {"tp": "1"})
    assert "gpu" in text
    assert "gpu=..." in text
    assert "tp=..." not in text
    with pytest.raises(InputError, match=r"unknown column 'gpus'.*gpu"):
        read_log(path, {"gpus": "h100"})


def test_a_sidecar_speaks_for_its_own_file(requests, tmp_path):
    first, second = (written(tmp_path, vllm_json(requests, duration=d), f"{d}.json") for d in (10.0, 20.0))
    (tmp_path / "10.0.json.yaml").write_text("gpu: h200\ntp: 2\n")
    assert only_row(first)["gpu"] == "h200"
    assert only_row(first)["tp"] == "2"
    assert only_row(second)["gpu"] == "h100"
    (tmp_path / "10.0.json.yaml").write_text("- h200\n")
    with pytest.raises(InputError, match=r"10\.0\.json\.yaml"):
        read_log(first, GIVEN)


def test_metadata_of_vllm_bench_is_read(requests, tmp_path):
    """`--metadata tp=4 version=0.17.0 gpu=b200` stands at the top level."""
    path = written(tmp_path, vllm_json(requests, tp="4", version="0.17.0", gpu="b200"))
    row = only_row(path, {"engine": "vllm", "weights": "fp8"})
    assert (row["tp"], row["engine_version"], row["gpu"]) == ("4", "0.17.0", "b200")
    assert row["model"] == "meta-llama/Llama-3.1-8B"


def test_json_lines_hold_several_runs(requests, tmp_path):
    path = tmp_path / "runs.jsonl"
    runs = [sglang_json(requests, max_concurrency=n) for n in (8, CONCURRENCY)]
    path.write_text("".join(json.dumps(run, default=float) + "\n" for run in runs))
    assert [row["concurrency"] for row in read_log(path, GIVEN).rows] == [8, CONCURRENCY]
    assert read_log(path, {**GIVEN, "engine": ""}).rows[0]["engine"] == "sglang"  # nothing given


def test_sglang_native_says_its_engine(requests, tmp_path):
    given = {k: v for k, v in GIVEN.items() if k != "engine"}
    assert only_row(written(tmp_path, sglang_json(requests)), given)["engine"] == "sglang"
    assert "engine" in why_not(written(tmp_path, sglang_json(requests, backend="sglang-oai")), given)


# ------------------------------------------------------------------------------------------------ loads


def test_open_loops_are_refused_or_taken_at_littles_law(requests, tmp_path):
    mean_in_flight = len(requests.osl) / requests.duration * requests.e2e.mean()
    open_loop = {"request_rate": 5.0, "max_concurrency": None}
    e2el = {"mean_e2el_ms": requests.e2e.mean() * 1e3}
    for data in (
        vllm_json(requests, **open_loop, **e2el),
        sglang_json(requests, **open_loop),
        aiperf_json(requests, {"loadgen": {"request_rate": 5.0}, "endpoint": {"model_names": ["x"]}}),
        inference_perf_json(requests, {"count": 160, "requested_rate": 5.0, "achieved_rate": 4.9}),
    ):
        path = written(tmp_path, data)
        assert "open loop (5 requests/s)" in why_not(path)
        row = only_row(path, {**GIVEN, "concurrency": "little"})
        assert row["concurrency"] == pytest.approx(mean_in_flight, abs=0.01)
        assert "Little" in row["note"]
        assert only_row(path, {**GIVEN, "concurrency": "12"})["concurrency"] == 12
    no_latency = written(tmp_path, vllm_json(requests, **open_loop))
    assert "needs the mean request latency" in why_not(no_latency, {**GIVEN, "concurrency": "little"})


def test_a_rate_held_at_its_cap_is_a_closed_loop(requests, tmp_path):
    """Little's law gives the cap itself: the rate was never reached."""
    row = only_row(written(tmp_path, sglang_json(requests, request_rate=50.0)))
    assert row["concurrency"] == CONCURRENCY
    assert "held at its cap" in row["note"]
    path = written(tmp_path, sglang_json(requests, request_rate=5.0, max_concurrency=4 * CONCURRENCY))
    assert "open loop" in why_not(path)


def test_everything_at_once_has_no_concurrency(requests, tmp_path):
    assert "sent at once" in why_not(written(tmp_path, vllm_json(requests, max_concurrency=None)))
    assert "trace" in why_not(written(tmp_path, sglang_json(requests, request_rate="trace")))


def test_fewer_requests_than_the_cap(requests, tmp_path):
    row = only_row(written(tmp_path, vllm_json(requests, max_concurrency=512)))
    assert row["concurrency"] == len(requests.osl)
    assert "one wave" in row["note"]


def test_a_summary_over_stages_is_no_run(requests, tmp_path):
    assert "stage_N" in why_not(written(tmp_path, inference_perf_json(requests, {"count": 160})))


def test_config_beside_inference_perf_says_model_and_server(requests, tmp_path):
    path = written(tmp_path, inference_perf_json(requests), "stage_0_lifecycle_metrics.json")
    (tmp_path / "config.yaml").write_text("server: {type: sglang, model_name: Qwen/Qwen3-32B}\n")
    row = only_row(path, {"gpu": "h100", "tp": "1", "weights": "bf16"})
    assert (row["model"], row["engine"]) == ("Qwen/Qwen3-32B", "sglang")


def test_genai_perf_and_the_older_places_of_aiperf(requests, tmp_path):
    old = {"model": ["meta-llama/Llama-3.1-8B"], "service_kind": "triton", "backend": "tensorrtllm", "concurrency": 8}
    data = aiperf_json(requests, old)
    del data["schema_version"], data["aiperf_version"], data["error_request_count"], data["request_count"]
    row = only_row(written(tmp_path, data), {"gpu": "h100", "tp": "1", "weights": "fp8"})
    assert (row["tool"], row["engine"], row["concurrency"]) == ("GenAI-Perf", "trtllm", 8)
    assert math.isnan(row["requests"])
    middle = {"endpoint": {"model_names": ["Qwen/Qwen3-32B"]}, "loadgen": {"concurrency": 4}}
    row = only_row(written(tmp_path, aiperf_json(requests, middle)), {k: v for k, v in GIVEN.items() if k != "model"})
    assert (row["model"], row["concurrency"]) == ("Qwen/Qwen3-32B", 4)


# ------------------------------------------------------------------------------------------------ times


def test_units_are_the_files_own(requests, tmp_path):
    seconds = block(requests.ttft, "s")
    row = only_row(written(tmp_path, aiperf_json(requests, time_to_first_token=seconds)))
    assert row["measured_ttft_ms"] == pytest.approx(requests.ttft.mean() * 1e3)
    assert "fortnights" in why_not(
        written(tmp_path, aiperf_json(requests, time_to_first_token=block(requests.ttft, "fortnights")))
    )


def test_tokens_counted_twice_do_not_halve_tpot(requests, tmp_path):
    """inference-perf before its issue 564: TPOT over twice the tokens; latency, TTFT and length say what it is."""
    row = only_row(written(tmp_path, inference_perf_json(requests, tokens=2.0)))
    expected = (requests.e2e.mean() - requests.ttft.mean()) / (requests.osl.mean() - 1) * 1e3
    assert row["measured_tpot_ms"] == pytest.approx(expected, rel=1e-3)
    assert "does not agree" in row["note"]


def test_tokens_counted_five_times_are_refused(requests, tmp_path):
    """GenAI-Perf 24.11 counted about 2 566 tokens where 500 were asked (perf_analyzer issue 298)."""
    config = {"model": ["m"], "concurrency": 8, "output_tokens_mean": 50}
    assert "counted wrongly" in why_not(written(tmp_path, aiperf_json(requests, config)))


def test_one_token_has_no_tpot(tmp_path):
    r = Requests(np.full(8, 0.1), np.full(8, 0.1), np.full(8, 512), np.ones(8, int))
    data = vllm_json(Requests(r.ttft, r.e2e + 0.1, r.isl, r.osl + 1))
    row = only_row(written(tmp_path, data | {"total_output_tokens": 8, "mean_tpot_ms": 0.0}))
    assert math.isnan(row["measured_tpot_ms"])
    assert row["measured_ttft_ms"] == pytest.approx(100.0)


def test_chunks_of_several_tokens_are_not_tpot(requests, tmp_path):
    """ITL of two tokens a chunk is twice the TPOT; who speculated, or streamed at intervals, has to say."""
    data = vllm_json(requests)
    row = only_row(written(tmp_path, data | {"mean_itl_ms": 2 * data["mean_tpot_ms"]}))
    assert row["measured_tpot_ms"] == pytest.approx(requests.tpot.mean() * 1e3)
    assert row["speculation"] == "unknown"
    assert "chunks of 2 tokens" in row["note"]
    said = only_row(written(tmp_path, data | {"spec_decode_acceptance_length": 2.4}))
    assert said["speculation"] == "yes"
    assert only_row(written(tmp_path, sglang_json(requests, accept_length=2.1)))["speculation"] == "yes"


def test_a_run_that_was_not_streamed(requests, tmp_path):
    data = aiperf_json(requests, time_to_first_token=block(requests.e2e * 1e3, "ms"))
    del data["inter_token_latency"]
    assert "not streamed" in why_not(written(tmp_path, data))
    assert "cancelled" in why_not(written(tmp_path, aiperf_json(requests, was_cancelled=True)))


def test_medians_where_there_are_no_means(requests, tmp_path):
    data = {k: v for k, v in vllm_json(requests).items() if k not in ("mean_ttft_ms", "mean_tpot_ms")}
    row = only_row(written(tmp_path, data))
    assert row["measured_ttft_ms"] == pytest.approx(np.median(requests.ttft) * 1e3)
    assert row["note"] == "TTFT is the median; TPOT is the median"


# ------------------------------------------------------------------------------------------------ files


def test_rows_serve_the_fit(requests, tmp_path):
    paths = [written(tmp_path, make(requests), f"{make.__name__}.json") for make in FORMATS]
    tables = read_files(paths, GIVEN)
    assert tables.serving is not None
    assert list(tables.serving["file"]) == [path.name for path in paths]
    data = read_serving(tables.serving)
    assert len(data) == 4
    assert not data.refused


def test_files_are_told_apart_by_what_is_in_them(requests, tmp_path):
    runs = pd.DataFrame([{**GIVEN, "isl": 1024, "osl": 256, "measured_ttft_ms": 9.5, "measured_tpot_ms": 2.0}])
    steps = pd.DataFrame([{"model": "llama-2-70b", "tp": 4, "cycle_us": 2e4, "batch_prefill_tokens": 0.0}])
    gemm = pd.DataFrame([{"gpu": "h100", "gemm_dtype": "fp8", "m": 1, "n": 2, "k": 3, "latency": 0.1}])
    attention = {"gpu": "h100", "attn_dtype": "bf16", "kv_cache_dtype": "fp8", "batch_size": 1, "step": 7}
    prefill = pd.DataFrame([{**attention, "isl": 1, "latency": 0.1}, {**attention, "isl": 9, "latency": 0.2}])
    ring = {"system": "dgx", "op": "all_reduce", "num_workers": 2, "devices_per_node": 2, "message_bytes": 8}
    files = {
        "runs.csv": runs,
        "steps.csv": steps.assign(batch_decode_tokens=4.0),
        "a.csv": gemm,
        "b.csv": prefill,
        "c.csv": prefill[prefill["isl"] == 1],
        "d.csv": pd.DataFrame([{**ring, "median_ms": 0.02}]),
    }
    for name, frame in files.items():
        frame.to_csv(tmp_path / name, index=False)
    log = written(tmp_path, vllm_json(requests))
    (tmp_path / "out.txt").write_text(NCCL)
    tables = read_files([*(tmp_path / name for name in (*files, "out.txt")), log], GIVEN)
    assert tables.serving is not None
    assert tables.steps is not None
    assert list(tables.serving["file"]) == ["runs.csv", "result.json"]
    assert tables.serving["moe_ep"].tolist() == ["", ""]  # no file said it: text, not NaN
    assert tables.serving["note"].map(type).tolist() == [str, str]
    assert len(tables.steps) == 1
    assert tables.collectives is not None
    assert len(tables.collectives) == 1
    assert {op: len(frame) for op, frame in tables.kernels.items()} == {
        "gemm": 1,
        "nccl_tests": 4,
        "context_attention": 2,
        "generation_attention": 1,
    }


def test_rows_that_stand_twice_are_listed(requests, tmp_path):
    first = written(tmp_path, [vllm_json(requests), vllm_json(requests, max_concurrency=8)], "first.json")
    second = written(tmp_path, vllm_json(requests), "second.json")
    tables = read_files([first, second], GIVEN)
    assert tables.serving is not None
    assert len(tables.serving) == 2
    (refusal,) = tables.refused
    assert (refusal.source, refusal.row) == ("second.json", 0)
    assert "row 0 of first.json" in refusal.reason


def test_refusals_name_their_file(requests, tmp_path):
    good = written(tmp_path, vllm_json(requests), "good.json")
    bad = written(tmp_path, vllm_json(requests, max_concurrency=None), "bad.json")
    tables = read_files([good, bad], GIVEN)
    assert [(r.source, r.row) for r in tables.refused] == [("bad.json", 0)]
    with pytest.raises(InputError, match=r"bad\.json: all 160 requests"):
        read_files([bad], GIVEN)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x.json", '{"answer": 42}', "JSON file of another kind"),
        ("x.json", '{"model_id": ', "not JSON"),
        ("x.csv", "model,gpu,isl,osl,measured_tpot_ms\n", "nearest to serving, which needs measured_ttft_ms"),
        ("x.csv", "\x00\x01\x02", "Known: serving runs"),
        ("x.csv", "a,a\n1,2\n", "cannot tell"),
    ],
)
def test_files_that_cannot_be_told(name, text, why, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=why):
        read_files([tmp_path / name])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_files([tmp_path / "none.csv"])
    with pytest.raises(InputError, match="is a directory"):
        read_files([tmp_path])


def test_given_fills_what_a_table_lacks(tmp_path):
    runs = pd.DataFrame([{"model": "Llama-3.1-8B", "isl": 1024, "osl": 256, "tp": 2}])
    runs.assign(measured_ttft_ms=9.5, measured_tpot_ms=2.0).to_csv(tmp_path / "runs.csv", index=False)
    tables = read_files([tmp_path / "runs.csv"], {"gpu": "h200", "tp": "8"})
    assert tables.serving is not None
    assert tables.serving[["gpu", "tp"]].iloc[0].tolist() == ["h200", "2"]


def test_pairs_of_a_command_line():
    assert parse_given(["gpu=h100", "tp = 8"]) == {"gpu": "h100", "tp": "8"}
    with pytest.raises(InputError, match="COLUMN=VALUE"):
        parse_given(["gpu"])


def test_json_of_other_kinds_is_no_log():
    assert not is_log([1, 2])
    assert not is_log({"successes": 3})
