"""A Hugging Face config.json -> a catalogue entry, exactly or not at all.

Every key that shapes the model is either read or makes an `UnsupportedModel` that names it; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from dse.catalog.hf_config import Config
from dse.catalog.hf_families import FAMILIES, Scope, Style, family
from dse.catalog.hf_layers import decoder
from dse.catalog.hf_mixers import hyper_connection_head
from dse.catalog.hf_towers import vision_params
from dse.catalog.model_schema import FeedForwardSpec, MixerSpec, ModelEntry, input_error
from dse.errors import InputError, UnsupportedModel

Layer = TypeVar("Layer", MixerSpec, FeedForwardSpec)

# What a multimodal wrapper holds beside `text_config`.
_MEDIA = re.compile("image|video|vision|audio|media")  # of the towers' inputs
_WRAPPED = ("vision_config", "audio_config", "text_config", "quantization_config", "tie_word_embeddings", "model_type")


def from_config(config: Mapping[str, Any], name: str) -> ModelEntry:
    """The entry of a model, from its config.json. Multimodal wrappers: the text model, with the vision tower apart."""
    where = f"{name}: config.json"
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: expected a JSON object with keys such as model_type, got {type(config).__name__}")
    if not name.strip():
        raise InputError("a model imported from config.json needs a name")
    try:
        return _entry(config, name, where)
    except ValidationError as error:
        raise input_error(error, where) from None


def _entry(config: Mapping[str, Any], name: str, where: str) -> ModelEntry:
    text, outer = _text_part(config, where)
    model_type = text.get("model_type") or config.get("model_type")
    style = family(str(model_type))
    if style is None:
        raise _unknown_family(model_type, text, where)
    c = Config(text, where, style.defaults)
    read = decoder(c, style)
    hidden, vocab = c.size("hidden_size"), c.size("vocab_size")
    if c.size("word_embed_proj_dim", hidden) != hidden:
        raise c.unsupported(f"word_embed_proj_dim={c.get('word_embed_proj_dim')} (allowed: hidden_size={hidden})")
    tied = c.flag("tie_word_embeddings")
    context = c.size("max_position_embeddings")
    vision, notes = vision_params(outer.get("vision_config"), hidden, where)
    weights, scope, rest = _formats(c, style, text.get("expert_dtype"))
    other = _other_params(c, style, hidden, vocab, context)
    layers = c.size("num_hidden_layers")
    if style.attention == "compressed":
        notes = (*notes, "hyper-connections are counted as parameters; the time of mixing the residual streams is not")
    _refuse_unread(c, outer, where)
    return ModelEntry(
        name=name,
        notes=notes,
        native_weights=weights,
        low_bit_scope=scope,
        rest_precision=rest,
        layers=layers,
        max_context=context,
        hidden=hidden,
        vocab=vocab,
        embeddings=1 if tied else 2,
        mixers=_merged(b for b in read.blocks if isinstance(b, MixerSpec)),
        ffns=_merged(b for b in read.blocks if isinstance(b, FeedForwardSpec)),
        other_params=other,
        vision_params=vision,
        mtp_depth=read.mtp_depth,
        mtp_params=read.mtp_params,
    )


def _text_part(config: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The text model's own config, and the wrapper around it ({} where there is none)."""
    text = config.get("text_config")
    if text is None:
        return dict(config), {}
    if not isinstance(text, Mapping):
        raise InputError(f"{where}: text_config is {type(text).__name__}; expected an object of keys")
    if config.get("audio_config"):
        raise UnsupportedModel(f"{where}: audio_config: audio towers are not modelled; remove the key to leave it out")
    inherited = {k: config[k] for k in ("tie_word_embeddings", "quantization_config") if k in config}
    return inherited | dict(text), config


def _unknown_family(model_type: object, text: Mapping[str, Any], where: str) -> UnsupportedModel:
    keys = ", ".join(Config(text, where).unread()) or "none that name shapes"
    return UnsupportedModel(
        f"{where}: model_type {model_type!r} is not known, so these keys were not understood: {keys} "
        f"(known: {', '.join(sorted(FAMILIES))}); if the model has exactly the layers of a known family, "
        "set model_type to it; otherwise describe it by hand in a YAML file"
    )


