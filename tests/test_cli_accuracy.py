"""`dse accuracy` on the command line: files of several kinds in, errors, pages and the other method out."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from results import assert_well_formed
from test_calibrate_logs import GIVEN, requests, vllm_json, written
from test_cli import run

__all__ = ["requests"]  # a fixture


def test_unknown_methods_and_files_are_one_message(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "accuracy", "x.csv", "--compare", "corrected-rooflin")
    assert code == 2
    assert "corrected-roofline" in err
    code, _, err = run(monkeypatch, capsys, "accuracy", tmp_path / "none.json")
    assert code == 2
    assert "does not exist" in err
    assert err.count("\n") == 1


def test_logs_without_the_gpu_are_refused_by_name(monkeypatch, capsys, tmp_path, requests):
    path = written(tmp_path, vllm_json(requests), "run.json")
    code, _, err = run(monkeypatch, capsys, "accuracy", path)
    assert code == 2
    assert "run.json" in err
    assert "gpu=..." in err


@pytest.mark.slow
def test_pages_and_the_other_method(monkeypatch, capsys, tmp_path, requests):
    """Logs of two loads and a table of others, cross-validated, with the corrected roofline beside."""
    logs = [
        written(
            tmp_path,
            vllm_json(requests, max_concurrency=n, mean_tpot_ms=8.0 + n / 4, mean_itl_ms=8.0 + n / 4),
            f"{n}.json",
        )
        for n in (4, 64)
    ]
    rows = [
        {"model": model, "gpu": "h100", "engine": "vllm", "weights": "bf16", "tp": 1, "isl": isl, "osl": 256}
        | {"concurrency": n, "measured_ttft_ms": 50.0 + n, "measured_tpot_ms": 7.0 + n / 8}
        for model in ("Llama-3.1-8B", "Qwen3-8B")
        for isl in (512, 2048)
        for n in (1, 16)
    ]
    table = tmp_path / "runs.csv"
    pd.DataFrame(rows).to_csv(table, index=False)
    out: Path = tmp_path / "out"
    given = [part for name, value in GIVEN.items() for part in ("--given", f"{name}={value}")]
    code, text, err = run(
        monkeypatch, capsys, "accuracy", table, *logs, *given, "--compare", "corrected-roofline", "--out", out
    )
    assert code == 0, err
    assert "unseen series" in text
    assert "corrected roofline" in text
    assert "beta_prefill" in text
    assert sorted(path.name for path in out.iterdir()) == ["accuracy.html", "accuracy.md", "predictions.csv"]
    assert_well_formed((out / "accuracy.html").read_text())
    assert (pd.read_csv(out / "predictions.csv")["split"] == "unseen series").sum() == len(rows) + len(logs)
