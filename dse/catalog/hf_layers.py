"""One decoder, read layer by layer: which mixer and which feed-forward part each depth has."""

from __future__ import annotations

from dataclasses import dataclass

from dse.catalog.hf_config import Config
from dse.catalog.hf_families import Style
from dse.catalog.hf_ffns import Matrices, dense, mixture
from dse.catalog.hf_mixers import (
    FULL,
    Heads,
    Span,
    chunked,
    compressed_attention,
    gated_delta_net,
    grouped_query,
    hyper_connection,
    hyper_connection_head,
    latent_attention,
    mamba2,
    sliding,
)
from dse.catalog.model_schema import FeedForwardSpec, MixerSpec

Block = MixerSpec | FeedForwardSpec


@dataclass(frozen=True)
class Decoder:
    """The blocks in order (merged later), and the parameters of its multi-token-prediction modules."""

    blocks: tuple[Block, ...]
    mtp_depth: int = 0
    mtp_params: int = 0


def decoder(c: Config, style: Style) -> Decoder:
    """Read every layer of the model."""
    layers = c.size("num_hidden_layers")
    if layers > 10_000:
        raise c.unsupported(f"num_hidden_layers={layers} (allowed: up to 10000)")
    if style.attention == "pattern":
        return _pattern(c, style, layers)
    mixers = _mixers(c, style, layers)
    ffns = [_feed_forward(c, style, i) for i in range(layers)]
    blocks = tuple(block for pair in zip(mixers, ffns, strict=True) for block in pair)
    depth, modules = _mtp_depth(c)
    if not depth:
        return Decoder(blocks)
    # A module is one more layer of the last kind behind a projection of [hidden, embedding] and three norms.
    last = compressed_attention(c, 0) if style.attention == "compressed" else mixers[-1]
    hidden = c.size("hidden_size")
    one = modules * (last.params + ffns[-1].params(hidden)) + 2 * hidden * hidden + 3 * hidden
    return Decoder(blocks, depth, depth * (one + hyper_connection_head(c)))


def _mtp_depth(c: Config) -> tuple[int, int]:
    """How many MTP modules, and how many layers each has."""
    c.get("use_mtp")
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    return max(c.size(key, 0, low=0) for key in keys), c.size("mtp_transformer_layers", 1)


# ---------------------------------------------------------------------------------------------- mixers


def _mixers(c: Config, style: Style, layers: int) -> list[MixerSpec]:
    if style.attention == "latent":
        return [latent_attention(c)] * layers
    if style.attention == "compressed":
        ratios = c.per_layer("compress_ratios", layers)
        if ratios is None:
            raise c.unsupported("compress_ratios is missing: the pooling of each layer is not known")
        return [compressed_attention(c, _ratio(c, r)) for r in ratios[:layers]]
    if style.attention == "gemma4":
        seen = [s or Span() for s in _spans(c, layers)]
        return [grouped_query(c.size("hidden_size"), _gemma4_heads(c, s), s) for s in seen]
    spans = _spans(c, layers)
    kv_heads = c.per_layer("num_key_value_heads_per_layer", layers)
    out: list[MixerSpec] = []
    for i, span in enumerate(spans):
        if span is None:
            out.append(gated_delta_net(c))
        else:
            heads = _heads(c, style, None if kv_heads is None else kv_heads[i])
            out.append(grouped_query(c.size("hidden_size"), heads, span))
    return out


