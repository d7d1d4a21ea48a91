"""The models catalogue: counts against published totals, names, files, and alignment into one structure."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from dse.catalog.align import align
from dse.catalog.model_schema import ModelEntry, dump, parse
from dse.catalog.models import load_model_file, model, models, parameter_count, to_architecture
from dse.cost.types import Architecture, stack
from dse.errors import InputError, UnknownName

SHARED = Path(__file__).parents[2] / "shared"
ENTRIES = models()
everyone = pytest.mark.parametrize("name", list(ENTRIES))


def counted(entry: ModelEntry) -> int:
    """Our count of what the published total covers."""
    assert entry.published is not None
    n = parameter_count(entry)
    parts = {"main": n.total, "mtp": n.mtp, "vision": n.vision, "copies": n.embedding}
    return sum(parts[part] for part in entry.published.counts)


# ---------------------------------------------------------------------------------------------- counts


@everyone
def test_parameters_are_the_published_ones(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.published is not None, "every entry cites a published count"
    assert entry.published.source
    assert counted(entry) == pytest.approx(entry.published.total, rel=0.01)
    if entry.published.exact and name != "moe-10b-plan":
        assert counted(entry) == entry.published.total


@everyone
def test_active_parameters_are_near_the_published_ones(name: str) -> None:
    """Publishers round, and leave out one or both embeddings: within a tenth, either way of counting."""
    entry = ENTRIES[name]
    assert entry.published is not None
    n = parameter_count(entry)
    if entry.published.active is None:
        assert n.active == n.total or not entry.published.exact or name == "moe-10b-plan"
        return
    ways = (n.active, n.active - n.embedding / entry.embeddings, n.active - n.embedding)
    assert min(abs(w / entry.published.active - 1) for w in ways) < 0.10


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Llama-3.1-8B", 8_030_261_248),
        ("Llama-3.1-70B", 70_553_706_496),
        ("Llama-3.1-405B", 405_853_388_800),
        ("Mixtral-8x7B", 46_702_792_704),
        ("Qwen3-235B-A22B", 235_093_634_560),
        ("DeepSeek-V3", 671_026_419_200),
        ("Qwen3.5-397B-A17B", 396_346_350_336),
        ("BLOOM-176B", 176_247_271_424),
        ("gpt-oss-120b", 116_829_156_672),
    ],
)
def test_known_totals(name: str, total: int) -> None:
    assert parameter_count(model(name)).total == total


def test_deepseek_attention_weights_and_cache() -> None:
    (mixer,) = model("DeepSeek-V3").mixers
    assert sum(g.params for g in mixer.gemms) == 187_105_280
    assert mixer.core is not None
    assert mixer.core.kv_elements == 576
    assert mixer.core.rematerialise == 512 * 128 * 256


def test_the_audited_plan() -> None:
    n = parameter_count(model("moe-10b-plan"))
    assert n.total - n.embedding == 285_343_744
    gated = n.total - n.embedding + 16 * 16 * 512 * 1024
    assert gated == 419_561_472


def test_cache_of_a_token() -> None:
    """Llama-3.1-70B: 2 x 8 x 128 elements a layer; DeciLM's layers differ."""
    (full,) = model("Llama-3.1-70B").mixers
    assert full.core is not None
    assert full.core.kv_elements == 2048
    kv = {m.core.kv_heads: m.count for m in model("DeciLM-7B").mixers if m.core}
    assert kv == {4: 7, 2: 14, 1: 11}


