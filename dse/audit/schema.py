"""What a plan's YAML may say, as pydantic models; values become SI numbers here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from dse.audit.kinds import KINDS
from dse.audit.quantity import amount, quantity
from dse.audit.text import claims_of, degrees_of
from dse.audit.types import Claim, Quantity
from dse.space import values as v

_FORMATS = {"fp16": "bf16", "float16": "bf16", "bfloat16": "bf16", "nvfp4": "fp4"}


def _one(dimension: str, high: float = float("inf")) -> BeforeValidator:
    return BeforeValidator(partial(amount, dimension=dimension, high=high))


def _whole(value: Any) -> int:
    return v.integer(value)


def _format(value: Any) -> str:
    name = str(value).strip().lower()
    return _FORMATS.get(name, name)


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{v.shown(value)} is not text")
    return value.strip()


def _target(dimension: str) -> BeforeValidator:
    return BeforeValidator(partial(quantity, dimension=dimension))


BY_NAME, BY_NUMBERS = "by name", "by numbers"  # pydantic's tags of the two forms; they are no part of a place


def _form(value: Any) -> str:
    return BY_NUMBERS if isinstance(value, (Mapping, BaseModel)) else BY_NAME


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(_name)]
Share = Annotated[float, _one("share", 1.0)]
Rate = Annotated[float, _one("bytes/s")]


class Strict(BaseModel):
    """Unknown keys are errors; a plan never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class ModelSpec(Strict):
    """Dimensions of a model that is in no catalogue."""

    name: Text = "model of the plan"
    layers: Whole
    hidden: Whole
    heads: Whole
    head_dim: Whole | None = None
    kv_heads: Whole | None = None
    ffn_width: Whole | None = None
    experts: Whole | None = None
    top_k: Whole | None = None
    expert_width: Whole | None = None
    gated: Annotated[bool | None, Field(strict=True)] = None
    vocab: Whole | None = None
    tied: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _whole_model(self) -> ModelSpec:
        if self.experts is None and self.ffn_width is None:
            raise ValueError("has no feed-forward layer; give ffn_width, or experts, top_k and expert_width")
        if self.experts is not None and (self.top_k is None or self.expert_width is None):
            raise ValueError("experts need top_k and expert_width")
        if self.experts is not None and self.top_k is not None and self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}")
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"heads {self.heads} do not divide hidden {self.hidden}; give head_dim")
        return self


class GpuSpec(Strict):
    """A GPU by its numbers."""

    name: Text = "GPU of the plan"
    flops: Annotated[float, _one("FLOP/s")]
    flops_fp8: Annotated[float, _one("FLOP/s")] | None = None
    flops_fp4: Annotated[float, _one("FLOP/s")] | None = None
    memory: Annotated[float, _one("bytes")]
    bandwidth: Rate


class NetworkSpec(Strict):
    gpus_per_node: Whole | None = None
    link: Rate | None = None
    between_nodes: Rate | None = None


class DegreesSpec(Strict):
    tp: Whole | None = None
    pp: Whole | None = None
    dp: Whole | None = None
    ep: Whole | None = None
    moe_tp: Whole | None = None
    attention_dp: Whole | None = None
    cp: Whole | None = None
    tp_internal: Annotated[bool, Field(strict=True)] = False
    gpus: Whole | None = None

    @model_validator(mode="before")
    @classmethod
    def _written(cls, data: Any) -> Any:
        if not isinstance(data, str):
            return data
        degrees, gpus = degrees_of(data)
        found = {k: x for k, x in vars(degrees).items() if x is not None}
        if len(found) == 1:  # tp_internal alone
            raise ValueError(f"{v.shown(data)} names no degree; write e.g. `TP=8, PP=1` or {{tp: 8, pp: 1}}")
        return {**found, **({"gpus": gpus} if gpus else {})}


def _prompt(value: Any) -> tuple[float, float]:
    ends = value if isinstance(value, list) else [value]
    if not 1 <= len(ends) <= 2:
        raise ValueError(f"{v.shown(value)} is not a length or [shortest, longest]")
    numbers = [v.number(x, "tokens", 1.0) for x in ends]
    return min(numbers), max(numbers)


