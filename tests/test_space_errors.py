"""Every kind of bad input ends in one `InputError` that names the place, the value and the remedy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from dse.errors import InputError
from dse.space import compile_space, load_space, parse_space

GOOD: dict[str, Any] = {
    "models": ["Llama-3.1-70B"],
    "clusters": ["h100-dgx"],
    "gpus": [1, 2, 4, 8, 16],
    "workloads": [{"isl": 2048, "osl": 512}],
    "axes": {"tp": "auto", "concurrency": {"min": 1, "max": 64}},
}


def message(**changes: Any) -> str:
    """What the space with these changes is refused with."""
    with pytest.raises(InputError) as caught:
        compile_space(parse_space({**copy.deepcopy(GOOD), **changes}, "my.yaml"))
    text = str(caught.value)
    assert text.startswith("my.yaml: ")
    assert "Traceback" not in text
    assert "pydantic" not in text
    return text


def axes(**changes: Any) -> dict[str, Any]:
    return {"axes": {**GOOD["axes"], **changes}}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    # unknown keys and names, with the nearest known
    ({"modles": ["x"]}, ["top level", "'modles'", "models"]),
    (axes(tpp=4), ["axes", "'tpp'", "tp"]),
    ({"workloads": [{"isl": 1, "osl": 1, "prefx_hit": 0.5}]}, ["workloads[0]", "'prefx_hit'", "prefix_hit"]),
    ({"clusters": [{"clster": "h100-dgx"}]}, ["clusters[0]", "'clster'", "cluster"]),
    ({"options": {"unevn_pp": True}}, ["options", "'unevn_pp'", "uneven_pp"]),
    ({"models": ["Llama-3.1-71B"]}, ["models", "'Llama-3.1-71B'", "Llama-3.1-70B"]),
    ({"models": ["Llama-3.1-70B", "Lama-3.1-8B"]}, ["models[1]", "'Lama-3.1-8B'", "Llama-3.1-8B"]),
    ({"clusters": ["h10-dgx"]}, ["clusters", "'h10-dgx'", "h100-dgx"]),
    ({"clusters": [{"cluster": "h100-dgx", "gpu": "H10"}]}, ["clusters", "'H10'", "h100"]),
    (axes(weights=["fp9"]), ["axes.weights", "'fp9'", "fp8"]),
    (axes(overlap="ful"), ["axes.overlap", "'ful'", "full"]),
    (axes(dispatch="node-dedup"), ["axes.dispatch", "'node-dedup'", "node_dedup"]),
    (axes(cp_method=["ring", "rng"]), ["axes.cp_method", "'rng'", "ring"]),
    ({"constraints": {"ttft": {"max": 1}}}, ["constraints", "'ttft'", "ttft_ms"]),
    ({"constraints": {"ttft_ms": {"mx": 1}}}, ["constraints.ttft_ms", "'mx'", "max"]),
    ({"objectives": {"tpt_ms": "min"}}, ["objectives", "'tpt_ms'", "tpot_ms"]),
    # wrong types
    (axes(tp="eight"), ["axes.tp", "'eight'", "allowed"]),
    (axes(tp=True), ["axes.tp", "True", "allowed"]),
    (axes(tp=2.5), ["axes.tp", "2.5", "whole"]),
    (axes(tp={"min": 1}), ["axes.tp", "'max'", "write"]),
    (axes(tp=None), ["axes.tp", "None", "allowed"]),
    ({"axes": [1]}, ["axes", "[1]", "keys"]),
    ({"workloads": 3}, ["workloads[0]", "3", "keys"]),
    ({"models": 3}, ["models", "3", "text"]),
    ({"constraints": {"ttft_ms": 1000}}, ["constraints.ttft_ms", "1000", "{max: 1000}"]),
    ({"objectives": ["tpot_ms"]}, ["objectives", "write"]),
    ({"objectives": {"tpot_ms": "down"}}, ["objectives.tpot_ms", "'down'", "min, max"]),
    ({"objectives": {"tpot_ms": "max"}}, ["objectives.tpot_ms", "max", "allowed: min"]),
    (axes(sequence_parallel="maybe"), ["axes.sequence_parallel", "'maybe'", "true, false"]),
    ({"options": {"uneven_pp": "very"}}, ["options.uneven_pp", "'very'"]),
    # wrong units, signs, NaN
    ({"constraints": {"ttft_ms": {"max": "3 GiB"}}}, ["constraints.ttft_ms", "'3 GiB'", "ms, s"]),
    ({"constraints": {"memory_gib": {"max": "80 s"}}}, ["constraints.memory_gib", "'80 s'", "gib"]),
    ({"constraints": {"usd_per_mtok": {"max": "2 EUR"}}}, ["constraints.usd_per_mtok", "'2 EUR'", "usd"]),
    ({"workloads": [{"isl": "128k", "osl": 1}]}, ["workloads[0].isl", "'128k'", "tokens"]),
    (axes(tp=-1), ["axes.tp", "-1", "allowed: 1"]),
    (axes(tp=0), ["axes.tp", "0", "allowed: 1"]),
    (axes(chunk=float("nan")), ["axes.chunk", "nan", "finite"]),
    (axes(utilisation=float("inf")), ["axes.utilisation", "inf", "finite"]),
    (axes(utilisation=1.5), ["axes.utilisation", "1.5", "up to 1"]),
    ({"gpus": [-8]}, ["gpus", "-8", "allowed: 1"]),
    ({"workloads": [{"isl": 0, "osl": 1}]}, ["workloads[0].isl", "0", "allowed: 1"]),
    ({"workloads": [{"isl": 1, "osl": 1, "weight": -2}]}, ["workloads[0].weight", "-2", "more than 0"]),
    ({"workloads": [{"isl": 1, "osl": 1, "prefix_hit": "150 %"}]}, ["workloads[0].prefix_hit", "150 %", "0 to 1"]),
    ({"constraints": {"ttft_ms": {"max": -1}}}, ["constraints.ttft_ms", "-1", "allowed"]),
    ({"constraints": {"ttft_ms": {"min": 2, "max": 1}}}, ["constraints.ttft_ms", "min 2", "swap"]),
    # empty, huge and double
    ({"models": []}, ["models", "empty", "name at least one"]),
    ({"workloads": []}, ["workloads", "empty", "name at least one"]),
    ({"clusters": []}, ["clusters", "empty", "name at least one"]),
    ({"clusters": [{}]}, ["clusters[0]", "neither", "write"]),
    ({"gpus": []}, ["gpus", "empty", "name at least one"]),
    (axes(concurrency=[]), ["axes.concurrency", "empty", "name at least one"]),
    (axes(weights=[]), ["axes.weights", "empty", "allowed"]),
    ({"objectives": {}}, ["objectives", "0 objectives", "allowed: 1 to 4"]),
    ({"constraints": {"ttft_ms": {}}}, ["constraints.ttft_ms", "no bound", "write"]),
    (axes(concurrency={"min": 1, "max": 10**9, "step": 1}), ["axes.concurrency", "1e+09", "larger step"]),
    (axes(concurrency={"min": 1, "max": 10**9, "factor": 1.0000001}), ["axes.concurrency", "values", "factor"]),
    (axes(concurrency={"min": 1, "max": 10**6, "step": 1}, chunk=[1, 2, 3, 4, 5]), ["axes.concurrency", "5000000"]),
    (axes(concurrency={"min": 8, "max": 4}), ["axes.concurrency", "min 8", "swap"]),
    (axes(concurrency={"min": 5, "max": 7}), ["axes.concurrency", "min 5", "widen"]),
    (axes(concurrency={"min": 1, "max": 7, "step": 0}), ["axes.concurrency", "0", "more than 0"]),
    (axes(concurrency={"min": 1, "max": 7, "factor": 1}), ["axes.concurrency", "1", "more than 1"]),
    (axes(concurrency={"min": 1, "max": 7, "step": 1, "factor": 2}), ["axes.concurrency", "not both"]),
    (axes(tp=[1, 2, 1]), ["axes.tp", "1", "twice"]),
    ({"models": ["Llama-3.1-70B", "meta-llama/Meta-Llama-3.1-70B"]}, ["models[1]", "Llama-3.1-70B", "twice"]),
    ({"clusters": ["h100-dgx", "H100"]}, ["clusters[1]", "h100-dgx", "twice"]),
    (axes(mtp=1, draft_tokens=1), ["axes", "'mtp'", "keep one"]),
    (axes(batch=4), ["axes", "'batch'", "keep one"]),
    (axes(overlap="none", overlap_decode="full"), ["axes", "'overlap_decode'", "keep one"]),
    # values that are legal nowhere
    (axes(tp=3), ["axes.tp", "3 does not divide n_heads=64 of Llama-3.1-70B", "allowed: 1, 2, 4, 8, 16"]),
    (axes(tp=[1, 32]), ["axes.tp", "32 divides none of gpus=1, 2, 4, 8, 16", "allowed: 1, 2"]),
    (axes(pp=3), ["axes.pp", "3 does not divide layers=80 of Llama-3.1-70B", "uneven_pp"]),
    (axes(dp=3), ["axes.dp", "3 divides none of gpus", "allowed: 1, 2"]),
    (axes(attention_dp=2), ["axes.attention_dp", "2 needs experts", "use dp"]),
    (axes(ep=8), ["axes.ep", "8 needs experts", "allowed: 1"]),
    (axes(draft_tokens=2), ["axes.draft_tokens", "2 needs MTP", "external_draft: true"]),
    ({"gpus": [8, 4096]}, ["gpus", "4096 is more than the 1024 GPUs of cluster h100-dgx", "up to 1024"]),
    ({"workloads": [{"isl": 200_000, "osl": 8}]}, ["workloads[0]", "200008", "131072", "extended_context: true"]),
    # nothing legal
    ({**axes(tp=4, pp=4), "gpus": 8}, ["axes", "none of 1 plans is legal", "takes 16 GPUs", "raise gpus"]),
    ({**axes(tp=2, dp=1), "gpus": 8}, ["axes", "dp replicas do not use the GPUs exactly (100%)", "more values"]),
    # hardware of one's own
    ({"hardware": {"gpus": [1]}}, ["hardware.gpus", "[1]", "keys"]),
    ({"hardware": {"gpus": {"x": {"hbm_gb_s": -1}}}}, ["hardware: gpus.x.hbm_gb_s", "-1", "greater than 0"]),
    ({"hardware": {"clusters": {"x": {"levels": [{"sze": 8}]}}}}, ["hardware: clusters.x.levels.0", "'sze'", "size"]),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "parts"), BAD, ids=[f"{i}-{parts[0]}" for i, (_, parts) in enumerate(BAD)])
def test_bad_values_name_place_value_and_remedy(changes: dict[str, Any], parts: list[str]) -> None:
    if "hardware" in changes and "gpus" in changes["hardware"]:
        changes = {**changes, "clusters": [{"cluster": "h100-dgx", "gpu": "x"}]}
    text = message(**changes)
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("key", ["models", "clusters", "gpus", "workloads"])
def test_missing_keys_say_what_to_write(key: str) -> None:
    with pytest.raises(InputError, match=f"my.yaml: {key}: is required; write {key}: "):
        parse_space({k: v for k, v in GOOD.items() if k != key}, "my.yaml")


def test_several_problems_come_together() -> None:
    text = message(**axes(tp=[3, 7], pp=[3], attention_dp=[2]), gpus=[8, 2048])
    assert text.count("\n  ") == 5
    for part in ("axes.tp: 3", "axes.tp: 7", "axes.pp: 3", "axes.attention_dp: 2", "gpus: 2048"):
        assert part in text


def test_many_problems_are_cut_short() -> None:
    text = message(workloads=[{"isl": -1, "osl": -1}] * 50)
    assert "100 problems" in text
    assert text.endswith("and 90 more")


FILES: list[tuple[bytes, list[str]]] = [
    (b"", ["is empty"]),
    (b"# only a comment\n", ["is empty"]),
    (b"- a\n- b\n", ["holds a list"]),
    (b"just words", ["holds a str"]),
    (b"models: [Llama-3.1-70B\ngpus: 8\n", ["line 2", "not valid YAML", "whole"]),
    (b"models: [a]\naxes: {tp: [1, 2", ["not valid YAML"]),
    (b"models: [Llama-3.1-70B]\nclusters: [h100-dgx]\ngp", ["not valid YAML", "whole"]),
    (b"models: [Llama-3.1-70B]\nclusters: [h100-dgx]\n", ["gpus: is required", "workloads: is required"]),
    (b"axes:\n\ttp: 1\n", ["line 2", "spaces"]),
    (b"gpus: 8\nmodels: [a]\ngpus: 16\n", ["line 3", "'gpus' is written twice (also on line 1)", "keep one"]),
    (b"axes: {tp: 1, tp: 2}\n", ["'tp' is written twice"]),
    (b"\x7fELF\x00\x00\x01", ["binary"]),
    (b"models: \xff\xfe\n", ["not UTF-8"]),
    (b"models: !!python/object:os.system {}\n", ["not valid YAML"]),
    (b"a: &a [*a]\n", ["aliases"]),
    (b"a: " + b"[" * 3000 + b"]" * 3000, ["nested too deeply"]),
    (b"a: &a [1,1,1,1,1,1,1,1,1]\n" + b"".join(
        b"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n" % (n + 1, n + 1, *[n] * 9) for n in range(97, 106)
    ), ["aliases"]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "parts"), FILES, ids=[f"{i}-{parts[0]}" for i, (_, parts) in enumerate(FILES)])
def test_unusable_files_are_one_error(tmp_path: Path, data: bytes, parts: list[str]) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        load_space(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_every_truncation_of_a_space_is_refused_or_whole(tmp_path: Path) -> None:
    whole = Path(__file__).parents[1].joinpath("search_spaces", "quickstart.yaml").read_text()
    path = tmp_path / "half.yaml"
    for end in range(0, whole.index("constraints:"), 7):
        path.write_text(whole[:end])
        text = ""
        try:
            compile_space(load_space(path))
        except InputError as error:
            text = str(error)
        assert text == "" or text.startswith(str(path))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(InputError, match=r"no such file; check the path \(there: other.yaml\)"):
        load_space(tmp_path / "mine.yaml")
    with pytest.raises(InputError, match="is a directory; give the YAML file"):
        load_space(tmp_path)
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(20 * 2**20)
    with pytest.raises(InputError, match="too many for a search space"):
        load_space(huge)
    with pytest.raises(InputError, match="cannot be read"):
        load_space("a\0b")


def test_a_mapping_is_wanted() -> None:
    with pytest.raises(InputError, match="space: expected keys with values"):
        parse_space(["models"])  # type: ignore[arg-type]
