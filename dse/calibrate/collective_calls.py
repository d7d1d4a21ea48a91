"""Single collective calls: tables of them as arrays, and what the cost model says each takes.

A transfer is one NCCL or custom kernel on a buffer; an exchange is one MoE dispatch with its combine (DeepEP). Both are
priced by the lines that a plan is priced by: `group(topology, n, stride)` and the operation's algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from dse.batches import at_rows
from dse.catalog import hardware
from dse.catalog.precision import DISPATCH_QUANTISED
from dse.catalog.schema import GpuEntry
from dse.cost import collectives as coll
from dse.cost.coefficients import Coefficients
from dse.cost.types import Number, Routed, Topology, pytree
from dse.errors import InputError, UnknownName
from dse.numerics import pick

Array = np.ndarray
TRANSFERS = ("all_reduce", "engine_all_reduce", "all_gather", "all_to_all", "point_to_point")
NAMES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "all_gather",  # its mirror image
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "send_recv": "point_to_point",
}
BYTES = dict(half=2, float16=2, bfloat16=2, bf16=2, float=4, float32=4, int32=4, double=8, int8=1, uint8=1, fp8=1)
NODE = 8  # GPUs a node in the DeepEP tables


@pytree
class Transfer:
    """`n` ranks, `stride` GPUs apart, on a buffer of `size` bytes; `op` indexes TRANSFERS."""

    topology: Topology
    n: Number
    stride: Number
    size: Number
    op: Number


@pytree
class Exchange:
    """`tokens` a rank of `hidden` elements to `top_k` of `experts`: dispatch in fp8, combine in bf16."""

    topology: Topology
    n: Number
    tokens: Number
    hidden: Number
    top_k: Number
    experts: Number
    group_limit: Number  # nodes a token may go to; 0: any
    sms: Number  # that copy; 0: as the coefficients say
    low_latency: Number  # 1: the low-latency kernels


def transfer_seconds(c: Coefficients, x: Transfer) -> Number:
    g = coll.group(x.topology, x.n, x.stride)
    lines = (coll.nccl_all_reduce, coll.all_reduce, coll.all_gather, coll.all_to_all)
    times = [coll.seconds(of(x.topology, g, c), x.size) for of in lines]
    return pick(x.op, [*times, coll.point_to_point(x.topology, g, c)(x.size)])


def exchange_seconds(c: Coefficients, x: Exchange) -> tuple[Number, Number]:
    """(dispatch, combine)."""
    g = coll.group(x.topology, x.n, 1.0)
    c = replace(c, dispatch_sms=jnp.where(x.sms > 0, x.sms, c.dispatch_sms))
    routed = Routed(experts=x.experts, top_k=x.top_k, d_in=x.hidden, width=1.0, matrices=3.0, group_limit=x.group_limit)

    def time(of: Any, element: float) -> Number:
        *throughput, direct = of(x.topology, g, routed, 0.0, x.hidden * element, c).lines
        return jnp.where(x.low_latency > 0, direct(x.tokens), coll.seconds(tuple(throughput), x.tokens))

    return time(coll.dispatch, DISPATCH_QUANTISED), time(coll.combine, 2.0)


def log_seconds(c: Coefficients, x: Transfer | Exchange) -> Number:
    """(1,) or (2,): differentiable in the coefficients; the groups of the rows have at least two ranks."""
    if isinstance(x, Transfer):
        return jnp.log(transfer_seconds(c, x))[None]
    return jnp.log(jnp.stack(exchange_seconds(c, x)))


# --------------------------------------------------------------------------------------------- tables of calls


@dataclass(frozen=True)
class Calls:
    """Rows of a table as inputs of the model: `inputs` and `gpus` for the rows of `keep`, `reasons` ("" for those)."""

    inputs: Transfer | Exchange | None
    gpus: list[GpuEntry]
    keep: Array
    reasons: list[str]


class Table:
    """A table of calls being checked: the first thing wrong with each row."""

    def __init__(self, frame: pd.DataFrame, where: str) -> None:
        self.frame, self.where = frame, where
        self.reasons = [""] * len(frame)

    def need(self, *names: str) -> None:
        missing = [name for name in names if name not in self.frame]
        if missing:
            have = ", ".join(map(str, self.frame.columns))
            raise InputError(f"{self.where}: columns {', '.join(missing)} missing (it has: {have})")

    def refuse(self, bad: Any, why: Any) -> None:
        """`why(i)` for the rows of `bad` that had no reason yet."""
        for i in np.flatnonzero(np.asarray(bad, bool)):
            self.reasons[i] = self.reasons[i] or why(i)

    def number(self, name: str, low: float = 1.0, whole: bool = True, default: float | None = None) -> Array:
        """A column of numbers from `low` on; rows where it is not are refused and get `low`."""
        if name not in self.frame and default is not None:
            return np.full(len(self.frame), default)
        raw = self.frame[name]
        values = pd.to_numeric(raw, errors="coerce").to_numpy(float)
        if default is not None:
            values = np.where(raw.isna().to_numpy(), default, values)
        bad = ~(np.isfinite(values) & (values >= low))
        if whole:
            bad |= np.isfinite(values) & (values != np.floor(values))
        kind = "a whole number" if whole else "a number"
        self.refuse(bad, lambda i: f"{name} = {_shown(raw.iloc[i])} is not {kind} from {low:g} on")
        return np.where(bad, low, values)

    def word(self, name: str, known: Mapping[str, Any], default: str | None = None) -> list[Any]:
        """A column of names through `known`; rows of other names are refused."""
        if name not in self.frame and default is not None:
            return [known[default]] * len(self.frame)
        raw = self.frame[name]
        words = [str(value).strip().lower() for value in raw]
        self.refuse(
            [word not in known for word in words],
            lambda i: f"{name} = {_shown(raw.iloc[i])} (allowed: {', '.join(known)})",
        )
        return [known.get(word) for word in words]

    def machines(self) -> tuple[list[GpuEntry | None], list[Topology | None]]:
        """GPU and network of each row: the column `cluster` where there is one, else the GPU's usual cluster."""
        names = self.frame["gpu"].astype(str)
        clusters = self.frame["cluster"] if "cluster" in self.frame else pd.Series([None] * len(self.frame))
        found: dict[tuple[str, str], tuple[GpuEntry, Topology] | str] = {}
        keys = [(name, "" if pd.isna(c) else str(c)) for name, c in zip(names, clusters, strict=True)]
        for key in dict.fromkeys(keys):
            try:
                entry = hardware.gpu(key[0])
                network = hardware.to_topology(hardware.cluster(key[1] or entry.default_cluster))
                found[key] = (entry, network)
            except UnknownName as error:
                found[key] = str(error)
        self.refuse([isinstance(found[k], str) for k in keys], lambda i: str(found[keys[i]]))
        pairs = [(None, None) if isinstance(got := found[k], str) else got for k in keys]
        return [p[0] for p in pairs], [p[1] for p in pairs]

    def calls(self, of: type[Any], gpus: list[Any], topologies: list[Any], **columns: Array) -> Calls:
        """The rows without a reason, as inputs."""
        keep = np.flatnonzero([not r for r in self.reasons])
        if not len(keep):
            return Calls(None, [], keep, self.reasons)
        return Calls(
            inputs=of(topology=_gathered([topologies[i] for i in keep]), **{k: v[keep] for k, v in columns.items()}),
            gpus=[gpus[i] for i in keep],
            keep=keep,
            reasons=self.reasons,
        )


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def _gathered(topologies: list[Topology]) -> Topology:
    """Networks of any depth as one batch."""
    places = {id(t): t for t in topologies}
    row = {key: i for i, key in enumerate(places)}
    index = np.array([row[id(t)] for t in topologies])
    gathered: Topology = at_rows(hardware.stacked(list(places.values())), index)
    return gathered


