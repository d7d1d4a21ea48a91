"""config.json -> entries: every shared config equals its catalogue entry; what is not understood is one clear error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dse.catalog.hf import from_config
from dse.catalog.model_schema import CoreSpec, ModelEntry
from dse.catalog.models import load_model_file, model, parameter_count, to_architecture
from dse.errors import DseError, InputError, UnsupportedModel

CONFIGS = Path(__file__).parents[2] / "shared" / "hf_configs"
FILES = sorted(CONFIGS.glob("*.json"))

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
MLA = LLAMA | {
    "model_type": "deepseek_v3",
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}


def imported(changes: dict[str, Any], base: dict[str, Any] = LLAMA) -> ModelEntry:
    return from_config(base | changes, "test")


def cores(entry: ModelEntry) -> list[tuple[int, CoreSpec]]:
    return [(m.count, m.core) for m in entry.mixers if m.core is not None]


def spans(entry: ModelEntry) -> list[tuple[int, int, float]]:
    """(layers, window, ratio) of each kind."""
    return [(count, core.window, core.ratio) for count, core in cores(entry)]


# ------------------------------------------------------------------------------------- shared configs


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_shared_configs_are_their_catalogue_entries(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    name = path.stem.split("__")[-1]
    entry, known = from_config(config, name), model(name)
    curated = {"name", "organisation", "aliases", "source", "notes", "published"}
    if name.endswith("-FP8"):
        curated.add("native_weights")  # the catalogue has the model in its first format
    if "text_config" in config and "vision_config" not in config:
        curated.add("vision_params")  # this copy of the config left the tower out
    assert entry.model_dump(exclude=curated) == known.model_dump(exclude=curated)
    assert load_model_file(path).model_dump(exclude=curated) == known.model_dump(exclude=curated)


def test_the_shared_configs_are_here() -> None:
    if not FILES:
        pytest.skip("shared/hf_configs is not here")
    assert len(FILES) >= 21


# ------------------------------------------------------------------------------------- conventions


def test_grouped_query_attention() -> None:
    (mixer,) = imported({}).mixers
    qkv, out = mixer.gemms
    assert (qkv.k, qkv.n, qkv.n_kv, qkv.split) == (4096, 4096, 2048, "n")
    assert (out.k, out.n, out.n_kv, out.split) == (4096, 4096, 0, "k")
    assert mixer.core == CoreSpec(
        heads=32,
        kv_heads=8,
        score_dim=128,
        value_dim=128,
        score_dim_decode=128,
        value_dim_decode=128,
        kv_elements=2048,
    )
    assert to_architecture(imported({})).mixers[0].gemms[0].split_n == 1.0


def test_latent_attention() -> None:
    entry = imported({}, MLA)
    (mixer,) = entry.mixers
    assert [(g.k, g.n, g.split) for g in mixer.gemms] == [
        (4096, 64 + 32 + 8, ""),
        (64, 32 * 24, "n"),
        (32, 32 * 32, "n"),
        (32 * 16, 4096, "k"),
    ]
    assert mixer.core is not None
    assert (mixer.core.kv_heads, mixer.core.kv_elements) == (1, 40)
    assert (mixer.core.score_dim, mixer.core.score_dim_decode, mixer.core.value_dim_decode) == (24, 40, 32)
    assert [(f.kind, f.count) for f in entry.ffns] == [("dense", 1), ("experts", 31)]
    plain = imported({"q_lora_rank": None}, MLA).mixers[0].gemms
    assert [(g.k, g.n) for g in plain[:2]] == [(4096, 40), (4096, 32 * 24)]


def test_sparse_latent_attention_and_groups() -> None:
    sparse = {"index_topk": 128, "index_n_heads": 4, "index_head_dim": 16, "n_group": 4, "topk_group": 2}
    entry = imported(sparse | {"model_type": "deepseek_v32"}, MLA)
    (mixer,) = entry.mixers
    assert [(g.k, g.n, g.split) for g in mixer.gemms[4:]] == [(64, 64, ""), (4096, 16, ""), (4096, 4, "")]
    assert mixer.indexer is not None
    assert (mixer.indexer.heads, mixer.indexer.dim) == (4, 16)
    assert mixer.core is not None
    assert (mixer.core.ratio, mixer.core.top_k) == (1.0, 128.0)
    assert [f.routed.group_limit for f in entry.ffns if f.routed] == [2]


def test_compressed_attention() -> None:
    v4 = model("DeepSeek-V4-Pro")
    assert [(m.count, m.core.ratio, m.core.window, m.core.top_k) for m in v4.mixers if m.core] == [
        (31, 1 / 128, 128, 1e9),
        (30, 1 / 4, 128, 1024.0),
    ]
    assert [m.indexer is not None for m in v4.mixers] == [False, True]
    first = model("DeepSeek-V4-Flash").mixers[0]
    assert first.core is not None
    assert (first.count, first.core.ratio, first.core.top_k) == (2, 0.0, 0.0)


def test_linear_attention() -> None:
    delta = next(m for m in model("Qwen3.5-397B-A17B").mixers if m.state)
    assert delta.state is not None
    assert delta.core is None
    assert delta.state.state_bytes == 64 * 128 * 128 * 4 + (2 * 16 * 128 + 64 * 128) * 3 * 2
    full = next(m for m in model("Qwen3.5-397B-A17B").mixers if m.core)
    assert full.gemms[0].n == 2 * 32 * 256  # the output gate doubles the query columns
    mamba = next(m for m in model("NVIDIA-Nemotron-3-Super-120B-A12B").mixers if m.state)
    assert mamba.state is not None
    assert mamba.state.state_bytes == 128 * 64 * 128 * 4 + (8192 + 2 * 8 * 128) * 3 * 2


def test_latent_experts() -> None:
    (ffn,) = model("NVIDIA-Nemotron-3-Super-120B-A12B").ffns
    assert ffn.routed is not None
    assert (ffn.count, ffn.width, ffn.matrices) == (40, 5376, 2)
    assert (ffn.routed.d_in, ffn.routed.latent, ffn.routed.experts, ffn.routed.top_k) == (1024, 1024, 512, 22)


def test_families_outside_the_catalogue() -> None:
    """Published safetensors totals of models that only these shapes give."""
    v2 = MLA | {
        "model_type": "deepseek_v2",
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 102400,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
    }
    lite = {"hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 10944}
    lite |= {"q_lora_rank": None, "moe_intermediate_size": 1408, "n_routed_experts": 64}
    assert parameter_count(imported(lite, v2)).total == 15_706_484_224
    whole = {"hidden_size": 5120, "num_hidden_layers": 60, "num_attention_heads": 128, "intermediate_size": 12288}
    whole |= {"q_lora_rank": 1536, "moe_intermediate_size": 1536, "n_routed_experts": 160}
    assert parameter_count(imported(whole, v2)).total == 235_741_434_880
    qwen = {"model_type": "qwen2_moe", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16}
    qwen |= {"num_key_value_heads": 16, "intermediate_size": 5632, "moe_intermediate_size": 1408, "vocab_size": 151936}
    qwen |= {"shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4}
    assert parameter_count(imported(qwen)).total == 14_315_784_192


# ------------------------------------------------------------------------------------- traps


def test_a_window_that_is_switched_off() -> None:
    qwen = {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 28}
    assert spans(imported(qwen)) == [(32, 0, 1.0)]
    assert spans(imported(qwen | {"use_sliding_window": False})) == [(32, 0, 1.0)]
    assert spans(imported(qwen | {"use_sliding_window": True})) == [(28, 0, 1.0), (4, 4096, 0.0)]
    assert spans(imported({"model_type": "mistral", "sliding_window": 4096})) == [(32, 4096, 0.0)]
    assert spans(imported({"model_type": "mistral", "sliding_window": None})) == [(32, 0, 1.0)]
    assert spans(imported({"model_type": "mistral"})) == [(32, 4096, 0.0)]  # the family's default


def test_patterns_of_windows() -> None:
    assert spans(imported({"model_type": "gemma3_text", "sliding_window": 1024, "head_dim": 128})) == [
        (27, 1024, 0.0),
        (5, 0, 1.0),
    ]
    assert spans(imported({"model_type": "gemma2", "sliding_window": 512})) == [(16, 512, 0.0), (16, 0, 1.0)]


def test_llama4_layers() -> None:
    maverick, scout = model("Llama-4-Maverick-17B-128E"), model("Llama-4-Scout-17B-16E")
    for entry in (maverick, scout):
        chunked, full = (core for _, core in cores(entry))
        assert (chunked.window, chunked.window_fill, chunked.ratio) == (8192, 0.5, 0.0)
        assert (full.window, full.ratio) == (0, 1.0)
        assert [m.count for m in entry.mixers] == [36, 12]
    assert [(f.count, f.width, f.routed is None) for f in maverick.ffns] == [(24, 16384, True), (24, 8192, False)]
    assert [(f.count, f.width) for f in scout.ffns] == [(48, 8192)]


def test_gemma4_head_sizes() -> None:
    local, whole = model("gemma-4-26B-A4B").mixers
    assert local.core is not None
    assert whole.core is not None
    assert (local.core.score_dim, local.core.kv_heads, whole.core.score_dim, whole.core.kv_heads) == (256, 8, 512, 2)
    assert whole.gemms[0].n_kv == 2 * 512  # keys double as values: one projection
    assert whole.core.kv_elements == 2 * 2 * 512  # and are cached as both


def test_embeddings_are_tied_where_the_family_says_so() -> None:
    assert imported({}).embeddings == 2
    assert imported({"tie_word_embeddings": True}).embeddings == 1
    assert imported({"model_type": "gemma"}).embeddings == 1


def test_quantised_checkpoints() -> None:
    assert model("Kimi-K2.5").native_weights == "int4"
    assert (model("Kimi-K2.5").low_bit_scope, model("gpt-oss-120b").low_bit_scope) == ("experts", "experts")
    v4 = model("DeepSeek-V4-Pro")
    assert (v4.native_weights, v4.low_bit_scope, v4.rest_precision) == ("mxfp4", "experts", "fp8")
    assert imported({"quantization_config": {"quant_method": "awq", "bits": 4}}).native_weights == "int4"
    modelopt = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    assert imported(modelopt).native_weights == "fp4"
    with pytest.raises(UnsupportedModel, match=r"quantization_config.*hqq.*remove it"):
        imported({"quantization_config": {"quant_method": "hqq"}})


def test_vision_towers_are_counted_apart() -> None:
    assert parameter_count(model("Qwen3.5-397B-A17B")).vision == 456_010_480
    tower = {
        "model_type": "llama4_vision_model",
        "hidden_size": 1408,
        "intermediate_size": 5632,
        "num_hidden_layers": 34,
        "patch_size": 14,
        "image_size": 336,
        "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
    }
    entry = from_config({"text_config": LLAMA | {"hidden_size": 5120, "head_dim": 128}, "vision_config": tower}, "test")
    assert entry.vision_params == model("Llama-4-Scout-17B-16E").vision_params == 871_932_416
    other = {"model_type": "new_vit", "hidden_size": 64, "num_hidden_layers": 2}
    assert "plain ViT" in from_config({"text_config": LLAMA, "vision_config": other}, "test").notes[0]


def test_layers_merge_in_order_of_appearance() -> None:
    kinds = ["full_attention", "sliding_attention"] * 16
    entry = imported({"model_type": "mistral", "layer_types": kinds, "sliding_window": 64})
    assert [(m.kind, m.count) for m in entry.mixers] == [("full attention", 16), ("sliding window 64", 16)]


# ------------------------------------------------------------------------------------- errors


def test_unknown_architectural_keys_are_all_named() -> None:
    unknown = {"num_memory_layers": 4, "ngram_embed_dim": 64, "sparse_block_size": 8}
    with pytest.raises(UnsupportedModel) as caught:
        imported(unknown)
    assert all(key in str(caught.value) for key in unknown)
    assert "YAML" in str(caught.value)


def test_unknown_cosmetic_keys_are_not_an_error() -> None:
    cosmetic = {"fancy_token_id": 7, "moe_aux_loss_coef": 0.1, "my_dropout": 0.5, "new_rope_theta": 1e6, "note": "x"}
    off = {"num_memory_layers": 0, "ngram_embed_dim": None, "use_hyper_layers": False, "sparse_types": []}
    assert imported(cosmetic | off) == imported({})


def test_keys_of_another_family_are_not_ignored() -> None:
    with pytest.raises(UnsupportedModel, match="kv_lora_rank"):
        imported({"kv_lora_rank": 512})
    with pytest.raises(UnsupportedModel, match="num_local_experts"):
        imported({"num_local_experts": 8, "num_experts_per_tok": 2})


def test_unknown_families() -> None:
    with pytest.raises(UnsupportedModel, match=r"model_type 'rwkv9' is not known.*known: bloom.*set model_type"):
        imported({"model_type": "rwkv9"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"model_type": "qwen3", "num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"hidden_size": "wide"}, "hidden_size='wide'.*whole number"),
        ({"hidden_size": True}, "hidden_size=True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0.*at least 1"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_key_value_heads": 7}, "num_key_value_heads=7 does not divide"),
        ({"num_attention_heads": 33}, "does not divide hidden_size"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 values.*32 layers"),
        ({"layer_types": ["odd"] * 32}, "layer_types holds 'odd'"),
        ({"layer_types": "full_attention"}, "layer_types has 'full_attention'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'.*true, false"),
        ({"quantization_config": "fp8"}, "quantization_config is str"),
        ({"n_layer": 5}, "contradict"),
        ({"text_config": 3}, "text_config is int"),
        ({"text_config": LLAMA, "audio_config": {"a": 1}}, "audio_config"),
        ({"model_type": ["llama"]}, "is not known"),
        ({"hidden_size": float("nan")}, "hidden_size=nan"),
    ],
)
def test_malformed_configs_are_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        imported(changes)


@pytest.mark.parametrize("config", [None, [], "x", {}, {"model_type": None}, {"model_type": "llama"}])
def test_things_that_are_no_config(config: Any) -> None:
    with pytest.raises(InputError):
        from_config(config, "test")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_no_damage_to_a_config_makes_a_traceback(path: Path) -> None:
    """Each key in turn removed, or given a value of another type: an entry or a DseError, nothing else."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in ("text_config", "vision_config", None):
        if part is not None and not isinstance(config.get(part), dict):
            continue
        for key in config if part is None else config[part]:
            for value in ("absent", None, "x", 3, [1], {"a": 1}):
                damaged = copy.deepcopy(config)
                place = damaged if part is None else damaged[part]
                if value == "absent":
                    del place[key]
                else:
                    place[key] = value
                try:
                    from_config(damaged, "test")
                except DseError as error:
                    assert "\n" not in str(error)  # noqa: PT017
