"""A pipeline of more than one model as a person writes it: stages in order, what a request brings, what is searched.

A space with the key `pipeline` is read by this schema. Every stage has a model (or numbers of its own), a plan, a pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from dse.catalog.model_schema import CoreSpec, FeedForwardSpec, GemmSpec, MixerSpec, ModelEntry
from dse.catalog.precision import KV_FORMATS, WEIGHTS
from dse.space import values as v
from dse.space.metrics import PIPELINE_METRICS
from dse.space.schema import (
    _FORMATS,
    Bound,
    ClusterChoice,
    Name,
    OptionalName,
    Strict,
    Switch,
    _amount,
    _constraints,
    _names,
    _numbers,
    _objectives,
    _some,
    _whole,
)

KINDS = ("gateway", "tool", "retrieval", "encoder", "rerank", "prefill", "decode", "llm")
DELAYS, BATCHED, CONTINUOUS = ("gateway", "tool"), ("retrieval", "encoder", "rerank", "prefill"), ("decode", "llm")
LARGE_MODELS = ("prefill", "decode", "llm")
MICROBATCHING = ("fifo", "balanced")
OF_POOL = ("tp", "pp", "attention_dp", "cp", "spread", "replicas", "clusters")  # the owner's, of all stages of a pool

Positive = Annotated[float, _amount("", open_low=True)]
Many = Annotated[tuple[int, ...], _numbers()]


class EncoderNumbers(Strict):
    """An encoder by numbers: `matrices` of a feed-forward layer (3: gated), `projector` parameters behind the layers.

    The projector meets one token in `merge` of the stage.
    """

    layers: Annotated[int, _whole("")]
    hidden: Annotated[int, _whole("")]
    heads: Annotated[int, _whole("")]
    ffn: Annotated[int, _whole("")]
    head_dim: Annotated[int | None, _whole("")] = None
    matrices: Literal[2, 3] = 2
    projector: Annotated[float, _amount("")] = 0.0

    def entry(self, name: str, merge: float) -> ModelEntry:
        """As the catalogue would have it: no cache, no vocabulary; the projector is a layer of its width a token."""
        dim = self.head_dim or self.hidden // self.heads
        inner = self.heads * dim
        gemms = (GemmSpec(k=self.hidden, n=3 * inner, split="n"), GemmSpec(k=inner, n=self.hidden, split="k"))
        core = CoreSpec(
            heads=self.heads,
            kv_heads=self.heads,
            score_dim=dim,
            value_dim=dim,
            score_dim_decode=dim,
            value_dim_decode=dim,
            kv_elements=0,
        )
        ffns = [FeedForwardSpec(kind="dense", count=self.layers, width=self.ffn, matrices=self.matrices)]
        width = round(self.projector / merge / (2 * self.hidden))
        if width:
            ffns.append(FeedForwardSpec(kind="projector", count=1, width=width, matrices=2))
        return ModelEntry(
            name=name,
            layers=self.layers,
            max_context=10**9,
            hidden=self.hidden,
            vocab=1,
            embeddings=1,
            mixers=(MixerSpec(kind="full attention", count=self.layers, gemms=gemms, core=core),),
            ffns=tuple(ffns),
            other_params=max(round(self.projector) - 2 * self.hidden * width, 0),
        )


class Tokens(Strict):
    """Tokens that a stage takes of a request: `items` (images, clips, passages) of `each` tokens.

    A `share` of the requests has any; among them the tokens are lognormal with the coefficient of variation `cv`.
    """

    each: Positive
    items: Positive = 1.0
    share: Annotated[float, _amount("fraction", 0.0, 1.0)] = 1.0
    cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0

    @property
    def mean(self) -> float:
        """Of requests that have any."""
        return self.each * self.items


class Host(Strict):
    """A CPU host that holds a part of an index: memory bandwidth, capacity, price."""

    memory_gb_s: Positive
    capacity_gib: Positive
    usd_per_hour: Annotated[float, _amount("USD")]


def _tokens(value: Any) -> Any:
    return {"each": value} if isinstance(value, int | float | str) and not isinstance(value, bool) else value


class StageSpec(Strict):
    """One stage. `tp`: GPUs (or hosts of an index) side by side; `batch`: calls at once on a replica, at most.

    `attention_dp`, `ep`, `cp`: of language models, as in other spaces (GPUs of a replica: tp * attention_dp * cp * pp).
    `spread`: copies of an encoder or reranker that one call's items are dealt over (images over workers).
    `pool`: the name of the stage whose GPUs it shares (with their degrees, replicas); an encoder or reranker with a
    smaller `tp` of its own has copies on them. `merge`: encoder tokens a prompt
    token; `adds`: prompt tokens that a stage adds to a request (the passages kept). `every_turn`: once a turn of a
    loop, not once a request. `transfer_bytes`: a token of its output to the next stage (auto: activations of encoders,
    the KV cache of prefill). `osl` makes an `llm` a writer (a query rewriter, a planner): what comes after it waits for
    its whole answer of so many tokens; `tokens` are its prompts (left out: the request's). `microbatching`: how calls,
    which go whole, fill a pipeline of stages (pp): as they came, or `balanced` to equal work.
    """

    name: Name
    kind: Annotated[str, BeforeValidator(lambda x: v.choices(x, KINDS, {}, "kind of stage")[0])]
    model: OptionalName = None
    encoder: EncoderNumbers | None = None
    clusters: Annotated[tuple[ClusterChoice, ...] | None, BeforeValidator(lambda x: _some(x, "cluster"))] = None
    host: Host | None = None
    pool: OptionalName = None
    tp: Many = (1,)
    pp: Many = (1,)
    attention_dp: Many = (1,)
    ep: Many = (1,)
    cp: Many = (1,)
    spread: Many = (1,)
    replicas: Many = (1,)
    batch: Many = (1,)
    microbatching: Annotated[tuple[str, ...], _names(MICROBATCHING, "way to fill micro-batches")] = ("fifo",)
    chunk: Annotated[int, _whole("tokens")] = 8192
    weights: Annotated[tuple[str, ...], _names(WEIGHTS, "precision", _FORMATS)] = ("native",)
    kv: Annotated[tuple[str, ...], _names(KV_FORMATS, "precision", _FORMATS)] = ("auto",)
    tokens: Annotated[Tokens | None, BeforeValidator(_tokens)] = None
    merge: Positive = 1.0
    adds: Annotated[float, _amount("tokens")] = 0.0
    every_turn: Switch = False
    transfer_bytes: Annotated[float | None, _amount("")] = None
    osl: Annotated[float | None, _amount("tokens", 1.0)] = None
    osl_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    time_ms: Annotated[float, _amount("ms")] = 0.0
    vectors: Annotated[float | None, _amount("", high=1e15, open_low=True)] = None
    vector_bytes: Annotated[float | None, _amount("", open_low=True)] = None
    scan: Annotated[float, _amount("fraction", 0.0, 1.0, open_low=True)] = 1.0

    @property
    def index_bytes(self) -> float:
        """Of a retrieval stage's whole index."""
        return float(self.vectors or 0.0) * float(self.vector_bytes or 0.0)

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if "moe_ep" in data and "ep" in data:
            raise ValueError("'moe_ep' and 'ep' are the same axis; keep one")
        return v.lengths({"ep" if key == "moe_ep" else key: value for key, value in data.items()}, ("osl",))

    @property
    def writes(self) -> bool:
        """Whether it is a language model whose answer is not the user's."""
        return self.kind == "llm" and self.osl is not None

    @model_validator(mode="after")
    def _belongs(self) -> StageSpec:
        """What a kind needs, and what says nothing of it."""
        large = ("attention_dp", "ep", "cp")
        strange: tuple[str, ...] = () if self.kind == "llm" else ("osl", "osl_cv")
        strange += ("microbatching",) if self.kind in CONTINUOUS else ()
        retrieval = ("vectors", "vector_bytes", "scan", "host")
        sequences = ("tokens", "encoder", "merge")
        if self.kind in DELAYS:
            known = {"name", "kind", "time_ms", "every_turn"}
            strange = tuple(f for f in type(self).model_fields if f not in known)
        elif self.kind == "retrieval":
            strange += (*sequences, *large, "spread", "model", "pp", "weights", "kv", "chunk", "pool", "microbatching")
        elif self.kind in ("encoder", "rerank"):
            strange += (*retrieval, *large, "time_ms", "chunk")
        elif self.writes:
            strange += (*retrieval, "encoder", "merge", "spread", "time_ms")
        else:
            strange += (*retrieval, *sequences, "spread", "time_ms", "adds", "every_turn")
        if self.pool is not None:
            strange += OF_POOL if self.kind in LARGE_MODELS else OF_POOL[1:]
        if self.pool is not None and self.kind in CONTINUOUS:
            strange += ("pool",)
        for field in strange:
            if field in self.model_fields_set:
                how = f"of a stage that shares pool {self.pool!r}" if field in OF_POOL else ""
                raise ValueError(f".{field}: says nothing {how or f'of a stage of kind {self.kind!r}'}; leave it out")
        needed: tuple[tuple[bool, str], ...] = (
            (self.kind == "retrieval" and (self.vectors is None or self.vector_bytes is None), "vectors, vector_bytes"),
            (self.kind in LARGE_MODELS and self.model is None, "model"),
            (self.kind in ("encoder", "rerank") and self.tokens is None, "tokens"),
            (self.kind in ("encoder", "rerank") and (self.model is None) == (self.encoder is None), "model or encoder"),
        )
        for missing, what in needed:
            if missing:
                raise ValueError(
                    f"a stage of kind {self.kind!r} needs {what}{' (one of them)' if ' or ' in what else ''}"
                )
        return self


class Request(Strict):
    """What a request brings beside the stages' own tokens, and how long the answer of one turn is."""

    isl: Annotated[float, _amount("tokens", 1.0)]
    osl: Annotated[float, _amount("tokens", 1.0)]
    isl_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    osl_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    prefix_hit: Annotated[float, _amount("fraction", 0.0, 1.0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _lengths(cls, data: Any) -> Any:
        return v.lengths(data) if isinstance(data, Mapping) else data


class Loop(Strict):
    """An agent: `turns` calls of the language model with a tool between two.

    Each turn's context is the one before, its answer and `growth` tokens of the tool's (a number, or {mean, cv}); a
    share `hit` of what was there before the tool's is still in the prefix cache.
    """

    turns: Annotated[int, _whole("")] = 1
    tool_latency_ms: Annotated[float, _amount("ms")] = 0.0
    growth: Annotated[float, _amount("tokens")] = 0.0
    growth_cv: Annotated[float, _amount("", 0.0, 3.0)] = 0.0
    hit: Annotated[float, _amount("fraction", 0.0, 1.0)] = 0.0

    @model_validator(mode="before")
    @classmethod
    def _lengths(cls, data: Any) -> Any:
        return v.lengths(data, ("growth",)) if isinstance(data, Mapping) else data


Limits = Annotated[dict[str, Bound], BeforeValidator(lambda x: _constraints(x, PIPELINE_METRICS))]


class PipelineSpec(Strict):
    """A validated pipeline and what is searched of it: every stage's plans, at every rate (requests/s)."""

    name: Name = "pipeline"
    description: str = ""
    pipeline: Annotated[tuple[StageSpec, ...], BeforeValidator(lambda x: _some(x, "stage")), Field(min_length=1)]
    request: Request
    loop: Loop = Loop()
    clusters: Annotated[tuple[ClusterChoice, ...] | None, BeforeValidator(lambda x: _some(x, "cluster"))] = None
    gpus: Annotated[int, _whole("GPUs")]
    rates: Annotated[
        tuple[float, ...],
        BeforeValidator(lambda x: v.numbers(x, lambda one: v.number(one, "requests/s", open_low=True))),
    ]
    transfers: Annotated[
        str, BeforeValidator(lambda x: v.choices(x, ("charged", "free"), {}, "way of transfers")[0])
    ] = "charged"
    constraints: Limits = Field(default_factory=dict)
    objectives: Annotated[
        tuple[tuple[str, Literal["min", "max"]], ...], BeforeValidator(lambda x: _objectives(x, PIPELINE_METRICS))
    ] = (("requests_s_gpu", "max"), ("ttft_ms", "min"))
    _where: str = PrivateAttr(default="")

    @property
    def where(self) -> str:
        return self._where

    @property
    def pools(self) -> tuple[tuple[StageSpec, ...], ...]:
        """Stages by pool, in the order of the stages that own one; delays are in none."""
        owners = [s for s in self.pipeline if s.pool is None and s.kind not in DELAYS]
        return tuple((o, *(s for s in self.pipeline if s.pool == o.name)) for o in owners)

    @model_validator(mode="after")
    def _consistent(self) -> PipelineSpec:
        by_name = {s.name: s for s in self.pipeline}
        if len(by_name) < len(self.pipeline):
            raise ValueError(".pipeline: two stages have one name; give each its own")
        large = [s for s in self.pipeline if s.kind in LARGE_MODELS]
        kinds = [s.kind for s in large if not s.writes]
        if kinds not in (["llm"], ["prefill", "decode"], ["prefill"], []):
            raise ValueError(
                f".pipeline: language model stages are {kinds} (allowed: one llm, or a prefill and then a decode stage;"
                " before them any llm with an osl of its own)"
            )
        late = next((s.name for i, s in enumerate(large) if s.writes and not all(x.writes for x in large[:i])), None)
        if late is not None:
            raise ValueError(f".pipeline: stage {late!r}: .osl: it writes behind the user's answer; move it before")
        if not any(s.model or s.encoder for s in self.pipeline):
            raise ValueError(".pipeline: no stage has a model; add an encoder, a rerank or a language model stage")
        for s in self.pipeline:
            if s.pool is None:
                if s.kind not in DELAYS and s.host is None and s.clusters is None and self.clusters is None:
                    raise ValueError(f".pipeline: stage {s.name!r} has no machines; write clusters, there or for all")
                continue
            owner = by_name.get(s.pool)
            known = [x.name for x in self.pipeline if x.kind in ("encoder", "rerank", "prefill", "llm") and x is not s]
            if owner is None or owner.name not in known or owner.pool is not None:
                raise ValueError(
                    f".pipeline: stage {s.name!r}: .pool: {v.nearest(s.pool, known, 'stage to share with')}"
                )
        return self


__all__ = [
    "BATCHED",
    "CONTINUOUS",
    "DELAYS",
    "EncoderNumbers",
    "Host",
    "Loop",
    "PipelineSpec",
    "Request",
    "StageSpec",
    "Tokens",
]