def _node(topologies: list[Any]) -> Array:
    """GPUs below the outermost level."""
    return np.array([1.0 if t is None else np.prod([level.size for level in t.levels[:-1]]) for t in topologies])


def transfers(frame: pd.DataFrame, where: str, engine: bool = False) -> Calls:
    """Columns gpu, op_name, num_gpus, message_size (elements) and nccl_dtype, or allreduce_dtype where `engine`; or
    message_bytes. With devices_per_node, ranks are spread over nodes so. `engine`: all-reduce as engines choose it, its
    own kernels included."""
    table = Table(frame, where)
    in_bytes = "message_bytes" in frame
    dtype = "allreduce_dtype" if engine else "nccl_dtype"
    table.need("gpu", "num_gpus", *(("message_bytes",) if in_bytes else ("message_size", dtype)))
    if not engine:
        table.need("op_name")
    gpus, topologies = table.machines()
    n = table.number("num_gpus")
    if in_bytes:
        size = table.number("message_bytes", whole=False)
    else:
        each = np.array([value or 1 for value in table.word(dtype, BYTES)], float)
        size = table.number("message_size", whole=False) * each
    names = ["all_reduce"] * len(frame) if engine else table.word("op_name", NAMES)
    op = np.array([TRANSFERS.index(name) if name else 0 for name in names], float)
    node = _node(topologies)
    each_node = table.number("devices_per_node") if "devices_per_node" in frame else np.minimum(n, node)
    table.refuse(n > each_node * np.ceil(n / each_node), lambda i: f"{n[i]:g} ranks, {each_node[i]:g} a node")
    table.refuse(each_node > node, lambda i: f"{each_node[i]:g} ranks a node; a node has {node[i]:g} GPUs")
    spread = np.where(n > each_node, node / each_node, 1.0)
    return table.calls(Transfer, gpus, topologies, n=n, stride=spread, size=size, op=op + (1.0 if engine else 0.0))


def exchanges(frame: pd.DataFrame, where: str, low_latency: bool) -> Calls:
    """Columns gpu, node_num, hidden_size, num_token (a rank), num_topk, num_experts and, in throughput mode,
    dispatch_sms."""
    table = Table(frame, where)
    table.need("gpu", "hidden_size", "num_token", "num_topk", "num_experts")
    gpus, topologies = table.machines()
    experts, top_k = table.number("num_experts"), table.number("num_topk")
    table.refuse(top_k > experts, lambda i: f"num_topk = {top_k[i]:g} of {experts[i]:g} experts")
    nodes = table.number("node_num", default=1.0)
    sms = np.zeros(len(frame)) if low_latency else table.number("dispatch_sms", low=0.0, default=0.0)
    return table.calls(
        Exchange,
        gpus,
        topologies,
        n=nodes * NODE,
        tokens=table.number("num_token", low=0.0, whole=False),
        hidden=table.number("hidden_size"),
        top_k=top_k,
        experts=experts,
        group_limit=table.number("group_limit", low=0.0, default=0.0),
        sms=sms,
        low_latency=np.full(len(frame), float(low_latency)),
    )


__all__ = [
    "Calls",
    "Exchange",
    "Transfer",
    "exchange_seconds",
    "exchanges",
    "log_seconds",
    "transfer_seconds",
    "transfers",
]
