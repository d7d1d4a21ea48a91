"""The command line by its contract: exit codes, one message, outputs whole or absent, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from dse import cli

SPACE = """
name: tiny
models: [Llama-3.1-8B]
clusters: [h100-dgx]
gpus: [1, 2]
workloads: [{isl: 1024, osl: 256}]
axes: {tp: auto, concurrency: [1, 8, 64], chunk: [2048]}
constraints: {tpot_ms: {max: 100}}
objectives: {output_tok_s_gpu: max, tpot_ms: min}
"""
CASES = "model,gpu,isl,osl,tp,concurrency\nLlama-3.1-8B,h100,1024,256,1,16\nnope,h100,1,1,1,1\n"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    monkeypatch.setattr(sys, "argv", ["dse", *map(str, args)])
    monkeypatch.setenv("DSE_CACHE", os.environ.get("DSE_CACHE", str(Path.cwd() / ".jax_cache")))
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(SPACE)
    return path


def test_search_prints_and_writes(monkeypatch, capsys, space, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "search", space, "--out", tmp_path / "out")
    assert code == 0
    assert "Front of" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        ["pareto.csv", "candidates.csv", "report.html", "run.json"]
    )
    front = pd.read_csv(tmp_path / "out" / "pareto.csv")
    assert {"model", "gpu", "tp", "ttft_ms", "tpot_ms", "gpus", "replicas", "usd_per_mtok"} <= set(front.columns)
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["evaluated"] == facts["legal"] <= facts["enumerated"]
    assert facts["partial"] is False


def test_the_front_reads_back_as_cases(monkeypatch, capsys, space, tmp_path):
    """pareto.csv has estimate's columns: pricing it again gives the same numbers."""
    run(monkeypatch, capsys, "search", space, "--out", tmp_path / "out")
    code, _, _ = run(monkeypatch, capsys, "estimate", tmp_path / "out" / "pareto.csv", "-o", tmp_path / "again.csv")
    assert code == 0
    first, again = pd.read_csv(tmp_path / "out" / "pareto.csv"), pd.read_csv(tmp_path / "again.csv")
    for name in ("ttft_ms", "tpot_ms", "output_tok_s_gpu", "memory_gib"):
        pd.testing.assert_series_equal(first[name], again[name], rtol=1e-6)


def test_nothing_feasible_is_exit_code_3_and_says_what_binds(monkeypatch, capsys, space, tmp_path):
    space.write_text(SPACE.replace("tpot_ms: {max: 100}", "tpot_ms: {max: 0.01}"))
    code, _, err = run(monkeypatch, capsys, "search", space, "--out", tmp_path / "out")
    assert code == 3
    assert "tpot_ms" in err
    assert "0.01" in err
    assert "Traceback" not in err
    assert (tmp_path / "out" / "report.html").exists()


def test_interrupt_leaves_the_best_so_far(monkeypatch, capsys, space, tmp_path):
    from dse.search import grid

    absorb = grid._State.absorb

    def stop(self, tile, points):
        absorb(self, tile, points)
        raise KeyboardInterrupt

    monkeypatch.setattr(grid._State, "absorb", stop)
    monkeypatch.setattr(grid, "TILE", 2)
    monkeypatch.setattr(grid, "WIDEST", 2)
    code, out, _ = run(monkeypatch, capsys, "search", space, "--out", tmp_path / "out")
    assert code == 0
    assert "partial" in out.lower()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["partial"] is True