def _ratio(c: Config, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise c.unsupported(f"compress_ratios holds {value!r} (allowed: 0 for none, or how many keys are pooled)")
    return 0 if value == 1 else value


def _heads(c: Config, style: Style, kv_heads: object = None) -> Heads:
    d, heads = c.size("hidden_size"), c.size("num_attention_heads")
    if not c.has("head_dim"):
        c.divides_hidden(d, heads)
    dim = c.size("head_dim", d // heads)
    kv = c.size("num_key_value_heads", _default_kv_heads(c, heads) if style.one_kv_each else None)
    if isinstance(kv_heads, int) and kv_heads > 0:
        kv = kv_heads
    elif kv_heads is not None:
        raise c.unsupported(f"num_key_value_heads_per_layer holds {kv_heads!r} (allowed: whole numbers from 1)")
    c.divides("num_key_value_heads", kv, heads)
    biased = c.flag("attention_bias")
    qwen_bias = c.flag("qkv_bias")
    general = c.flag("use_bias") or c.flag("bias")
    normed = style.qk_norm or ("head" if c.flag("use_qk_norm") and not c.has("attention_chunk_size") else "")
    if c.get("qk_norm_type", "per_layer") != "per_layer":
        raise c.unsupported(f"qk_norm_type={c.get('qk_norm_type')!r} (allowed: 'per_layer')")
    norm = {"": 0, "head": 2 * dim, "all heads": (heads + kv) * dim}[normed]
    return Heads(
        heads=heads,
        kv_heads=kv,
        dim=dim,
        gate=c.flag("attn_output_gate"),
        qkv_bias=style.qkv_bias or biased or qwen_bias or general,
        o_bias=style.o_bias or (biased and not style.bias_spares_output) or general,
        qk_norm=norm,
        norms=style.mixer_norms * style.norm_vectors * d,
        other=heads if style.sinks else 0,
    )


def _default_kv_heads(c: Config, heads: int) -> int:
    """Falcon's first generation shares one key/value head unless told otherwise."""
    return 1 if c.flag("multi_query") and not c.flag("new_decoder_architecture") else heads


def _ffn_norms(c: Config, style: Style) -> int:
    """Falcon-7B's parallel blocks share one norm; Falcon-40B and 180B have one each."""
    if c.flag("parallel_attn"):
        return 1 if c.flag("new_decoder_architecture") and c.size("num_ln_in_parallel_attn", 2) == 2 else 0
    return style.ffn_norms


def _gemma4_heads(c: Config, span: Span) -> Heads:
    """Local layers and global ones have their own head size and count; global keys may double as values."""
    d, heads, dim, kv = (c.size(k) for k in ("hidden_size", "num_attention_heads", "head_dim", "num_key_value_heads"))
    global_dim, global_kv = c.size("global_head_dim", dim), c.size("num_global_key_value_heads", kv)
    shared = c.flag("attention_k_eq_v")
    if span.kind == FULL:
        dim, kv = global_dim, global_kv
    c.divides("num_key_value_heads", kv, heads)
    biased = c.flag("attention_bias")
    return Heads(
        heads=heads,
        kv_heads=kv,
        dim=dim,
        shared_kv=shared and span.kind == FULL,
        qkv_bias=biased,
        o_bias=biased,
        qk_norm=2 * dim,
        norms=2 * d,
    )


def _spans(c: Config, layers: int) -> list[Span | None]:
    """What each layer's queries see; None: linear attention."""
    kinds = c.per_layer("layer_types", layers)
    given, full_below = c.size("sliding_window", 0, low=0), c.size("max_window_layers", 0, low=0)
    window = given if c.flag("use_sliding_window", True) else 0
    pattern, chunk = c.size("sliding_window_pattern", 0, low=0), c.size("attention_chunk_size", 0, low=0)
    interval = c.size("full_attention_interval", 0, low=0)
    if kinds is not None:
        return [_span(c, kind, window, chunk) for kind in kinds[:layers]]
    if interval:
        return [Span() if (i + 1) % interval == 0 else None for i in range(layers)]
    if chunk:
        roped = c.per_layer("no_rope_layers", layers) or [int((i + 1) % 4 != 0) for i in range(layers)]
        return [chunked(chunk) if r else Span() for r in roped[:layers]]
    if not window:
        return [Span()] * layers
    if pattern:
        return [Span() if (i + 1) % pattern == 0 else sliding(window) for i in range(layers)]
    return [sliding(window) if i >= full_below else Span() for i in range(layers)]


def _span(c: Config, kind: object, window: int, chunk: int) -> Span | None:
    if kind == "full_attention":
        return Span()
    if kind == "linear_attention":
        return None
    if kind == "sliding_attention" and window:
        return sliding(window)
    if kind == "chunked_attention" and chunk:
        return chunked(chunk)
    allowed = "full_attention, linear_attention, sliding_attention with sliding_window, chunked_attention with its size"
    raise c.unsupported(f"layer_types holds {kind!r} (allowed: {allowed})")


# ---------------------------------------------------------------------------------------------- feed-forward


def _feed_forward(c: Config, style: Style, i: int) -> FeedForwardSpec:
    d = c.size("hidden_size")
    if style.attention == "gemma4":
        return _gemma4_ffn(c, d)
    norms = _ffn_norms(c, style) * style.norm_vectors * d
    other = _hyper(c, style)
    if not style.experts_every or not c.has("num_experts") or not _has_experts(c, style, i):
        usual = 4 * d if style.matrices == 2 else None  # ungated families may leave it out
        width = c.size("intermediate_size_mlp", c.size("intermediate_size", usual))
        bias = style.mlp_bias or c.flag("mlp_bias") or c.flag("bias")
        return dense(d, width, style.matrices, norms, bias, other)
    dense_width = c.get("intermediate_size")  # the experts' own where there is no `moe_intermediate_size`
    width = c.size("moe_intermediate_size", dense_width)
    c.get("intermediate_size_mlp")
    shared, gate = _shared(c, style, width, d)
    experts = c.size("num_experts")
    correction = c.get("topk_method") == "noaux_tc" or style.router_bias or c.flag("use_routing_bias")
    # DeepSeek-V4's first layers route by a table of token ids, without this bias: counted all the same (384 numbers).
    c.get("num_hash_layers")
    groups, limit = c.size("n_group", 1), c.size("topk_group", 1)
    return mixture(
        d,
        experts=experts,
        top_k=c.size("num_experts_per_tok"),
        width=width,
        norms=norms,
        shared=shared,
        matrices=style.matrices,
        group_limit=limit if groups > 1 else 0,
        router_bias=bool(correction),
        expert_bias=style.expert_bias,
        other=other + gate,
    )


def _hyper(c: Config, style: Style) -> int:
    return hyper_connection(c) if style.attention == "compressed" else 0


def _has_experts(c: Config, style: Style, i: int) -> bool:
    if style.experts_every == "first_k_dense_replace":
        return i >= c.size("first_k_dense_replace", 0, low=0) and i % c.size("moe_layer_freq", 1) == 0
    if style.experts_every == "interleave_moe_layer_step":
        listed = c.numbers("moe_layers")
        return i in listed if listed else (i + 1) % c.size("interleave_moe_layer_step", 1) == 0
    return i not in c.numbers("mlp_only_layers") and (i + 1) % c.size("decoder_sparse_step", 1) == 0


def _shared(c: Config, style: Style, width: int, hidden: int) -> tuple[int, int]:
    """Width of the shared experts, and parameters of the gate in front of them (Qwen)."""
    if style.experts_every == "interleave_moe_layer_step":
        return width, 0  # Llama 4: one shared expert of the experts' width
    gated = c.size("shared_expert_intermediate_size", 0, low=0)
    plain = c.size("shared_intermediate_size", 0, low=0)
    return gated + plain + c.size("n_shared_experts", 0, low=0) * width, hidden if gated else 0


def _gemma4_ffn(c: Config, d: int) -> FeedForwardSpec:
    """Gemma 4: a dense MLP beside the experts, norms before and after each and after their sum."""
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if c.size(key, 0, low=0):
            raise c.unsupported(f"{key}={c.get(key)}: per-layer embeddings and layers sharing a cache are not modelled")
    c.get("vocab_size_per_layer_input")
    if c.flag("use_double_wide_mlp"):
        raise c.unsupported("use_double_wide_mlp=true is not modelled")
    width = c.size("intermediate_size")
    if not c.flag("enable_moe_block"):
        return dense(d, width, 3, 2 * d, False, 0)
    experts = c.size("num_experts")
    return mixture(
        d,
        experts=experts,
        top_k=c.size("num_experts_per_tok"),
        width=c.size("moe_intermediate_size"),
        norms=5 * d,
        shared=width,
        other=d + experts,  # the router's input scale and a scale an expert
    )


# ------------------------------------------------------------------------------- layers named by letters


def _pattern(c: Config, style: Style, layers: int) -> Decoder:
    """Nemotron-H: each layer is one block, named by a letter of `hybrid_override_pattern`."""
    pattern = c.get("hybrid_override_pattern")
    if not isinstance(pattern, str) or len(pattern) != layers:
        got = f"{len(pattern)} letters" if isinstance(pattern, str) else repr(pattern)
        raise c.unsupported(f"hybrid_override_pattern has {got}; one letter for each of {layers} layers is needed")
    depth = c.size("num_nextn_predict_layers", 0, low=0)
    module = c.get("mtp_hybrid_override_pattern", "")
    if not isinstance(module, str):
        raise c.unsupported(f"mtp_hybrid_override_pattern={module!r} (allowed: letters)")
    if c.has("sliding_window"):
        raise c.unsupported(f"sliding_window={c.get('sliding_window')} in a model of letters (allowed: null)")
    hidden = c.size("hidden_size")
    of_module = sum(_params(_block(c, style, letter, hidden), hidden) for letter in module)
    mtp = depth * (of_module + 2 * hidden * hidden + 3 * hidden) if depth else 0
    return Decoder(tuple(_block(c, style, letter, hidden) for letter in pattern), depth, mtp)


def _params(block: Block, hidden: int) -> int:
    return block.params if isinstance(block, MixerSpec) else block.params(hidden)


def _block(c: Config, style: Style, letter: str, hidden: int) -> Block:
    if letter == "M":
        return mamba2(c)
    if letter == "*":
        return grouped_query(hidden, _heads(c, style), Span())
    matrices: Matrices = style.matrices
    if letter == "-":
        return dense(hidden, c.size("intermediate_size"), matrices, hidden, c.flag("mlp_bias"), 0)
    if letter != "E":
        allowed = "M mamba2, * attention, - MLP, E experts"
        raise c.unsupported(f"hybrid_override_pattern holds {letter!r} (allowed: {allowed})")
    c.get("intermediate_size")
    width = c.size("moe_intermediate_size")
    groups, limit = c.size("n_group", 1), c.size("topk_group", 1)
    return mixture(
        hidden,
        experts=c.size("num_experts"),
        top_k=c.size("num_experts_per_tok"),
        width=width,
        norms=hidden,
        shared=c.size("n_shared_experts", 0, low=0) * c.size("moe_shared_expert_intermediate_size", width),
        matrices=matrices,
        latent=c.size("moe_latent_size", 0, low=0),
        group_limit=limit if groups > 1 else 0,
        router_bias=style.router_bias,
    )
