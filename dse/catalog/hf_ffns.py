"""config.json -> feed-forward layers: one function a mechanism, each returning the layer of one depth."""

from __future__ import annotations

from typing import Literal

from dse.catalog.model_schema import FeedForwardSpec, RoutedSpec

Matrices = Literal[2, 3]


def dense(hidden: int, width: int, matrices: Matrices, norms: int, bias: bool, other: int) -> FeedForwardSpec:
    """A dense MLP; its norm and biases are `extra_params`."""
    biases = (matrices - 1) * width + hidden if bias else 0
    return FeedForwardSpec(kind="dense", count=1, width=width, matrices=matrices, extra_params=norms + biases + other)


def mixture(
    hidden: int,
    *,
    experts: int,
    top_k: int,
    width: int,
    norms: int,
    shared: int = 0,
    matrices: Matrices = 3,
    latent: int = 0,
    group_limit: int = 0,
    router_bias: bool = False,
    expert_bias: bool = False,
    other: int = 0,
) -> FeedForwardSpec:
    """Routed experts with a shared part of `shared` width; the router (and `other`) are `extra_params`."""
    d_in = latent or hidden
    extra = norms + hidden * experts + (experts if router_bias else 0) + other
    if expert_bias:
        extra += experts * ((matrices - 1) * width + d_in)
    return FeedForwardSpec(
        kind="latent experts" if latent else "experts",
        count=1,
        width=shared,
        matrices=matrices,
        extra_params=extra,
        routed=RoutedSpec(
            experts=experts,
            top_k=top_k,
            d_in=d_in,
            width=width,
            matrices=matrices,
            latent=latent,
            group_limit=group_limit,
        ),
    )
