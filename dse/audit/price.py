"""Bytes, FLOPs and seconds of a plan, by the project's own cost functions on the hardware that the plan states.

Counts come from the model itself, priced on a device of one FLOP/s with endless bandwidth (FLOPs) and on links of one
byte a second (bytes sent). Times are the bare roofline at the plan's MFU and bandwidth utilisation; a decode step reads
the weights and the cache once. Ignored: latencies, kernels, activations' traffic: a floor, as such plans reckon.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp

from dse.audit.layouts import layouts
from dse.audit.types import Layout, Span, Variant, WrittenPlan
from dse.cost.coefficients import Coefficients
from dse.cost.memory import kv_bytes, memory, weights
from dse.cost.operators import experts_touched
from dse.cost.shard import shard
from dse.cost.step import Batch, Segment, Step, step
from dse.cost.types import Architecture, Device, FeedForward, Level, Load, Plan, Topology, replace

_ENDLESS = 1e40
_LINK = 1e12  # bytes/s of the counting network: large, so that a collective's fixed terms do not matter
_FLAT = 1.0  # index of DISPATCHES: k copies of a token travel
_NONE = 0.0  # overlap rule


@dataclass(frozen=True)
class Work:
    """What one GPU does in a step: FLOPs (`attention` of them between queries and keys), bytes read and sent."""

    flops: float
    attention: float
    weights: float
    kv: float
    exchange: float
    reduce: float
    stages: float  # times that a token waits for a GPU's share of the work


@dataclass(frozen=True)
class Use:
    """Bytes on the fullest GPU."""

    weights: float
    kv: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.kv + self.activations + self.buffers


@dataclass(frozen=True)
class Desk:
    """A plan with its readings, ready to be priced."""

    plan: WrittenPlan

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        return layouts(self.plan)

    @property
    def layout(self) -> Layout:
        return self.layouts[0]

    @property
    def mfu(self) -> float:
        return 1.0 if self.plan.mfu is None else self.plan.mfu

    @property
    def utilisation(self) -> float:
        return 1.0 if self.plan.utilisation is None else self.plan.utilisation

    @cached_property
    def lengths(self) -> tuple[float, ...]:
        """The lengths at which things are worked out: the shortest, those that claims name, the longest."""
        w = self.plan.workload
        named = [c.length for c in self.plan.claims if c.length is not None]
        return tuple(sorted({w.prompt[0], *named, w.longest}))

    # -------------------------------------------------------------------------------------------- memory

    def use(self, v: Variant, length: float, x: Layout | None = None) -> Use:
        """The whole batch in flight, each of `length` tokens; prompts of a rank go through one step."""
        x = x or self.layout
        w = self.plan.workload
        output = min(w.output, length - 1.0)
        load = Load(isl=length - output, osl=output, concurrency=w.batch / x.replicas, chunk=1e15)
        with jax.enable_x64(True):
            m = memory(v.architecture, self.plan.device, self._cut(x), load, Coefficients.ideal())
        return Use(float(m.weights), float(m.kv), float(m.activations), float(m.buffers))

    def weights_total(self, v: Variant) -> float:
        """Bytes of one copy of the weights."""
        with jax.enable_x64(True):
            return float(weights(v.architecture, self._cut(ONE), 0.0))

    def kv_sequence(self, v: Variant, length: float) -> float:
        """Bytes of one sequence's cache, one copy."""
        return self.kv_of(v, length, ONE)

    def kv_of(self, v: Variant, length: float, x: Layout) -> float:
        """Bytes of one sequence's cache on one GPU of a layout."""
        with jax.enable_x64(True):
            return float(kv_bytes(v.architecture, self._cut(x), length))

    # ---------------------------------------------------------------------------------------------- work

    def prefill(self, v: Variant, length: float, x: Layout | None = None, batch: float | None = None) -> Work:
        """All prompts of the batch, once through the model."""
        x = x or self.layout
        requests = self._requests(x, batch)
        part = Segment(requests=requests, tokens=length, start=0.0, span=length)
        work = self._work(v, x, Batch(prefill=part, decode=None), requests * length, length, reads_cache=False)
        return replace(work, stages=1.0 + (x.pp - 1.0) / requests)  # prompts follow each other through the pipeline

    def decode(self, v: Variant, length: float, x: Layout | None = None, batch: float | None = None) -> Work:
        """One token of every sequence, each with `length` tokens cached."""
        x = x or self.layout
        requests = self._requests(x, batch)
        part = Segment(requests=requests, tokens=1.0, start=length - 1.0, span=1.0)
        return self._work(v, x, Batch(prefill=None, decode=part), requests, length, reads_cache=True)

    def seconds(self, w: Work, full: bool = False, mfu: float | None = None, utilisation: float | None = None) -> float:
        """max(FLOPs / rate, bytes / bandwidth) a GPU; `full`: attention without the causal half left out."""
        mfu = self.mfu if mfu is None else mfu
        utilisation = self.utilisation if utilisation is None else utilisation
        device = self.plan.device
        core = w.attention * (2.0 if full else 1.0)
        compute = ((w.flops - w.attention) / self.plan.rate + core / device.peak_bf16) / mfu
        return w.stages * max(compute, (w.weights + w.kv) / (device.bandwidth * utilisation))

    def floor(self, w: Work) -> float:
        """Seconds at 100% of the peaks."""
        return self.seconds(w, mfu=1.0, utilisation=1.0)

    def link_seconds(self, w: Work, link: float) -> float:
        return w.stages * (w.exchange + w.reduce) / link

    def _requests(self, x: Layout, batch: float | None) -> float:
        total = self.plan.workload.batch if batch is None else batch
        return max(total / (x.attention_dp * x.replicas), 1.0)

    def _work(self, v: Variant, x: Layout, batch: Batch, tokens: float, length: float, reads_cache: bool) -> Work:
        with jax.enable_x64(True):
            counts = self._step(v, x, batch, 1.0, _LINK)
            flops = sum(float(getattr(counts, part)) for part in _COMPUTE)
            read = float(weights(_read(v.architecture, tokens * x.attention_dp, x), self._cut(x), 0.0))
            return Work(
                flops=flops,
                attention=float(counts.attention),
                weights=read,
                kv=self._cache_read(v, x, batch) if reads_cache else 0.0,
                exchange=float(counts.exchange) * _LINK,
                reduce=float(counts.reduce) * _LINK,
                stages=x.pp,
            )

    def _cache_read(self, v: Variant, x: Layout, batch: Batch) -> float:
        """Bytes of keys and values that the attention of one step reads (windows and top-k included)."""
        return float(self._step(v, x, batch, _ENDLESS, _ENDLESS, bandwidth=1.0).attention)

    def _step(self, v: Variant, x: Layout, batch: Batch, peak: float, link: float, bandwidth: float = _ENDLESS) -> Step:
        device = Device(
            peak_bf16=peak,
            peak_fp8=0.0,
            peak_fp4=0.0,
            peak_int8=0.0,
            bandwidth=bandwidth,
            capacity=1.0,
            power=0.0,
            price=0.0,
        )
        network = Topology(levels=(Level(size=max(x.gpus, 1.0), bandwidth=link, latency=0.0),))
        cut = self._cut(x)
        return step(shard(v.architecture, device, network, cut, Coefficients.ideal()), batch, jnp.asarray(_NONE))

    def _cut(self, x: Layout) -> Plan:
        return plan_of(x, self.plan)

    # --------------------------------------------------------------------------------------------- spans

    def parameters(self) -> Span:
        return span([float(v.parameters) for v in self.plan.variants])

    def prefill_seconds(self, length: float, x: Layout | None = None) -> Span:
        """From causal attention of the lightest reading of the model to full attention of the heaviest.

        Where the plan states its links, the far end adds the communication, with nothing of it hidden.
        """
        found = []
        for v in self.plan.variants:
            w = self.prefill(v, length, x)
            far = self.seconds(w, full=True)
            found += [self.seconds(w), far]
            if self.plan.network.link is not None:
                found.append(far + self.link_seconds(w, self.slowest_link(x)))
        return span(found)

    def decode_seconds(self, length: float, x: Layout | None = None) -> Span:
        found = []
        for v in self.plan.variants:
            w = self.decode(v, length, x)
            found.append(self.seconds(w))
            if self.plan.network.link is not None:
                found.append(found[-1] + self.link_seconds(w, self.slowest_link(x)))
        return span(found)

    def slowest_link(self, x: Layout | None = None) -> float:
        """Bytes/s of the slowest stated link that a stage crosses."""
        net = self.plan.network
        x = x or self.layout
        inside = net.node is None or x.stage <= net.node or net.between is None
        return float(net.link if inside and net.link is not None else net.between or 0.0)