@everyone
def test_layers_add_up(name: str) -> None:
    entry = ENTRIES[name]
    mixers, ffns = sum(m.count for m in entry.mixers), sum(f.count for f in entry.ffns)
    assert (mixers == ffns == entry.layers) or mixers + ffns == entry.layers
    assert len({m.model_copy(update={"count": 1}) for m in entry.mixers}) == len(entry.mixers)


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("llama2-70b", "Llama-2-70B"),
        ("LLaMA 70B", "Llama-2-70B"),
        ("meta-llama/Llama-2-70b-hf", "Llama-2-70B"),
        ("LLaMA v3.1 8B", "Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Llama-3.1-8B"),
        ("Llama-3.1-405B-Instruct-FP8-KV (amd quark)", "Llama-3.1-405B"),
        ("Llama-3.1-405B-FP8 (meta)", "Llama-3.1-405B"),
        ("GPT-J 6B", "GPT-J-6B"),
        ("nvidia/Qwen3-32B-NVFP4", "Qwen3-32B"),
        ("DeepSeek-R1-0528", "DeepSeek-R1"),
        ("bloom-176b", "BLOOM-176B"),
        ("Mistral 7B", "Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "Mistral-7B-v0.3"),
        ("DeepSeek-V3.2-Exp", "DeepSeek-V3.2"),
        ("deepseek-ai/DeepSeek-V3-0324", "DeepSeek-V3"),
        ("Qwen3-235B-A22B-Instruct-2507", "Qwen3-235B-A22B"),
        ("Llama 4 Scout 17B-16E", "Llama-4-Scout-17B-16E"),
        ("zai-org/GLM-5-FP8", "GLM-5"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert model(spelling).name == name


@everyone
def test_every_name_and_alias_is_its_own(name: str) -> None:
    entry = ENTRIES[name]
    for spelling in (name, name.lower(), f"{entry.organisation}/{name}-FP8", *entry.aliases):
        assert model(spelling) is entry


def test_every_measured_spelling_is_known() -> None:
    files = sorted((SHARED / "measured").glob("*.csv"))
    if not files:
        pytest.skip("shared/measured is not here")
    import pandas as pd

    for path in files:
        table = pd.read_csv(path, usecols=lambda column: column == "model")
        for spelling in table["model"].dropna().unique() if "model" in table else ():
            assert model(spelling).name in ENTRIES


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(UnknownName, match=r"unknown model 'lama-3-70'.*Llama-3-70B.*import-model"):
        model("lama-3-70")


# ---------------------------------------------------------------------------------------------- files


@everyone
def test_yaml_round_trip(name: str) -> None:
    assert parse(yaml.safe_load(dump(ENTRIES[name])), name) == ENTRIES[name]


@everyone
def test_files_are_named_as_their_models(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(dump(ENTRIES[name]), encoding="utf-8")
    assert load_model_file(path) == ENTRIES[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden": 4}, r"unknown key 'hiden' \(nearest: hidden"),
        ({"hidden": 0}, r"hidden: .*greater than 0 \(got 0\)"),
        ({"hidden": "wide"}, r"hidden: .*got 'wide'"),
        ({"native_weights": "fp7"}, r"native_weights 'fp7' \(allowed: bf16"),
        ({"mixers": [], "ffns": []}, "no mixers and no ffns"),
    ],
)
def test_a_bad_file_is_one_clear_error(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    data = yaml.safe_load(dump(ENTRIES["Llama-3.1-8B"])) | change
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        load_model_file(path)
    assert str(path) in str(caught.value)


def test_top_k_beyond_the_experts(tmp_path: Path) -> None:
    data = yaml.safe_load(dump(ENTRIES["Mixtral-8x7B"]))
    data["ffns"][0]["routed"]["top_k"] = 9
    with pytest.raises(InputError, match=r"ffns\.0\.routed: top_k 9 is more than experts 8 \(allowed: 1 to 8\)"):
        parse(data, "mine.yaml")


@pytest.mark.parametrize(
    ("name", "text"),
    [("m.yaml", "a: [1"), ("m.yaml", "just text"), ("m.json", "{"), ("m.json", "[1]"), ("m.yaml", "")],
)
def test_files_that_are_not_models(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        load_model_file(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_model_file(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_model_file(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError):
        load_model_file(tmp_path / "bytes.yaml")


# ---------------------------------------------------------------------------------------------- alignment


def totals(a: Architecture) -> dict[str, float]:
    """Numbers that the cost of a model is made of, summed over its kinds."""
    out = dict.fromkeys(("params", "active", "cache", "scores", "state", "state_flops", "index", "remat"), 0.0)
    for m in a.mixers:
        out["params"] += m.count * (sum(g.k * (g.n + g.n_kv) for g in m.gemms) + m.extra_params)
        if m.core is not None:
            seen = min(4096.0, m.core.window) * m.core.window_fill + min(4096.0 * m.core.ratio, m.core.top_k)
            out["cache"] += m.count * m.core.kv_elements * seen
            out["scores"] += m.count * m.core.heads * (m.core.score_dim + m.core.value_dim) * seen
            out["remat"] += m.count * m.core.rematerialise
        if m.indexer is not None:
            out["index"] += m.count * m.indexer.heads * m.indexer.dim
        if m.state is not None:
            out["state"] += m.count * m.state.state_bytes
            out["state_flops"] += m.count * m.state.flops_per_token
    for f in a.ffns:
        dense = f.matrices * a.hidden * f.width + f.extra_params
        out["params"] += f.count * dense
        out["active"] += f.count * dense
        if f.routed is not None:
            expert, latent = f.routed.matrices * f.routed.d_in * f.routed.width, 2 * a.hidden * f.routed.latent
            out["params"] += f.count * (f.routed.experts * expert + latent)
            out["active"] += f.count * (f.routed.top_k * expert + latent)
    return out


def test_alignment_changes_no_number() -> None:
    before = [to_architecture(e) for e in ENTRIES.values()]
    after = align(before)
    assert len({jax.tree.structure(a) for a in after}) == 1
    for old, new in zip(before, after, strict=True):
        assert totals(new) == pytest.approx(totals(old), rel=1e-12)
        assert (old.hidden, old.vocab, old.other_params, old.mtp_params) == (
            (new.hidden, new.vocab, new.other_params, new.mtp_params)
        )
    batch = stack(after)
    assert all(np.isfinite(leaf).all() and leaf.shape == (len(before),) for leaf in jax.tree.leaves(batch))


def test_alignment_of_one_model_is_the_model() -> None:
    one = to_architecture(model("DeepSeek-V3"))
    assert align([one]) == [one]
    assert align([]) == []


def test_similar_kinds_share_a_slot() -> None:
    """Dense models stay without experts; a model with a state does not give every slot one."""
    dense = align([to_architecture(model(n)) for n in ("Llama-3.1-70B", "Qwen3-32B")])[0]
    assert [len(m.gemms) for m in dense.mixers] == [2]
    assert dense.ffns[0].routed is None
    mixed = align([to_architecture(model(n)) for n in ("Llama-3.1-70B", "Qwen3.5-397B-A17B", "gpt-oss-120b")])[0]
    assert sum(m.state is not None for m in mixed.mixers) == 1
    assert len(mixed.mixers) == 2
    assert sum(f.routed is not None for f in mixed.ffns) == 1
