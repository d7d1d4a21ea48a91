"""How programs are compiled: what runs for milliseconds is not worth seconds of optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

# XLA's fusion emitters take minutes over a program as large as a Jacobian of the whole model, ten seconds without them;
# and they double the time to compile those half as large.
LARGE: dict[str, bool | str] = {"xla_cpu_use_fusion_emitters": False}
# A quarter of the compile time for programs that run 2 to 20 times longer; the same numbers but for rounding.
QUICK: dict[str, bool | str] = {"xla_backend_optimization_level": "0", **LARGE}
FEW = 100_000  # rows that a quickly compiled program prices before an optimised one would be compiled


def quick(kernel: Callable[..., Any]) -> Any:
    """A kernel compiled quickly. Not to be called inside another `jit`, `vmap` or derivative: see `by_size`."""
    return jax.jit(kernel, compiler_options=QUICK)


def by_size(kernel: Callable[..., Any]) -> Callable[[Any], Any]:
    """A kernel of one batched tree, compiled quickly for few rows, optimised for many or where the caller traces."""
    few, many = quick(kernel), jax.jit(kernel)

    def call(batch: Any) -> Any:
        leaves = jax.tree.leaves(batch)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (many if traced or len(leaves[0]) > FEW else few)(batch)

    return call


__all__ = ["LARGE", "QUICK", "by_size", "quick"]
