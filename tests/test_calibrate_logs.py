"""Runs read from result files of benchmark tools: requests, loads and times as the tools saw them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from logs_written import (
    CONCURRENCY,
    FORMATS,
    GIVEN,
    Requests,
    aiperf_json,
    block,
    inference_perf_json,
    only_row,
    sglang_json,
    some_requests,
    vllm_json,
    why_not,
    written,
)

from dse.calibrate.logs import read_log
from dse.errors import InputError


@pytest.fixture(scope="module")
def requests() -> Requests:
    return some_requests()


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
    for text, says in [
        ("- h200", "holds no columns"),
        ("gpu: h200\ngpu: h100", "line 2: not valid YAML: key 'gpu' is written twice"),
        ("gpu: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("gpu: [", "line 2: not valid YAML"),
    ]:
        (tmp_path / "10.0.json.yaml").write_text(text)
        with pytest.raises(InputError, match=r"10\.0\.json\.yaml.*" + says):
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
    for text, says in [
        ("server: sglang", "server: 'sglang' is not keys with values"),
        ("just words", "server: 'just words' is not"),
        ("server: {}\nserver: {}", "line 2: not valid YAML: key 'server' is written twice"),
        ("server: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
    ]:
        (tmp_path / "config.yaml").write_text(text)
        assert says in why_not(path)


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
