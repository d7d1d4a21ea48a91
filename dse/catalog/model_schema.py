"""What a file of the models catalogue says: `dse.cost.types.Architecture` in plain numbers, with where they are from.

Errors are collected by pydantic with their paths and leave here as one `InputError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dse.errors import InputError, UnknownName, unknown
from dse.units import PRECISIONS

Count = Annotated[int, Field(gt=0)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# What a published total covers; `copies`: the embeddings once more, kept beside an MTP module.
Part = Literal["main", "mtp", "vision", "copies"]


class Spec(BaseModel):
    """Unknown keys are errors; entries are values, never changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class GemmSpec(Spec):
    """One weight matrix: k inputs -> n + n_kv outputs; TP divides `split` ("k" rows, "n" columns, "" neither)."""

    k: Size
    n: Size
    n_kv: Size = 0
    split: Literal["", "k", "n"] = ""

    @property
    def params(self) -> int:
        return self.k * (self.n + self.n_kv)


class CoreSpec(Spec):
    """Softmax attention; see `dse.cost.types.Core`."""

    heads: Count
    kv_heads: Count
    score_dim: Count
    value_dim: Count
    score_dim_decode: Count
    value_dim_decode: Count
    kv_elements: Size
    window: Size = 0
    window_fill: Positive = 1.0
    ratio: Amount = 1.0
    top_k: Amount = 1e9
    rematerialise: Size = 0


class IndexerSpec(Spec):
    """The indexer that picks top-k keys; see `dse.cost.types.Indexer`."""

    heads: Count
    dim: Count


class StateSpec(Spec):
    """The state of linear attention; see `dse.cost.types.State`."""

    state_bytes: Amount
    flops_per_token: Amount


class MixerSpec(Spec):
    """A kind of sequence-mixing layer, its label, and how many layers are of it."""

    kind: str
    count: Count
    gemms: tuple[GemmSpec, ...]
    extra_params: Size = 0
    core: CoreSpec | None = None
    indexer: IndexerSpec | None = None
    state: StateSpec | None = None

    @property
    def params(self) -> int:
        """Parameters of one layer."""
        return sum(g.params for g in self.gemms) + self.extra_params


class RoutedSpec(Spec):
    """Routed experts; see `dse.cost.types.Routed`."""

    experts: Count
    top_k: Count
    d_in: Count
    width: Count
    matrices: Literal[2, 3] = 3
    latent: Size = 0
    group_limit: Size = 0

    @model_validator(mode="after")
    def _chosen_of_all(self) -> RoutedSpec:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts} (allowed: 1 to {self.experts})")
        return self

    @property
    def expert_params(self) -> int:
        return self.matrices * self.d_in * self.width


class FeedForwardSpec(Spec):
    """A kind of feed-forward layer: a dense or shared-expert part of `width`, and perhaps routed experts."""

    kind: str
    count: Count
    width: Size
    matrices: Literal[2, 3] = 3
    extra_params: Size = 0
    routed: RoutedSpec | None = None

    def params(self, hidden: int, experts: int | None = None) -> int:
        """Parameters of one layer with all its experts, or with `experts` of them."""
        total = self.matrices * hidden * self.width + self.extra_params
        if self.routed is not None:
            chosen = self.routed.experts if experts is None else min(experts, self.routed.experts)
            total += chosen * self.routed.expert_params + 2 * hidden * self.routed.latent
        return total


class Published(Spec):
    """The publisher's own parameter counts: `counts` says which parts `total` covers."""

    total: Count
    active: Count | None = None
    exact: bool = False
    counts: tuple[Part, ...] = ("main",)
    source: str


class ModelEntry(Spec):
    """One model: shapes, the format of its checkpoint, and sources.

    `low_bit_scope` says which weights a 4-bit checkpoint of this model quantises (`all`: mixers and feed-forward,
    `ffn`, `experts`), `rest_precision` the format of the weights it leaves.
    """

    name: str = Field(min_length=1)
    organisation: str = ""
    aliases: tuple[str, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    published: Published | None = None
    native_weights: str = "bf16"
    low_bit_scope: Literal["all", "ffn", "experts"] = "all"
    rest_precision: Literal["bf16", "fp8"] = "bf16"
    layers: Count
    max_context: Count
    hidden: Count
    vocab: Count
    embeddings: Literal[1, 2]
    mixers: tuple[MixerSpec, ...]
    ffns: tuple[FeedForwardSpec, ...]
    other_params: Size = 0
    vision_params: Size = 0
    mtp_depth: Size = 0
    mtp_params: Size = 0

    @model_validator(mode="after")
    def _consistent(self) -> ModelEntry:
        if self.native_weights not in PRECISIONS:
            raise ValueError(f"native_weights {self.native_weights!r} (allowed: {', '.join(PRECISIONS)})")
        if not self.mixers and not self.ffns:
            raise ValueError("no mixers and no ffns: a model needs at least one layer")
        return self


def parse(data: Any, where: str) -> ModelEntry:
    """A `ModelEntry` of plain data; what is wrong with it becomes one `InputError`."""
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: expected a mapping of keys (name, hidden, mixers, ...), got {type(data).__name__}")
    try:
        return ModelEntry.model_validate(data)
    except ValidationError as error:
        raise input_error(error, where) from None


def input_error(error: ValidationError, where: str) -> InputError:
    """All that is wrong, in one message with the paths."""
    lines, unknown_only = [], True
    for item in error.errors():
        path = ".".join(str(p) for p in item["loc"]) or "file"
        if item["type"] == "extra_forbidden":
            known = sorted({name for spec in Spec.__subclasses__() for name in spec.model_fields})
            lines.append(str(unknown("key", item["loc"][-1], known, path)))
            continue
        unknown_only = False
        value = item.get("input")
        shown = "" if item["type"] == "missing" or isinstance(value, Mapping) else f" (got {value!r})"
        lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{shown}")
    kind = UnknownName if unknown_only else InputError
    if len(lines) > 8:
        lines = [*lines[:7], f"and {len(lines) - 7} more"]
    return kind(f"{where}: {'; '.join(lines)}; compare with the output of `dse import-model config.json`")


def dump(entry: ModelEntry) -> str:
    """The entry as YAML, as the catalogue keeps it; `parse(yaml.safe_load(dump(e)), ...) == e`."""
    data = entry.model_dump(mode="json", exclude_defaults=True)
    for layer in (*data.get("mixers", ()), *data.get("ffns", ())):
        for part in ("core", "state", "routed"):
            if part in layer:
                layer[part] = {key: _plain(value) for key, value in layer[part].items()}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=116, allow_unicode=True)


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


__all__ = [
    "CoreSpec",
    "FeedForwardSpec",
    "GemmSpec",
    "IndexerSpec",
    "MixerSpec",
    "ModelEntry",
    "Published",
    "RoutedSpec",
    "StateSpec",
    "dump",
    "input_error",
    "parse",
]
