"""config.json -> sequence mixers: one function a mechanism, each returning the mixer of one layer.

Conventions the cost model relies on: GEMMs in the order of the forward pass; key/value columns in `n_kv`; norms,
biases, convolutions and other small parameters in `extra_params`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dse.catalog.hf_config import Config
from dse.catalog.model_schema import CoreSpec, GemmSpec, IndexerSpec, MixerSpec, StateSpec

FULL = "full attention"


@dataclass(frozen=True)
class Span:
    """Which keys a query of one layer sees (see `Core`)."""

    kind: str = FULL
    window: int = 0
    fill: float = 1.0
    ratio: float = 1.0
    top_k: float = 1e9


def sliding(window: int) -> Span:
    return Span(f"sliding window {window}", window=window, ratio=0.0, top_k=0.0)


def chunked(size: int) -> Span:
    return Span(f"chunked {size}", window=size, fill=0.5, ratio=0.0, top_k=0.0)


@dataclass(frozen=True)
class Heads:
    """Shapes of grouped-query attention, with what the family adds to the projections."""

    heads: int
    kv_heads: int
    dim: int
    gate: bool = False  # an output gate: as many columns again as the queries have
    shared_kv: bool = False  # one projection gives keys and values
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: int = 0  # parameters of the query and key norms
    norms: int = 0  # parameters of the layer's own norms
    other: int = 0  # attention sinks and the like


def grouped_query(hidden: int, h: Heads, span: Span) -> MixerSpec:
    """qkv, core, output. Multi-head and multi-query attention are its ends."""
    n = h.heads * h.dim * (2 if h.gate else 1)
    n_kv = h.kv_heads * h.dim * (1 if h.shared_kv else 2)
    extra = h.norms + h.qk_norm + h.other + (n + n_kv if h.qkv_bias else 0) + (hidden if h.o_bias else 0)
    return MixerSpec(
        kind=span.kind,
        count=1,
        gemms=(
            GemmSpec(k=hidden, n=n, n_kv=n_kv, split="n"),
            GemmSpec(k=h.heads * h.dim, n=hidden, split="k"),
        ),
        extra_params=extra,
        core=CoreSpec(
            heads=h.heads,
            kv_heads=h.kv_heads,
            score_dim=h.dim,
            value_dim=h.dim,
            score_dim_decode=h.dim,
            value_dim_decode=h.dim,
            kv_elements=2 * h.kv_heads * h.dim,
            window=span.window,
            window_fill=span.fill,
            ratio=span.ratio,
            top_k=span.top_k,
        ),
    )


def latent_attention(c: Config) -> MixerSpec:
    """MLA (DeepSeek-V2 to V3.2, Kimi-K2, GLM-5): low-rank queries and a cached latent; perhaps a sparse indexer."""
    d, heads = c.size("hidden_size"), c.size("num_attention_heads")
    c.get("num_key_value_heads"), c.get("head_dim"), c.get("qk_head_dim")  # implied by the sizes below
    r, rope = c.size("kv_lora_rank"), c.size("qk_rope_head_dim", low=0)
    nope, v = c.size("qk_nope_head_dim"), c.size("v_head_dim")
    rq = c.size("q_lora_rank", 0, low=0)
    biased = c.flag("attention_bias")
    queries = heads * (nope + rope)
    gemms = [GemmSpec(k=d, n=rq + r + rope)]
    gemms.append(GemmSpec(k=rq or d, n=queries, split="n"))
    gemms.append(GemmSpec(k=r, n=heads * (nope + v), split="n"))
    gemms.append(GemmSpec(k=heads * v, n=d, split="k"))
    extra = d + rq + r + ((rq + r + rope + d) if biased else 0)  # input norm, q and kv norms
    indexer, top_k, kind = None, 1e9, "latent attention"
    if c.has("index_topk"):
        if not rq:
            raise c.unsupported("index_topk without q_lora_rank: the indexer's queries come from the low-rank queries")
        indexer = IndexerSpec(heads=c.size("index_n_heads"), dim=c.size("index_head_dim"))
        top_k, kind = float(c.size("index_topk")), "sparse latent attention"
        gemms += [
            GemmSpec(k=rq, n=indexer.heads * indexer.dim),
            GemmSpec(k=d, n=indexer.dim),
            GemmSpec(k=d, n=indexer.heads),
        ]
        extra += 2 * indexer.dim  # key norm with bias
    return MixerSpec(
        kind=kind,
        count=1,
        gemms=tuple(gemms),
        extra_params=extra,
        core=CoreSpec(
            heads=heads,
            kv_heads=1,
            score_dim=nope + rope,
            value_dim=v,
            score_dim_decode=r + rope,
            value_dim_decode=r,
            kv_elements=r + rope,
            top_k=top_k,
            rematerialise=r * heads * (nope + v),
        ),
        indexer=indexer,
    )


def compressed_attention(c: Config, ratio: int) -> MixerSpec:
    """DeepSeek-V4: one shared key/value head, a local window, and keys pooled `ratio` to one beyond it.

    Ratio 4 has overlapping pools (two sets of columns) and an indexer over the pooled keys; larger ones see all pools.
    """
    d, heads, dim = c.size("hidden_size"), c.size("num_attention_heads"), c.size("head_dim")
    if c.size("num_key_value_heads", 1) != 1:
        given = c.get("num_key_value_heads")
        raise c.unsupported(f"num_key_value_heads={given} with compressed attention (allowed: 1, shared)")
    c.get("qk_rope_head_dim")  # part of head_dim
    rq, window = c.size("q_lora_rank"), c.size("sliding_window")
    groups, rank = c.size("o_groups"), c.size("o_lora_rank")
    c.divides("o_groups", groups, heads)
    index_topk, index_heads, index_dim = c.size("index_topk"), c.size("index_n_heads"), c.size("index_head_dim")
    gemms = [GemmSpec(k=d, n=rq + dim), GemmSpec(k=rq, n=heads * dim, split="n")]
    extra = d + rq + dim + heads + hyper_connection(c)  # norms, attention sinks, residual mixing
    indexer, top_k, kind = None, 0.0, f"sliding window {window}"
    if ratio:
        sets = 2 if ratio == 4 else 1
        gemms.append(GemmSpec(k=d, n=2 * sets * dim))  # pooled values and their weights
        extra += ratio * sets * dim + dim  # position biases and norm of the pool
        top_k, kind = 1e9, f"compressed 1/{ratio} beyond window {window}"
    # Groups of heads are projected apart: as many weights and FLOPs as one GEMM of k = heads*dim/groups.
    gemms.append(GemmSpec(k=heads * dim // groups, n=groups * rank, split="n"))
    gemms.append(GemmSpec(k=groups * rank, n=d, split="k"))
    if ratio == 4:
        indexer, top_k = IndexerSpec(heads=index_heads, dim=index_dim), float(index_topk)
        gemms.append(GemmSpec(k=rq, n=index_heads * index_dim))
        gemms.append(GemmSpec(k=d, n=4 * index_dim))
        gemms.append(GemmSpec(k=d, n=index_heads))
        extra += ratio * 2 * index_dim + index_dim
    return MixerSpec(
        kind=kind,
        count=1,
        gemms=tuple(gemms),
        extra_params=extra,
        core=CoreSpec(
            heads=heads,
            kv_heads=1,
            score_dim=dim,
            value_dim=dim,
            score_dim_decode=dim,
            value_dim_decode=dim,
            kv_elements=dim,  # one vector is key and value
            window=window,
            ratio=1.0 / ratio if ratio else 0.0,
            top_k=top_k,
        ),
        indexer=indexer,
    )


def hyper_connection(c: Config) -> int:
    """Parameters of one hyper-connection: hc_mult streams of the residual -> (hc_mult + 2) * hc_mult mixing weights."""
    streams = c.size("hc_mult", 1)
    mixes = (streams + 2) * streams
    return mixes * streams * c.size("hidden_size") + mixes + 3 if streams > 1 else 0


def hyper_connection_head(c: Config) -> int:
    """Parameters that gather the residual streams before a head."""
    streams = c.size("hc_mult", 1)
    return streams * streams * c.size("hidden_size") + streams + 1 if streams > 1 else 0


def gated_delta_net(c: Config) -> MixerSpec:
    """Qwen3-Next's and Qwen3.5's linear attention: a dk x dv state a value head, updated by the gated delta rule.

    FLOPs a token: 7 dk dv a head (decay 1, read the old value 2, write 2, query 2) and the convolution.
    """
    d = c.size("hidden_size")
    key_heads, value_heads = c.size("linear_num_key_heads"), c.size("linear_num_value_heads")
    dk, dv, kernel = c.size("linear_key_head_dim"), c.size("linear_value_head_dim"), c.size("linear_conv_kernel_dim")
    mixed = 2 * key_heads * dk + value_heads * dv  # q, k, v pass a short convolution
    inner = value_heads * dv
    return MixerSpec(
        kind="gated delta net",
        count=1,
        gemms=(
            GemmSpec(k=d, n=mixed + inner + 2 * value_heads, split="n"),  # q k v, output gate z, beta and decay
            GemmSpec(k=inner, n=d, split="k"),
        ),
        extra_params=d + mixed * kernel + 2 * value_heads + dv,
        state=_state(c, value_heads * dk * dv, 7, mixed, kernel, c.get("mamba_ssm_dtype", "float32")),
    )


def mamba2(c: Config) -> MixerSpec:
    """Mamba-2 (Nemotron-H): FLOPs a token 5 P N a head (decay 1, write 2, read 2) and the convolution."""
    d, heads, dim = c.size("hidden_size"), c.size("mamba_num_heads"), c.size("mamba_head_dim")
    groups, n, kernel = c.size("n_groups"), c.size("ssm_state_size"), c.size("conv_kernel")
    c.get("expand")  # the inner size is heads * dim
    inner = heads * dim
    mixed = inner + 2 * groups * n  # x, B, C pass the convolution
    projected = mixed + inner + heads  # and z, dt
    extra = d + mixed * kernel + (mixed if c.flag("use_conv_bias", True) else 0) + 3 * heads + inner
    if c.flag("use_bias") or c.flag("mamba_proj_bias"):
        extra += projected + d
    return MixerSpec(
        kind="mamba2",
        count=1,
        gemms=(GemmSpec(k=d, n=projected, split="n"), GemmSpec(k=inner, n=d, split="k")),
        extra_params=extra,
        state=_state(c, heads * dim * n, 5, mixed, kernel, c.get("mamba_ssm_cache_dtype", "float32")),
    )


def _state(c: Config, elements: int, flops: int, mixed: int, kernel: int, dtype: object) -> StateSpec:
    """The recurrent state in its own dtype, and the last kernel-1 inputs of the convolution in bf16."""
    width = {"float32": 4, "bfloat16": 2, "float16": 2}.get(str(dtype))
    if width is None:
        raise c.unsupported(f"state dtype {dtype!r} (allowed: float32, bfloat16, float16)")
    return StateSpec(
        state_bytes=elements * width + mixed * (kernel - 1) * 2,
        flops_per_token=flops * elements + 2 * mixed * kernel,
    )