def _refuse_unread(c: Config, outer: Mapping[str, Any], where: str) -> None:
    wrapper = Config({k: v for k, v in outer.items() if k not in _WRAPPED and not _MEDIA.search(k)}, where)
    unread = [*c.unread(), *wrapper.unread()]
    if unread:
        raise c.unsupported(f"keys not understood: {', '.join(unread)} (they look as if they shape the model)")


def _merged(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """Identical layers become one kind with a count, in the order of first appearance."""
    kinds: dict[Layer, int] = {}
    for layer in layers:
        kinds[layer] = kinds.get(layer, 0) + layer.count
    return tuple(layer.model_copy(update={"count": count}) for layer, count in kinds.items())


def _other_params(c: Config, style: Style, hidden: int, vocab: int, context: int) -> int:
    """Parameters outside the layers and embeddings: norms, learned positions, the head's bias."""
    norm = style.norm_vectors * hidden
    total = norm if style.final_norm else 0
    total += norm if style.embedding_norm else 0
    total += vocab if style.head_bias else 0
    total += (context + style.positions) * hidden if style.positions >= 0 else 0
    if c.flag("do_layer_norm_before", True) is False:
        raise c.unsupported("do_layer_norm_before=false: a model without a final norm is not modelled")
    return total + hyper_connection_head(c)


# ---------------------------------------------------------------------------------- the checkpoint's format


def _formats(c: Config, style: Style, expert_dtype: object) -> tuple[str, Scope, Literal["bf16", "fp8"]]:
    """Format of the weights, which of them a 4-bit checkpoint quantises, and the format of the rest."""
    c.get("expert_dtype")
    quantised = c.get("quantization_config")
    if quantised is None:
        return "bf16", style.scope, "bf16"
    if not isinstance(quantised, Mapping):
        raise InputError(f"{c.where}: quantization_config is {type(quantised).__name__}; expected an object of keys")
    weights = _weights(c, quantised)
    if expert_dtype is not None:
        if expert_dtype != "fp4" or weights != "fp8":
            raise c.unsupported(f"expert_dtype={expert_dtype!r} with {weights} weights (allowed: 'fp4' with fp8)")
        return "mxfp4", "experts", "fp8"
    return weights, _scope(quantised, style.scope), "bf16"


# (bits, number type) of compressed-tensors and quark.
_COMPRESSED: Mapping[tuple[Any, Any], str] = {
    (4, "int"): "int4",
    (8, "int"): "int8",
    (8, "float"): "fp8",
    (4, "float"): "fp4",
}


def _weights(c: Config, q: Mapping[str, Any]) -> str:
    method = str(q.get("quant_method", "")).lower()
    if method in ("fp8", "fbgemm_fp8", "mxfp4"):
        return method.removeprefix("fbgemm_")
    if method in ("gptq", "awq") and q.get("bits") in (4, 8):
        return f"int{q['bits']}"
    if method == "modelopt":
        algorithm = str(q.get("quant_algo", "")).upper()
        if algorithm in ("FP8", "NVFP4"):
            return "fp8" if algorithm == "FP8" else "fp4"
    if method in ("compressed-tensors", "quark"):
        found = {(w.get("num_bits"), w.get("type")) for w in _group_weights(q)}
        if len(found) == 1 and next(iter(found)) in _COMPRESSED:
            return _COMPRESSED[next(iter(found))]
    detail = {k: q[k] for k in ("quant_method", "quant_algo", "bits", "fmt", "format") if k in q}
    raise c.unsupported(f"quantization_config {detail} is not understood; remove it to import the bf16 model")


def _group_weights(q: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = q.get("config_groups")
    if not isinstance(groups, Mapping):
        return []
    return [g["weights"] for g in groups.values() if isinstance(g, Mapping) and isinstance(g.get("weights"), Mapping)]


def _scope(q: Mapping[str, Any], default: Scope) -> Scope:
    """From the modules left out: attention and shared experts -> experts; attention -> feed-forward."""
    left_out = " ".join(str(m) for m in [*(q.get("ignore") or []), *(q.get("modules_to_not_convert") or [])])
    if "self_attn" not in left_out:
        return default
    return "experts" if "shared_experts" in left_out or default == "experts" else "ffn"


__all__ = ["from_config"]
