"""Models of plans: a catalogue entry, or dimensions written in the plan, with every reading that they leave open."""

from __future__ import annotations

from dataclasses import dataclass

from dse.audit.types import Variant
from dse.catalog.model_schema import CoreSpec, FeedForwardSpec, GemmSpec, MixerSpec, ModelEntry, RoutedSpec
from dse.catalog.models import model, parameter_count, to_architecture
from dse.cost.types import replace


@dataclass(frozen=True)
class Dimensions:
    """A decoder of alike layers. None: not stated (`gated`: both readings are audited)."""

    name: str
    layers: int
    hidden: int
    heads: int
    head_dim: int
    kv_heads: int
    ffn_width: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    gated: bool | None = None
    vocab: int | None = None
    tied: bool = False


def variants_of(given: str | Dimensions) -> tuple[Variant, ...]:
    """The models that a plan may mean: one, or two where it does not say whether its feed-forward layers are gated."""
    if isinstance(given, str):
        return (_variant("", model(given)),)
    if given.gated is not None:
        return (_variant("", _entry(given, 3 if given.gated else 2)),)
    two = "two-matrix experts" if given.experts else "two matrices"
    return (_variant(two, _entry(given, 2)), _variant("SwiGLU", _entry(given, 3)))


def _variant(label: str, entry: ModelEntry) -> Variant:
    """A vocabulary of one stands for one that is not stated: no embeddings then."""
    count = parameter_count(entry)
    arch = to_architecture(entry)
    if entry.vocab > 1:
        return Variant(label, entry, arch, count.total, count.active)
    return Variant(
        label, entry, replace(arch, vocab=0.0), count.total - count.embedding, count.active - count.embedding
    )


def _entry(d: Dimensions, matrices: int) -> ModelEntry:
    """Full attention in every layer, dense or expert feed-forward; a router of hidden x experts; norms left out."""
    wide, keys = d.heads * d.head_dim, d.kv_heads * d.head_dim
    dims = dict.fromkeys(("score_dim", "value_dim", "score_dim_decode", "value_dim_decode"), d.head_dim)
    routed = None
    if d.experts:
        routed = RoutedSpec(
            experts=d.experts,
            top_k=d.top_k,
            d_in=d.hidden,
            width=d.expert_width,
            matrices=3 if matrices == 3 else 2,
        )
    return ModelEntry(
        name=d.name,
        layers=d.layers,
        max_context=10**9,
        hidden=d.hidden,
        vocab=d.vocab or 1,
        embeddings=1 if d.tied or d.vocab is None else 2,
        low_bit_scope="ffn",
        mixers=(
            MixerSpec(
                kind="full attention",
                count=d.layers,
                gemms=(
                    GemmSpec(k=d.hidden, n=wide, n_kv=2 * keys, split="n"),
                    GemmSpec(k=wide, n=d.hidden, split="k"),
                ),
                core=CoreSpec(heads=d.heads, kv_heads=d.kv_heads, kv_elements=2 * keys, **dims),
            ),
        ),
        ffns=(
            FeedForwardSpec(
                kind="experts" if d.experts else "dense",
                count=d.layers,
                width=d.ffn_width,
                matrices=3 if matrices == 3 else 2,
                extra_params=d.hidden * d.experts,
                routed=routed,
            ),
        ),
    )


__all__ = ["Dimensions", "variants_of"]