_COMPUTE = ("projections", "attention", "dense", "experts", "head")
ONE = Layout("one copy", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def plan_of(x: Layout, plan: WrittenPlan) -> Plan:
    """A layout as the cost model's plan."""
    return Plan(
        tp=x.tp,
        pp=x.pp,
        attention_dp=x.attention_dp,
        cp=x.cp,
        moe_tp=x.moe_tp,
        moe_ep=x.moe_ep,
        replicas=x.replicas,
        precision=plan.precision,
        cp_method=0.0 if x.cp > 1 else None,
        dispatch=_FLAT,
    )


def _read(arch: Architecture, tokens: float, x: Layout) -> Architecture:
    """What a step reads of a model's weights: the experts that its tokens touch, the head but not the embeddings."""

    def touched(ffn: FeedForward) -> FeedForward:
        if ffn.routed is None:
            return ffn
        r = ffn.routed
        count = x.moe_ep * experts_touched(r.experts, r.top_k, tokens, x.moe_ep)
        return replace(ffn, routed=replace(r, experts=count))

    return replace(arch, ffns=tuple(touched(f) for f in arch.ffns), embeddings=1.0)


def span(values: list[float]) -> Span:
    return min(values), max(values)


__all__ = ["ONE", "Desk", "Use", "Work", "plan_of", "span"]
