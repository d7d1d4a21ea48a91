"""The families of decoder that config.json files name by `model_type`: what each takes for granted.

A family is data (`Style` and the defaults of keys it may leave out); one builder reads them all, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

Scope = Literal["all", "ffn", "experts"]


@dataclass(frozen=True)
class Style:
    """Shapes that no key of the config states."""

    attention: Literal["grouped", "latent", "compressed", "gemma4", "pattern"] = "grouped"
    matrices: Literal[2, 3] = 3  # 3: gated MLP
    norm_vectors: int = 1  # 2: LayerNorm with bias
    mixer_norms: int = 1  # norms of the attention block
    ffn_norms: int = 1
    one_kv_each: bool = False  # without `num_key_value_heads`: as many as query heads (elsewhere it must be given)
    qkv_bias: bool = False  # besides the `attention_bias` key
    o_bias: bool = False
    bias_spares_output: bool = False  # `attention_bias` does not reach the output projection
    mlp_bias: bool = False  # besides the `mlp_bias` key
    qk_norm: Literal["", "head", "all heads"] = ""
    positions: int = -1  # learned positions beyond max_position_embeddings; -1: none are learned
    embedding_norm: bool = False
    head_bias: bool = False
    final_norm: bool = True
    sinks: bool = False  # an attention sink a head
    expert_bias: bool = False
    router_bias: bool = False
    experts_every: Literal["", "decoder_sparse_step", "interleave_moe_layer_step", "first_k_dense_replace"] = ""
    scope: Scope = "all"  # what a 4-bit checkpoint quantises
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _style(base: Style | None = None, **changes: Any) -> Style:
    """A style with keys' defaults added to those of `base`."""
    base = base or Style()
    names = Style.__dataclass_fields__
    style = {k: v for k, v in changes.items() if k in names}
    defaults = dict(base.defaults) | {k: v for k, v in changes.items() if k not in names}
    return replace(base, **style, defaults=MappingProxyType(defaults))


_LLAMA = _style(tie_word_embeddings=False)
_LLAMA_1 = _style(_LLAMA, one_kv_each=True)
_QWEN2 = _style(_LLAMA, qkv_bias=True, use_sliding_window=False)
_QWEN3 = _style(_LLAMA, qk_norm="head", use_sliding_window=False, head_dim=128)
_QWEN3_MOE = _style(_QWEN3, experts_every="decoder_sparse_step")
_QWEN_HYBRID = _style(_QWEN3_MOE, scope="ffn", attn_output_gate=True, full_attention_interval=4, head_dim=256)
_GEMMA = _style(tie_word_embeddings=True, head_dim=256)
_GEMMA2 = _style(_GEMMA, mixer_norms=2, ffn_norms=2, sliding_window=4096, sliding_window_pattern=2)
_DEEPSEEK = _style(
    _LLAMA,
    attention="latent",
    experts_every="first_k_dense_replace",
    scope="ffn",
    first_k_dense_replace=0,
    moe_layer_freq=1,
)
_CLASSIC = _style(
    one_kv_each=True, matrices=2, norm_vectors=2, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True
)

FAMILIES: Mapping[str, Style] = MappingProxyType(
    {
        "llama": _LLAMA_1,
        "deci": _LLAMA_1,
        "granite": _LLAMA_1,
        "phi3": _LLAMA_1,
        "mistral": _style(_LLAMA, sliding_window=4096),
        "ministral": _LLAMA,
        "mixtral": _style(_LLAMA, experts_every="decoder_sparse_step", scope="ffn"),
        "qwen2": _QWEN2,
        "qwen2_moe": _style(_QWEN2, experts_every="decoder_sparse_step"),
        "qwen3": _QWEN3,
        "qwen3_moe": _QWEN3_MOE,
        "qwen3_next": _QWEN_HYBRID,
        "qwen3_5": _style(_QWEN_HYBRID, scope="all"),
        "qwen3_5_moe": _QWEN_HYBRID,
        "gemma": _GEMMA,
        "gemma2": _GEMMA2,
        "gemma3": _style(_GEMMA2, qk_norm="head", sliding_window_pattern=6, head_dim=256),
        "gemma4": _style(attention="gemma4", tie_word_embeddings=True, scope="ffn"),
        "gpt_oss": _style(
            _LLAMA,
            qkv_bias=True,
            o_bias=True,
            sinks=True,
            expert_bias=True,
            router_bias=True,
            experts_every="decoder_sparse_step",
            sliding_window=128,
            sliding_window_pattern=2,
            head_dim=64,
            scope="experts",
        ),
        "minimax_m2": _style(_LLAMA, qk_norm="all heads", experts_every="decoder_sparse_step", scope="ffn"),
        "glm4_moe": _style(
            _LLAMA,
            bias_spares_output=True,
            experts_every="first_k_dense_replace",
            router_bias=True,
            scope="ffn",
            first_k_dense_replace=1,
        ),
        "llama4": _style(
            _LLAMA,
            experts_every="interleave_moe_layer_step",
            scope="ffn",
            head_dim=128,
            attention_chunk_size=8192,
            interleave_moe_layer_step=1,
        ),
        "deepseek_v2": _DEEPSEEK,
        "deepseek_v3": _DEEPSEEK,
        "deepseek_v32": _DEEPSEEK,
        "kimi_k2": _DEEPSEEK,
        "glm_moe_dsa": _DEEPSEEK,
        "deepseek_v4": _style(_DEEPSEEK, attention="compressed", scope="experts"),
        "nemotron_h": _style(_LLAMA, attention="pattern", matrices=2, router_bias=True, scope="ffn"),
        "opt": _style(_CLASSIC, positions=2),
        "gpt2": _style(_CLASSIC, positions=0),
        "bloom": _style(_CLASSIC, embedding_norm=True, max_position_embeddings=2048),
        "gpt_neox": _style(_CLASSIC, tie_word_embeddings=False),
        "gptj": _style(
            _CLASSIC, qkv_bias=False, o_bias=False, ffn_norms=0, head_bias=True, tie_word_embeddings=False
        ),  # attention and MLP in parallel behind one norm
        "falcon": _style(_CLASSIC, qkv_bias=False, o_bias=False, mlp_bias=False, max_position_embeddings=2048),
        "starcoder2": _style(_CLASSIC),
        "cohere": _style(_LLAMA_1, ffn_norms=0, tie_word_embeddings=True),
    }
)


def family(model_type: str) -> Style | None:
    """The style of a `model_type`; the text part of a multimodal model has the family it wraps (`qwen3_vl`: qwen3)."""
    name = model_type.removesuffix("_text")
    for wrapped in (name, name.replace("_vl", ""), name.replace("_vl_moe", "_moe")):
        if wrapped in FAMILIES:
            return FAMILIES[wrapped]
    return None
