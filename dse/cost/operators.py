"""FLOPs and bytes of one layer's operators on one rank. Prefill and decode are the same formulas.

Symbols as in the field: T new tokens a request, S tokens already cached, `span` the stretch of positions over which a
mean is taken (span = T: one prefill; span = osl with T = 1: the mean decode step of a whole answer).
"""

from __future__ import annotations

import jax.numpy as jnp

from dse.cost.types import Core, Gemm, Number, pytree
from dse.numerics import safe_divide


@pytree
class GemmShape:
    """A weight matrix as one rank holds it: k x n elements."""

    k: Number
    n: Number

    def flops(self, m: Number) -> Number:
        """2 m n k."""
        return 2.0 * m * self.n * self.k

    def weights(self) -> Number:
        """Elements."""
        return self.k * self.n

    def activations(self, m: Number) -> Number:
        """Elements read and written: m (k + n)."""
        return m * (self.k + self.n)


def shard_gemm(gemm: Gemm, tp: Number, kv_heads: Number) -> GemmShape:
    """TP divides k or n where the matrix says so; KV columns only by min(tp, kv_heads) (replicated beyond)."""
    return GemmShape(
        k=gemm.k / (1.0 + gemm.split_k * (tp - 1.0)),
        n=gemm.n / (1.0 + gemm.split_n * (tp - 1.0)) + gemm.n_kv / jnp.minimum(tp, kv_heads),
    )


def mean_clamped(start: Number, span: Number, limit: Number, fill: Number = 1.0) -> Number:
    """Mean over t in [0, span) of (x if x < limit else fill*limit), x = start + t.

    = (u (start + u/2) + (span - u) fill limit) / span with u = clip(limit - start, 0, span) the positions below the
    limit; written so that nothing large is subtracted (float32 at a million tokens). Ignores the +1 of a token's view
    of itself, as the field's causal T*(S + T/2) does.
    """
    below = jnp.clip(limit - start, 0.0, span)
    return safe_divide(below * (start + 0.5 * below) + (span - below) * (fill * limit), span)


def visible_keys(core: Core, start: Number, span: Number) -> Number:
    """Mean keys that one query attends to: local window plus global (possibly compressed, possibly top-k) keys."""
    local = mean_clamped(start, span, core.window, core.window_fill)
    return local + core.ratio * mean_clamped(start, span, safe_divide(core.top_k, core.ratio))


def context(start: Number, span: Number, tokens: Number) -> Number:
    """Mean keys that exist at the end of a step of `tokens` new tokens: S + T for one prefill and one decode step."""
    return start + 0.5 * (span + tokens)


def keys_read(core: Core, start: Number, span: Number, tokens: Number) -> Number:
    """Keys one request's step must read from HBM: each once, within the window's reach or the top-k's."""
    length = context(start, span, tokens)
    reach = jnp.where(core.window > 0, core.window_fill * core.window + tokens, 0.0)
    return jnp.minimum(length, reach) + jnp.minimum(core.ratio * length, tokens * core.top_k)


def cached_keys(core: Core, length: Number) -> Number:
    """Keys a request of `length` tokens keeps in memory: the window's, and the (compressed) global ones."""
    return jnp.minimum(length, core.window) + core.ratio * length


def core_flops(heads: Number, dims: Number, tokens: Number, keys: Number) -> Number:
    """Scores and values: 2 heads tokens keys (score_dim + value_dim). GQA: 4 H dh T (S + T/2)."""
    return 2.0 * heads * dims * tokens * keys


def experts_touched(experts: Number, top_k: Number, tokens: Number, ep: Number) -> Number:
    """Distinct experts a rank reads when `tokens` tokens of the EP group choose uniformly: (E/ep)(1 - (1 - k/E)^t)."""
    share = jnp.minimum(safe_divide(top_k, experts), 1.0)
    # (1 - k/E)^t through log1p/expm1: exact for k << E in float32; k = E means that every expert is touched
    log_miss = jnp.log1p(-jnp.minimum(share, 1.0 - 1e-7))
    return experts / ep * -jnp.expm1(tokens * log_miss)
