"""Files of measurements: told apart by what is in them, refused with their names, each row once."""

from __future__ import annotations

import pandas as pd
import pytest
from logs_written import (
    FORMATS,
    GIVEN,
    Requests,
    some_requests,
    vllm_json,
    written,
)

from dse.calibrate.logs import is_log, parse_given
from dse.calibrate.observations import read_serving
from dse.calibrate.read import read_files
from dse.errors import InputError

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


@pytest.fixture(scope="module")
def requests() -> Requests:
    return some_requests()


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
