"""DeepSeek-V3/R1 (config.json of the checkpoint), which ShallowSim and ModelMeter are written for."""

from __future__ import annotations

from dse.cost.types import Architecture, Core, FeedForward, Gemm, Mixer, Routed

HIDDEN, HEADS, Q_RANK, KV_RANK = 7168.0, 128.0, 1536.0, 512.0
NOPE, ROPE, VALUE = 128.0, 64.0, 128.0
LATENT = KV_RANK + ROPE  # cached elements a token a layer
EXPERTS, TOP_K = 256.0, 8.0
FFN, EXPERT_FFN = 18432.0, 2048.0
DENSE_LAYERS, MOE_LAYERS = 3.0, 58.0
LAYERS = DENSE_LAYERS + MOE_LAYERS
MLA_WEIGHTS = 187105280.0  # a layer

DEEPSEEK_R1 = Architecture(
    hidden=HIDDEN,
    vocab=129280.0,
    embeddings=2.0,
    mixers=(
        Mixer(
            count=LAYERS,
            gemms=(
                Gemm(k=HIDDEN, n=Q_RANK + LATENT),
                Gemm(k=Q_RANK, n=HEADS * (NOPE + ROPE), split_n=1.0),
                Gemm(k=KV_RANK, n=HEADS * (NOPE + VALUE), split_n=1.0),
                Gemm(k=HEADS * VALUE, n=HIDDEN, split_k=1.0),
            ),
            core=Core(
                heads=HEADS,
                kv_heads=1.0,
                score_dim=NOPE + ROPE,
                value_dim=VALUE,
                score_dim_decode=LATENT,
                value_dim_decode=KV_RANK,
                kv_elements=LATENT,
                rematerialise=KV_RANK * HEADS * (NOPE + VALUE),
            ),
        ),
    ),
    ffns=(
        FeedForward(count=DENSE_LAYERS, width=FFN, matrices=3.0),
        FeedForward(
            count=MOE_LAYERS,
            width=EXPERT_FFN,
            matrices=3.0,
            routed=Routed(experts=EXPERTS, top_k=TOP_K, d_in=HIDDEN, width=EXPERT_FFN, matrices=3.0, group_limit=4.0),
        ),
    ),
)