class WorkloadSpec(Strict):
    batch: Whole
    prompt: Annotated[tuple[float, float], BeforeValidator(_prompt)]
    output: Annotated[float, BeforeValidator(lambda x: v.number(x, "tokens"))] = 0.0


class TargetsSpec(Strict):
    ttft: Annotated[Quantity | None, _target("seconds")] = None
    tpot: Annotated[Quantity | None, _target("seconds")] = None
    throughput: Annotated[Quantity | None, _target("tokens/s")] = None
    prefill_throughput: Annotated[Quantity | None, _target("tokens/s")] = None
    decode_throughput: Annotated[Quantity | None, _target("tokens/s")] = None

    @model_validator(mode="after")
    def _one_throughput(self) -> TargetsSpec:
        given = [n for n in ("throughput", "prefill_throughput", "decode_throughput") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; keep one")
        return self


def _claims(value: Any) -> tuple[Claim, ...]:
    items = value if isinstance(value, list) else [value]
    found: list[Claim] = []
    for i, item in enumerate(items):
        try:
            found += _claim(item)
        except ValueError as error:
            raise ValueError(f"[{i}]: {error}") from None
    return tuple(found)


def _claim(item: Any) -> list[Claim]:
    """A text, `{claim: weights_gpu, value: 8 GB, at: 1024}`, or `weights_gpu: 8 GB`."""
    if isinstance(item, str):
        return claims_of(_name(item))
    if not isinstance(item, Mapping) or not item:
        raise ValueError(f"{v.shown(item)} is not a claim; write text, or {{claim: weights_gpu, value: 8 GB}}")
    if len(item) == 1 and "claim" not in item:
        kind, value = next(iter(item.items()))
        item = {"claim": kind, "value": value}
    for key in item:
        if key not in ("claim", "value", "at", "text"):
            raise ValueError(v.nearest(key, ("claim", "value", "at", "text"), "key of a claim"))
    kinds = [k for k in KINDS if k != "equation"]
    kind, value = item.get("claim"), item.get("value")
    if kind not in kinds:
        raise ValueError(v.nearest(kind, kinds, "claim"))
    if value is None:
        raise ValueError(f"{kind} has no value; write {{claim: {kind}, value: ...}}")
    if kind == "expert_communication" and str(value).strip().lower() in ("none", "no", "zero", "0", "false"):
        q = Quantity(0.0, 0.0, "bytes")
    else:
        q = quantity(value, KINDS[kind].dimension)
    length = v.number(item["at"], "tokens", 1.0) if "at" in item else None
    written = item.get("text") or f"{KINDS[kind].label} {value}" + (f" at {length:g} tokens" if length else "")
    return [Claim(kind=kind, text=_name(written), quantity=q, length=length)]


class PlanSpec(Strict):
    """A plan as its file says it."""

    name: Text = "plan"
    description: str = ""
    model: Annotated[Annotated[Text, Tag(BY_NAME)] | Annotated[ModelSpec, Tag(BY_NUMBERS)], Discriminator(_form)]
    gpu: Annotated[Annotated[Text, Tag(BY_NAME)] | Annotated[GpuSpec, Tag(BY_NUMBERS)], Discriminator(_form)]
    mfu: Share | None = None
    bandwidth_utilisation: Share | None = None
    network: NetworkSpec = NetworkSpec()
    precision: Annotated[str, BeforeValidator(_format)] = "native"
    kv: Annotated[str, BeforeValidator(_format)] = "auto"
    gpus: Whole | None = None
    most_gpus: Whole | None = None
    plan: DegreesSpec = DegreesSpec()
    workload: WorkloadSpec
    targets: TargetsSpec = TargetsSpec()
    claims: Annotated[tuple[Claim, ...], BeforeValidator(_claims)] = ()
    launch: str = ""


__all__ = ["BY_NAME", "BY_NUMBERS", "GpuSpec", "ModelSpec", "PlanSpec"]
