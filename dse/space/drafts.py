"""Draft models: what a name says, whether it can draft for a target, and the GPUs of the target that share it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from dse.catalog.align import align
from dse.catalog.model_schema import FeedForwardSpec, ModelEntry
from dse.catalog.models import model, parameter_count, to_architecture
from dse.cost.types import Architecture, replace, stack
from dse.errors import InputError
from dse.space.facts import Facts, facts
from dse.space.schema import SpaceSpec

NONE = "none"
SIZES = {"m": 1e6, "b": 1e9}
LIKE_VOCABULARY = 0.01  # padding of one tokenizer's vocabulary
HEAD = re.compile(r"(\d+(?:\.\d+)?)\s*([mb])", re.IGNORECASE)


def draft_entry(text: str, target: ModelEntry) -> ModelEntry:
    """The draft model that a name says: one of the catalogue, or "0.8B", an EAGLE-like head of so many parameters.

    Raises InputError where it has experts or another tokenizer's vocabulary, or is no smaller than its target.
    """
    size = HEAD.fullmatch(text.strip())
    if size is not None:
        return head_of(float(size[1]) * SIZES[size[2].lower()], target)
    entry = model(text)
    if facts([entry]).moe[0]:
        raise InputError(f"draft_model: {entry.name} has experts (allowed: a dense model, or a head such as 0.8B)")
    if abs(entry.vocab / target.vocab - 1.0) > LIKE_VOCABULARY:
        what = f"{entry.name} has {entry.vocab} tokens, {target.name} {target.vocab}"
        raise InputError(f"draft_model: {what}; a draft needs its target's tokenizer (or a head such as 0.8B)")
    if parameter_count(entry).active >= parameter_count(target).active:
        raise InputError(f"draft_model: {entry.name} is no smaller than {target.name}; name a smaller one")
    return entry


def head_of(params: float, target: ModelEntry) -> ModelEntry:
    """One layer like the target's first, its feed-forward part dense and as wide as makes it `params` parameters.

    Embeddings and LM head are the target's own (EAGLE, Li et al. 2024); every drafted token computes the LM head.
    """
    mixer = target.mixers[0].model_copy(update={"count": 1})
    width = round((params - mixer.params) / (3 * target.hidden))
    if width < 1:
        raise InputError(f"draft_model: {params / 1e6:g}M is less than a layer's attention ({mixer.params / 1e6:.0f}M)")
    ffn = FeedForwardSpec(kind="dense", count=1, width=width)
    changes = {"name": f"{params / 1e9:g}B", "layers": 1, "mixers": (mixer,), "ffns": (ffn,)}
    none = {"other_params": 0, "vision_params": 0, "mtp_depth": 0, "mtp_params": 0}
    return target.model_copy(update={**changes, **none})


def is_head(text: str) -> bool:
    return HEAD.fullmatch(text.strip()) is not None


def draft_architecture(text: str, target: ModelEntry) -> Architecture:
    """The draft model as the cost model's pytree; a head holds no embeddings of its own."""
    found = to_architecture(draft_entry(text, target))
    return replace(found, embeddings=0.0) if is_head(text) else found


def shared_over(text: str, target: ModelEntry, tps: np.ndarray) -> np.ndarray:
    """The TP of a draft model by its target's: the same where that divides it, else 1 (as `draft_tp` left out)."""
    if is_head(text):
        return tps
    return np.where(facts([draft_entry(text, target)]).tp(tps)[0], tps, 1)


def draft_table(pairs: Sequence[tuple[str, ModelEntry]]) -> Architecture:
    """Draft models for targets, one row each, as one tree; "none" is a model without layers."""
    known = [(name, target) for name, target in pairs if name != NONE]
    made = iter(align([draft_architecture(name, target) for name, target in known]))
    found = [next(made) if name != NONE else None for name, _ in pairs]
    like = next(x for x in found if x is not None)
    return stack([nothing_like(like) if x is None else x for x in found])


def sharing(names: Sequence[str], targets: Sequence[ModelEntry], most: int) -> np.ndarray:
    """The TP of each draft model (axis 1) by its target (0) and the target's own, 0..most (2); 0 where none drafts."""
    tps = np.maximum(np.arange(most + 1), 1)
    nobody = np.zeros(most + 1, np.int64)
    return np.array([[nobody if name == NONE else shared_over(name, one, tps) for name in names] for one in targets])


def draft_problems(spec: SpaceSpec, shapes: Facts, pairs: Sequence[tuple[str, ModelEntry]]) -> list[str]:
    """What keeps the drafts that a space asks for from being drafted."""
    return _without_modules(spec, shapes) + _unfit(spec, pairs)


def _without_modules(spec: SpaceSpec, shapes: Facts) -> list[str]:
    """Draft tokens need MTP modules (or a draft model) in every model: load and design are independent axes."""
    without = [name for name, has in zip(shapes.names, shapes.has_mtp) if not has]
    most = max(spec.axes.draft_tokens)
    if not most or not without or spec.options.external_draft or NONE not in spec.axes.draft_model:
        return []
    return [
        f"axes.draft_tokens: {most} needs MTP modules, of which {', '.join(without[:3])} has none (allowed: 0);"
        " axes.draft_model: [NAME] drafts with a smaller model; options.external_draft: true with one that is free"
    ]


def _unfit(spec: SpaceSpec, pairs: Sequence[tuple[str, ModelEntry]]) -> list[str]:
    """What keeps a draft model from drafting for a model."""
    problems = []
    for name, entry in pairs:
        try:
            if name != NONE:
                draft_entry(name, entry)
        except InputError as error:
            problems.append(f"axes.draft_model: {str(error).removeprefix('draft_model: ')}")
    known = [name for name, _ in pairs if name != NONE]
    if known and not max(spec.axes.draft_tokens):
        problems.append(f"axes.draft_tokens: 0, so {known[0]} drafts nothing; give the tokens it drafts a step")
    return problems


def nothing_like(arch: Architecture) -> Architecture:
    """A model of the same structure that computes and holds nothing."""
    return replace(
        arch,
        vocab=0.0,
        embeddings=0.0,
        other_params=0.0,
        mtp_params=0.0,
        mixers=tuple(replace(m, count=0.0) for m in arch.mixers),
        ffns=tuple(replace(f, count=0.0) for f in arch.ffns),
    )


__all__ = [
    "NONE",
    "draft_architecture",
    "draft_entry",
    "draft_problems",
    "draft_table",
    "head_of",
    "shared_over",
    "sharing",
]
