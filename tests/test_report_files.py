"""The files of a search, and of any command: whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from results import assert_well_formed, nothing, result, rows

from dse.errors import InputError
from dse.files import atomic_write, atomic_write_all, output_directory
from dse.report.files import csv, write_outputs
from dse.report.html import html
from dse.report.names import number
from dse.report.summary import summarise
from dse.search.result import SearchResult
from dse.search.run import search
from dse.space.load import parse_space

OUTPUTS = {"pareto.csv", "candidates.csv", "report.html", "run.json"}


@pytest.fixture(scope="session")
def real() -> SearchResult:
    """A search of a tiny space, with a mix of workloads and three objectives."""
    space = {
        "name": "tiny",
        "models": ["Llama-3.1-8B"],
        "clusters": ["h100-dgx"],
        "gpus": [1, 2, 4],
        "workloads": [{"isl": 1024, "osl": 256}, {"isl": 4096, "osl": 128, "weight": 0.5}],
        "axes": {"tp": "auto", "dp": "auto", "weights": ["bf16", "fp8"], "concurrency": [1, 8, 64]},
        "constraints": {"ttft_ms": {"max": 2000}, "tpot_ms": {"max": 50}},
        "objectives": {"output_tok_s_gpu": "max", "tpot_ms": "min", "usd_per_mtok": "min"},
    }
    return search(parse_space(space))


def test_outputs_of_a_real_run(real: SearchResult, tmp_path: Path) -> None:
    written = write_outputs(real, tmp_path / "a" / "b")
    assert {path.name for path in written} == OUTPUTS
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == OUTPUTS
    front = pd.read_csv(tmp_path / "a" / "b" / "pareto.csv", keep_default_na=False)
    assert list(front.columns) == list(real.front.columns)
    assert list(front["isl"]) == ["1024|4096"] * len(real.front)
    for name, _ in real.objectives:
        np.testing.assert_allclose(front[name], real.front[name], rtol=1e-8)
    best = number(real.front["output_tok_s_gpu"].iloc[0])
    assert f"{best} tokens/s/GPU at" in (tmp_path / "a" / "b" / "report.html").read_text()
    run = json.loads((tmp_path / "a" / "b" / "run.json").read_text())
    assert run["legal"] == real.legal
    assert run["space"]["name"] == "tiny"


def test_summary_of_a_real_run(real: SearchResult) -> None:
    summary = summarise(real)
    assert summary.best is not None
    assert len(summary.workloads) == 2
    assert summary.workloads[0] == "67%: 1,024 tokens in, 256 out"
    for step in summary.best.steps:
        assert sum(p.value for p in step.parts) == pytest.approx(step.total_ms + step.hidden_ms)
    assert summary.best.memory is not None
    assert sum(p.value for p in summary.best.memory.parts) == pytest.approx(summary.best.memory.total)
    assert [s.count for s in summary.funnel] == [n for _, n in real.funnel]
    assert sum(n for _, n in summary.funnel[1].why) == summary.funnel[1].cut
    assert_well_formed(html(summary))


def test_nothing_feasible_leaves_headers(tmp_path: Path) -> None:
    write_outputs(nothing(), tmp_path)
    for name in ("pareto.csv", "candidates.csv"):
        frame = pd.read_csv(tmp_path / name)
        assert len(frame) == 0
        assert list(frame.columns) == list(rows(1).columns)


def test_csv_digits_and_special_values() -> None:
    frame = pd.DataFrame({"a": [1 / 3, np.nan], "b": [1, 2], "c": ["x,y", 'q"']})
    assert csv(frame) == 'a,b,c\n0.333333333,1,"x,y"\n,2,"q"""\n'
    assert csv(pd.DataFrame()) == ""


def test_run_json_has_no_nan(tmp_path: Path) -> None:
    write_outputs(result(hypervolume_ratio=float("nan"), run={"x": np.float64("inf"), "n": np.int64(3)}), tmp_path)
    run = json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert (run["hypervolume_ratio"], run["x"], run["n"]) == (None, None, 3)


def test_a_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OUTPUTS:
        (tmp_path / name).write_text("old")
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # the directory's probe, two files, then:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"report\.html: cannot be written: No space left on device"):
        write_outputs(result(), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(OUTPUTS, "old")


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        atomic_write(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_write(tmp_path: Path) -> None:
    target, link = tmp_path / "x.txt", tmp_path / "link"
    atomic_write(target, "gelé ≤ 2\n")
    assert target.read_bytes() == "gelé ≤ 2\n".encode()
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask  # readable as any new file is
    link.symlink_to(target)
    atomic_write(link, b"\x00")
    assert link.is_symlink()
    assert target.read_bytes() == b"\x00"


def test_a_stream_is_written_not_replaced(tmp_path: Path) -> None:
    atomic_write("/dev/null", "x")
    assert Path("/dev/null").is_char_device()
    code = "from dse.files import atomic_write; atomic_write('/dev/stdout', 'a,b\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a,b\n"


@pytest.mark.parametrize("place", ["file/x.csv", "missing/x.csv", "folder", "nul\0"])
def test_unwritable_places_are_input_errors(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"cannot be written|is a directory"):
        atomic_write(tmp_path / place, "x")
    with pytest.raises(InputError):
        atomic_write_all({tmp_path / "first": "x", tmp_path / place: "x"})
    assert sorted(tmp_path.rglob("*")) == before


def test_unusable_output_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: is a file, not a directory; choose"):
        output_directory(tmp_path / "file")
    with pytest.raises(InputError, match=r"Not a directory; choose another directory"):
        output_directory(tmp_path / "file" / "out")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError, match=r"cannot be created or written: Permission denied"):
        write_outputs(result(), tmp_path)
