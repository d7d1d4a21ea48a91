"""A Hugging Face config.json that remembers which of its keys were read: what nobody read, nobody understood."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dse.errors import InputError, UnsupportedModel

REMEDY = "describe the model by hand instead, in a YAML file like those `dse models --show NAME` prints"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys that change neither shapes nor work.
IGNORABLE = _words(
    """
    activation activation_function add_cross_attention alibi apply_residual_connection_post_layernorm architectures
    attention_multiplier attn_implementation attn_logit_softcapping attn_scale attn_temperature_tuning auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size chunk_size_feed_forward compress_rope_theta
    cross_attention_hidden_size diversity_penalty do_sample dtype early_stopping embedding_multiplier
    encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty ffn_act_fn
    final_logit_softcapping finetuning_task floor_scale for_llm_compressor global_rope_theta gradient_checkpointing
    hc_eps hc_sinkhorn_iters hidden_act hidden_activation hidden_activation_function id2label ignore_index
    indexer_rope_interleave initial_context_length is_decoder is_encoder_decoder label2id length_penalty
    local_rope_theta logit_scale logits_scaling mamba_hidden_act masked_softmax_fusion max_length min_length
    model_type moe_shared_expert_overlap mtp_use_dedicated_embeddings n_ctx no_repeat_ngram_size
    no_rope_layer_interval norm_before_gate norm_topk_prob normalization_function num_beam_groups num_beams
    num_logits_to_keep num_return_sequences offset_alibi original_max_position_embeddings output_attentions
    output_hidden_states output_past output_router_logits output_scores pad_token_id partial_rotary_factor
    position_embedding_type prefix pretraining_tp problem_type pruned_heads query_pre_attn_scalar
    remove_invalid_values reorder_and_upcast_attn repetition_penalty rescale_prenorm_residual residual_in_fp32
    residual_multiplier return_dict return_dict_in_generate rope_interleave rope_local_base_freq rope_parameters
    rope_scaling rope_theta rotary rotary_base rotary_dim rotary_emb_base rotary_pct routed_scaling_factor
    router_jitter_noise scale_attn_by_inverse_layer_idx scale_attn_weights scoring_func scoring_function
    sep_token_id seq_aux slow_but_exact summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj suppress_tokens swiglu_limit task_specific_params temperature tie_encoder_decoder
    time_step_floor time_step_limit time_step_max time_step_min tokenizer_class top_k top_p topk_method torch_dtype
    torchscript transformers_version typical_p unk_token_id unsloth_version use_bfloat16 use_bidirectional_attention
    use_cache use_grouped_mm use_mamba_kernels use_mrope use_unified_vision_chunk video_placeholder yarn_method
    """
)
# One meaning, several names: the first is the one the importer asks for.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv", "kv_n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "seq_length", "max_seq_len"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("experts_per_token", "top_k_experts", "moe_top_k"),
    "n_shared_experts": ("num_shared_experts",),
}
# A key is judged by its last word first (`router_aux_loss_coef`: a coefficient), then by words that name shapes.
_COSMETIC_LAST = _words(
    """
    act alpha beta cap coef coefficient dropout dtype eps epsilon factor func gamma id ids index init limit loss
    method multiplier name path pdrop range scale scaling seed softcapping std temperature theta token tokens
    version
    """
)
_SHAPE_WORDS = _words(
    """
    attention attn block blocks channels chunk compress compression conv cross delta depth dim dims embed embedding
    embeddings encoder engram expand expert experts ffn freq group groups hash head heads hidden hyper indexer
    intermediate interval kernel key kv latent layer layers linear lora mamba memory mlp moe mtp mult n nextn ngram
    num pattern per rank ranks ratio ratios recurrent residual routed router shared size sizes sparse ssm state
    states tie tied topk types value vocab width window windows
    """
)


class Config:
    """Reads keys of one config by name, with the family's defaults, and keeps account of them."""

    def __init__(self, data: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.where = where
        self._read: set[str] = set()
        self._defaults = dict(defaults or {})
        self._data = {str(key): value for key, value in data.items()}

    def has(self, key: str) -> bool:
        """Whether the key is given and not off (null)."""
        return self.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is. A key left out has the family's default; null switches that off, as in transformers."""
        names = (key, *ALIASES.get(key, ()))
        self._read.update(names)
        given = {name: self._data[name] for name in names if self._data.get(name) is not None}
        if len({repr(value) for value in given.values()}) > 1:
            raise InputError(f"{self.where}: {given} contradict each other; they are names of one thing: keep one")
        absent = not any(name in self._data for name in names)
        value = next(iter(given.values())) if given else self._defaults.get(key) if absent else None
        return default if value is None else value

    def size(self, key: str, default: int | None = None, low: int = 1) -> int:
        """A whole number, at least `low`."""
        value = self.get(key, default)
        if value is None:
            raise InputError(f"{self.where}: {key} is missing; a config of this model type must state it")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value < 1e12 or value != int(value):
            raise InputError(f"{self.where}: {key}={value!r} is not usable (allowed: a whole number of at least {low})")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}={value!r} is not usable (allowed: true, false)")
        return value

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers; [] where the key is absent."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise InputError(f"{self.where}: {key}={value!r} is not usable (allowed: a list of whole numbers)")
        return value

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """A list with a value a layer, or None where the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < layers:
            got = f"{len(value)} values" if isinstance(value, list) else repr(value)
            raise InputError(
                f"{self.where}: {key} has {got} (allowed: a list of one value for each of {layers} layers)"
            )
        return value

    def divides(self, key: str, small: int, large: int) -> None:
        if large % small:
            raise InputError(f"{self.where}: {key}={small} does not divide num_attention_heads={large}")

    def divides_hidden(self, hidden: int, heads: int) -> None:
        if hidden % heads:
            raise InputError(
                f"{self.where}: num_attention_heads={heads} does not divide hidden_size={hidden}; "
                "a config without head_dim needs it to"
            )

    def unread(self) -> list[str]:
        """Keys that nothing read and whose names suggest that they change shapes or work."""
        return sorted(k for k, v in self._data.items() if k not in self._read and _architectural(k, v))

    def unsupported(self, problem: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where}: {problem}; {REMEDY}")


def _architectural(key: str, value: Any) -> bool:
    if key in IGNORABLE or key.startswith("_") or value in (None, False, 0, "", [], {}):
        return False
    words = re.findall(r"[a-z]+", key.lower())
    if not words or words[-1] in _COSMETIC_LAST:
        return False
    return any(word in _SHAPE_WORDS for word in words)