def test_estimate_answers_bad_rows_with_exit_code_0(monkeypatch, capsys, tmp_path):
    (tmp_path / "cases.csv").write_text(CASES)
    code, out, _ = run(monkeypatch, capsys, "estimate", tmp_path / "cases.csv", "-o", tmp_path / "out.csv")
    assert code == 0
    assert "1 without an estimate" in out
    table = pd.read_csv(tmp_path / "out.csv")
    assert len(table) == 2
    assert "nope" in table["reason"].iloc[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("search", "missing.yaml"), ["missing.yaml"]),
        (("search", "SPACE", "--sampler", "anneal"), ["anneal", "tpe"]),
        (("search", "SPACE", "--engine", "ray"), ["ray", "dask"]),
        (("search", "SPACE", "--out", "SPACE"), ["space.yaml"]),
        (("estimate", "missing.csv", "-o", "x.csv"), ["missing.csv"]),
        (("estimate", "BINARY", "-o", "x.csv"), ["binary.csv"]),
        (("estimate", "WRONG", "-o", "x.csv"), ["model, gpu", "missing"]),
        (("estimate", "CASES", "-o", "no/such/dir/x.csv"), ["x.csv"]),
        (("estimate", "CASES", "-o", "x.csv", "--coefficients", "fitted"), ["fitted", "physics"]),
        (("import-model", "missing.json"), ["missing.json"]),
        (("import-model", "CASES"), ["cases.csv"]),
        (("import-model", "deep.json"), ["deep.json", "not valid JSON"]),
        (("import-model", "deep.yaml"), ["deep.yaml", "nested too deeply"]),
        (("estimate", "CASES", "-o", "x.csv", "--coefficients", "deep.yaml"), ["deep.yaml", "nested too deeply"]),
        (("kernels", "gemm", "CASES", "-o", "x.csv", "--coefficients", "deep.yaml"), ["deep.yaml", "nested"]),
        (("estimate", "empty.csv", "-o", "x.csv"), ["empty.csv", "is empty", "column names"]),
        (("estimate", "folder", "-o", "x.csv"), ["folder", "is a directory", "CSV"]),
        (("estimate", "twice.csv", "-o", "x.csv"), ["twice.csv", "'isl' stands twice"]),
        (("estimate", "wide.csv", "-o", "x.csv"), ["wide.csv", "more cells than the header", "4 columns"]),
        (("kernels", "gemm", "folder.parquet", "-o", "x.csv"), ["folder.parquet", "is a directory"]),
        (("goodput", "WRONG", "-o", "x.csv"), ["model, gpu", "missing"]),
        (("goodput", "CASES", "-o", "x.csv", "--crossover", "folder"), ["folder", "is a directory"]),
        (("traffic", "WRONG", "-o", "x.csv"), ["model, gpu", "missing"]),
        (("experiments", "WRONG", "--budget", 10, "--out", "next"), ["model, gpu", "missing"]),
        (("replay", "trace.csv", "CASES", "--out", "results", "--ttft-ms", "nan"), ["ttft_ms: nan", "above 0"]),
        (("replay", "trace.csv", "CASES", "--out", "results", "--tpot-ms", "-1"), ["tpot_ms: -1", "above 0"]),
        (("calibrate", "CASES", "-o", "no/such/dir/c.yaml"), ["c.yaml", "cannot be written"]),
        (("check", "empty.csv"), ["empty.csv", "a written plan names at least model"]),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(monkeypatch, capsys, space, tmp_path, args, words):
    (tmp_path / "cases.csv").write_text(CASES)
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(b"\x00\xff\xfe\x80" * 50)
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "twice.csv").write_text("model,gpu,isl,osl,isl\nLlama-3.1-8B,h100,1,2,3\n")
    (tmp_path / "wide.csv").write_text("model,gpu,isl,osl\nLlama-3.1-8B,h100,1024,256,1\n")
    (tmp_path / "trace.csv").write_text("arrival_s,input_tokens,output_tokens\n0,100,10\n")
    for name in ("deep.json", "deep.yaml"):
        (tmp_path / name).write_text("[" * 100_000)
    for name in ("folder", "folder.parquet"):
        (tmp_path / name).mkdir()
    named = {"SPACE": space, "CASES": "cases.csv", "WRONG": "wrong.csv", "BINARY": "binary.csv"}
    monkeypatch.chdir(tmp_path)
    before = {p.name for p in tmp_path.iterdir()}
    code, _, err = run(monkeypatch, capsys, *(named.get(a, a) for a in args))
    assert code == 2
    assert "Traceback" not in err
    assert err.startswith("dse: ")
    for word in words:
        assert word in err
    assert {p.name for p in tmp_path.iterdir()} - before <= {"results", ".jax_cache"}


@pytest.mark.parametrize("command", ["models", "gpus", "clusters"])
def test_lists(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, command, "--json")
    assert code == 0
    assert len(json.loads(out)) > 10
    code, out, _ = run(monkeypatch, capsys, command)
    assert code == 0
    assert len(out.splitlines()) > 10


def test_import_model(monkeypatch, capsys, tmp_path):
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    code, out, _ = run(
        monkeypatch, capsys, "import-model", tmp_path / "config.json", "-o", tmp_path / "m.yaml", "--name", "mine"
    )
    assert code == 0
    assert "mine" in out
    assert "mine" in (tmp_path / "m.yaml").read_text()


def test_help_and_the_public_face_import_nothing_heavy():
    code = "import sys, dse, dse.cli; print([m for m in ('jax','pandas','optuna','plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    import dse

    for name in dse.__all__:
        assert getattr(dse, name) is not None
    with pytest.raises(AttributeError):
        dse.no_such_name  # noqa: B018


def test_workloads_and_placement(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "workloads", "--out", tmp_path / "runs")
    assert code == 0
    assert len(list((tmp_path / "runs").glob("*.yaml"))) == 99
    args = ("placement", "--mean-isl", 900, "--mean-osl", 200, "-o", tmp_path / "places.csv")
    code, out, _ = run(monkeypatch, capsys, *args)
    assert code == 0
    best = pd.read_csv(tmp_path / "places.csv").iloc[0]
    assert (best.tp_prefill, best.pp_prefill, best.tp_decode, best.pp_decode) == (2, 1, 1, 1)  # as DistServe published
    assert "req_s_gpu" in out
    code, out, _ = run(monkeypatch, capsys, "placement", "-o", tmp_path / "places.csv")  # the authors' lengths
    assert code == 0
    best = pd.read_csv(tmp_path / "places.csv").iloc[0]
    assert (best.tp_prefill, best.pp_prefill, best.tp_decode, best.pp_decode) == (2, 1, 1, 1)
    code, _, err = run(monkeypatch, capsys, "placement", "--model", "Llama-3.1-8B")
    assert code == 2
    assert "--mean-isl: is missing" in err
