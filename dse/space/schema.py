"""What a search space says: the YAML a person writes, validated once, all errors in one message.

`SpaceSpec` holds clean values only: every axis is a tuple (or "auto": all that can be legal), every bound is in the
unit that its metric's name carries. Names of models and GPUs are looked up when the space is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from dse.catalog.precision import ACTIVATIONS, KV_FORMATS, WEIGHTS
from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS, TRANSFERS
from dse.space import values as v
from dse.space.metrics import METRICS, Metric

_FORMATS = {"fp16": "bf16", "bfloat16": "bf16", "float16": "bf16", "nvfp4": "fp4", "mxfp8": "fp8"}


def _numbers(unit: str = "", low: int = 1, auto: bool = False) -> BeforeValidator:
    def read(value: Any) -> Any:
        if auto and value == v.AUTO:
            return value
        try:
            return v.numbers(value, partial(v.integer, unit=unit, low=low))
        except ValueError as error:
            raise ValueError(f"{error}{', or auto' if auto and isinstance(value, str) else ''}") from None

    return BeforeValidator(read)


def _names(known: tuple[str, ...], kind: str, aliases: Mapping[str, str] | None = None) -> BeforeValidator:
    return BeforeValidator(lambda value: v.choices(value, known, aliases or {}, kind))


def _amount(unit: str, low: float = 0.0, high: float = v.LARGEST, open_low: bool = False) -> BeforeValidator:
    return BeforeValidator(lambda value: v.number(value, unit, low, high, open_low))


def _whole(unit: str, low: int = 1) -> BeforeValidator:
    return BeforeValidator(lambda value: v.integer(value, unit, low))


def _fractions(value: Any) -> Any:
    return v.numbers(value, partial(v.number, unit="fraction", low=0.0, high=1.0))


def _or_auto(low: int) -> Callable[[Any], Any]:
    """Whole numbers from `low` on, `auto` among them as 0."""

    def integer(item: Any) -> int:
        return 0 if item == v.AUTO else v.integer(item, low=low)

    def read(value: Any) -> Any:
        return v.numbers(value if isinstance(value, Mapping | list) else [value], integer)

    return read


def _text(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{v.shown(value)} is not a name; give text")
    return value


def _texts(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError("an empty list leaves nothing to search; name at least one")
    return v.distinct(tuple(_text(item) for item in items))


Degrees = Annotated[tuple[int, ...] | Literal["auto"], _numbers(auto=True)]
Whole = Annotated[tuple[int, ...] | None, _numbers()]
Tokens = Annotated[tuple[int, ...], _numbers("tokens")]
Fractions = Annotated[tuple[float, ...] | None, BeforeValidator(_fractions)]
Rules = Annotated[tuple[str, ...] | None, _names(OVERLAPS, "overlap rule")]
Switch = Annotated[bool, Field(strict=True)]
Name = Annotated[str, BeforeValidator(_text)]
OptionalName = Annotated[str | None, BeforeValidator(_text)]


class Strict(BaseModel):
    """Unknown keys are errors; a spec never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Axes(Strict):
    """What is searched. A degree left out is `auto` for tp, ep, moe_tp and dp, and 1 for the others."""

    tp: Degrees = "auto"
    pp: Degrees = (1,)
    attention_dp: Degrees = (1,)
    cp: Degrees = (1,)
    moe_tp: Degrees = "auto"
    ep: Degrees = "auto"
    dp: Degrees = "auto"
    cp_method: Annotated[tuple[str, ...], _names(CP_METHODS, "cp_method")] = ("auto",)
    sequence_parallel: Annotated[tuple[bool, ...], BeforeValidator(v.switches)] = (False,)
    concurrency: Whole = None
    batch: Whole = None
    chunk: Tokens = (8192,)
    weights: Annotated[tuple[str, ...], _names(WEIGHTS, "precision", _FORMATS)] = ("native",)
    activations: Annotated[tuple[str, ...], _names(ACTIVATIONS, "precision", _FORMATS)] = ("auto",)
    kv: Annotated[tuple[str, ...], _names(KV_FORMATS, "precision", _FORMATS)] = ("auto",)
    overlap: Rules = None
    overlap_prefill: Rules = None
    overlap_decode: Rules = None
    dispatch: Annotated[tuple[str, ...], _names(DISPATCHES, "dispatch")] = ("auto",)
    eplb_replicas: Annotated[tuple[int, ...], _numbers(low=0)] = (0,)
    draft_tokens: Annotated[tuple[int, ...], _numbers("tokens", low=0)] = (0,)
    draft_model: Annotated[tuple[str, ...], BeforeValidator(_texts)] = ("none",)  # of its own; none: MTP modules
    draft_tp: Annotated[tuple[int, ...], BeforeValidator(_or_auto(1))] = (0,)  # 0 (auto): its target's where it divides
    acceptance: Fractions = None  # left out: options.acceptance
    prefix_hit: Fractions = None  # left out: each workload's
    microbatches: Annotated[tuple[int, ...], BeforeValidator(_or_auto(0))] = (0,)
    utilisation: Annotated[
        tuple[float, ...],
        BeforeValidator(lambda x: v.numbers(x, lambda one: v.number(one, "fraction", 0.0, 1.0, open_low=True))),
    ] = (0.9,)

    @model_validator(mode="before")
    @classmethod
    def _aliases(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        out = dict(data)
        for alias, name in ALIASES.items():
            if alias in out:
                if name in out:
                    raise ValueError(f"{alias!r} and {name!r} are the same axis; keep one")
                out[name] = out.pop(alias)
        for one, others in EXCLUSIVE:
            also = next((other for other in others if other in out), None)
            if one in out and also:
                raise ValueError(f"{one!r} and {also!r} exclude each other; keep one")
        return out


ALIASES = {
    "mtp": "draft_tokens",
    "speculation": "draft_tokens",
    "moe_ep": "ep",
    "replicas": "dp",
    "redundant_experts": "eplb_replicas",
    "memory_utilisation": "utilisation",
    "utilization": "utilisation",
}
EXCLUSIVE = (("concurrency", ("batch",)), ("overlap", ("overlap_prefill", "overlap_decode")))


class Arrivals(Strict):
    """Requests to the whole deployment: `rate` a second (left out: as many as meet the `slo`), and how bursty.

    `cv`: coefficient of variation of the gaps (1: Poisson), or `trace`, that of the workload's trace.
    """

    rate: Annotated[float | None, _amount("requests/s", open_low=True)] = None
    cv: Annotated[float | Literal["trace"], BeforeValidator(lambda x: x if x == "trace" else _burst(x))] = 1.0


def _burst(value: Any) -> float:
    return v.number(value, "", 0.3, 5.0)


class Slo(Strict):
    """What a request's TTFT and TPOT must both meet, and the share of requests that must."""

    ttft_ms: Annotated[float, _amount("ms", open_low=True)]
    tpot_ms: Annotated[float, _amount("ms", open_low=True)]
    attainment: Annotated[float, BeforeValidator(lambda x: v.number(x, "fraction", 0.01, 0.999))] = 0.9


class Workload(Strict):
    """Requests of `isl` prompt and `osl` output tokens; `weight` is this kind's share of a mix (any scale).

    Under open load (`slo`, `arrivals`) lengths may vary: `isl: {mean, cv}`, lognormal, with the `correlation` of their
    logarithms, or those of a `trace`, a CSV file. What is not asked of an open loop is priced at the means.
    """

    isl: Annotated[int, _whole("tokens")]
    osl: Annotated[int, _whole("tokens")]
    prefix_hit: Annotated[float, _amount("fraction", 0.0, 1.0)] = 0.0
    weight: Annotated[float, _amount("fraction", open_low=True)] = 1.0
    isl_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    osl_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    correlation: Annotated[float, BeforeValidator(lambda x: v.number(x, "", -1.0, 1.0))] = 0.0
    trace: OptionalName = None
    arrivals: Arrivals | None = None
    slo: Slo | None = None

    @model_validator(mode="before")
    @classmethod
    def _lengths(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        out = v.lengths(data)
        if isinstance(out.get("trace"), str):
            for name in ("isl", "osl", "isl_cv", "osl_cv", "correlation", "prefix_hit"):
                if name in out:
                    raise ValueError(f".{name}: is the trace's; leave it out beside 'trace'")
            out |= v.trace_means(out["trace"])
        return out


class ClusterChoice(Strict):
    """A machine: a cluster, a GPU, or both; the one left out is the other's usual companion."""

    cluster: OptionalName = None
    gpu: OptionalName = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"cluster": data}
        if isinstance(data, Mapping) and not data:
            raise ValueError("names neither a cluster nor a gpu; write h100-dgx or {cluster: h100-dgx, gpu: h100}")
        return data


class PoolAxes(Axes):
    """One pool of a disaggregated deployment: the plans of a worker of `gpus` GPUs, on machines of its own if given.

    `workers`: how many there may be (left out: any). Prefill has `chunk` for its load, decode `concurrency`, the
    requests running on one worker.
    """

    gpus: Annotated[tuple[int, ...], _numbers("GPUs")]
    clusters: Annotated[tuple[ClusterChoice, ...] | None, BeforeValidator(lambda x: _some(x, "cluster"))] = None
    workers: Whole = None
    dp: Degrees = (1,)


class DecodeAxes(PoolAxes):
    """The decode pool. `ffn_gpus`: the experts' own GPUs of a worker, beside `gpus` of attention; 0: none of their own.

    `micro_batches` play ping-pong between the two.
    """

    ffn_gpus: Annotated[tuple[int, ...], _numbers("GPUs", low=0)] = (0,)
    micro_batches: Annotated[tuple[int, ...], _numbers()] = (2,)


class Disaggregated(Strict):
    """Prefill and decode on pools of their own, searched jointly; `aggregated: false` leaves out the comparison."""

    prefill: PoolAxes
    decode: DecodeAxes
    kv_transfer: Annotated[tuple[str, ...], _names(TRANSFERS, "KV transfer")] = TRANSFERS[:1]
    aggregated: Switch = True

    @model_validator(mode="after")
    def _loads(self) -> Disaggregated:
        for pool, axes, names in (
            ("prefill", self.prefill, ("concurrency", "batch", "draft_tokens", "draft_model", "acceptance")),
            ("decode", self.decode, ("chunk", "batch", "prefix_hit")),
        ):
            for name in names:
                if name in axes.model_fields_set:
                    owners = dict.fromkeys(("chunk", "prefix_hit"), "the prefill pool's")
                    owners["batch"] = "of undivided serving"
                    other = owners.get(name, "the decode pool's")
                    raise ValueError(f".{pool}.{name}: is {other}; leave it out here")
        if max(self.decode.ffn_gpus) and set(self.decode.draft_model) != {"none"}:
            raise ValueError(f".decode.draft_model: {self.decode.draft_model[0]} beside ffn_gpus (allowed: none)")
        return self


class Bound(Strict):
    """A constraint on one metric, in the unit of its name."""

    min: float | None = None
    max: float | None = None


def _bound(metric: Metric, value: Any) -> dict[str, float]:
    unit, better = metric
    usual = "max" if better == "min" else "min"
    if not isinstance(value, Mapping):
        raise ValueError(f"{v.shown(value)} does not say which side is allowed; write {{{usual}: {value}}}")
    if not value:
        raise ValueError(f"no bound given; write {{{usual}: ...}}")
    for key in value:
        if key not in ("min", "max"):
            raise ValueError(v.nearest(key, ("min", "max"), "key of a bound"))
    bounds = {key: v.number(one, unit) for key, one in value.items()}
    if bounds.get("min", 0.0) > bounds.get("max", v.LARGEST):
        raise ValueError(f"min {bounds['min']:g} is more than max {bounds['max']:g}, which nothing meets; swap them")
    return bounds


class Options(Strict):
    """Switches that widen what is legal, and the two load parameters that are not axes."""

    uneven_pp: Switch = False
    external_draft: Switch = False
    extended_context: Switch = False
    acceptance: Annotated[float, _amount("fraction", 0.0, 1.0)] = 0.7
    waves: Annotated[float, _amount("", 1.0)] = 10.0


class Hardware(Strict):
    """GPUs and clusters of the space's own, by name, as the catalogue's files write them; sources may be left out."""

    gpus: dict[str, Any] = {}
    clusters: dict[str, Any] = {}


def _objectives(value: Any, metrics: Mapping[str, Metric] = METRICS) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{v.shown(value)} is not names with directions; write {{output_tok_s_gpu: max, tpot_ms: min}}"
        )
    if not 1 <= len(value) <= 4:
        raise ValueError(f"{len(value)} objectives (allowed: 1 to 4); a front of more has no reader")
    result = []
    for name, direction in value.items():
        if name not in metrics:
            raise ValueError(v.nearest(name, list(metrics), "metric"))
        short = str(direction).lower()[:3] if isinstance(direction, str) else ""
        if short not in ("min", "max"):
            raise ValueError(f".{name}: {v.shown(direction)} is not a direction (allowed: min, max)")
        if short != metrics[name].better:
            raise ValueError(f".{name}: {direction} would look for the worst plans (allowed: {metrics[name].better})")
        result.append((name, short))
    return tuple(result)


Objectives = Annotated[tuple[tuple[str, Literal["min", "max"]], ...], BeforeValidator(_objectives)]


def _constraints(value: Any, metrics: Mapping[str, Metric] = METRICS) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{v.shown(value)} is not metrics with bounds; write {{ttft_ms: {{max: 1000}}}}")
    result = {}
    for name, bound in value.items():
        if name not in metrics:
            raise ValueError(v.nearest(name, list(metrics), "metric"))
        try:
            result[name] = _bound(metrics[name], bound)
        except ValueError as error:
            raise ValueError(f".{name}: {error}") from None
    return result


class SpaceSpec(Strict):
    """A validated search space."""

    name: Name = "space"
    description: str = ""
    models: Annotated[tuple[str, ...], BeforeValidator(_texts)]
    clusters: Annotated[tuple[ClusterChoice, ...], BeforeValidator(lambda x: _some(x, "cluster"))]
    gpus: Annotated[tuple[int, ...], _numbers("GPUs")]
    workloads: Annotated[tuple[Workload, ...], BeforeValidator(lambda x: _some(x, "workload"))]
    axes: Axes = Axes()
    constraints: Annotated[dict[str, Bound], BeforeValidator(_constraints)] = {}
    objectives: Objectives = (("output_tok_s_gpu", "max"), ("tpot_ms", "min"))
    options: Options = Options()
    hardware: Hardware = Hardware()
    disaggregated: Disaggregated | None = None
    _where: str = PrivateAttr(default="")

    @property
    def where(self) -> str:
        """The file the space is from, for messages."""
        return self._where


def _some(value: Any, kind: str) -> Any:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ValueError(f"an empty list leaves nothing to search; name at least one {kind}")
    return items
