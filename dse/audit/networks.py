"""ModelMeter's one bandwidth for a whole network against the network's levels, on one DeepSeek-R1 case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax

from dse.catalog import hardware
from dse.cost.coefficients import Coefficients
from dse.published import compare as published
from dse.published import modelmeter as mm

DEVICES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class NetworkCurve:
    """ModelMeter's DeepSeek-R1 prefill under one collapsed bandwidth and under the levels of a network; seconds."""

    strategy: str
    cluster: str
    devices: tuple[int, ...]
    collapsed: tuple[float, ...]
    hierarchical: tuple[float, ...]
    collapsed_exchange: tuple[float, ...]
    hierarchical_exchange: tuple[float, ...]
    bandwidth_gbs: tuple[float, ...]  # of the collapsed network, between two devices


def networks(
    strategy: str = "dp_ep", cluster: str = "h200-hgx", devices: Sequence[int] = DEVICES, seq_len: float = 4096.0
) -> NetworkCurve:
    """DeepSeek-R1, a prompt of `seq_len` a GPU, H200: the exchanges on one bandwidth and on the network's levels."""
    topology = hardware.to_topology(hardware.cluster(cluster))
    machine = mm.Machine(tensor=1979.0, cuda=67.0, io=4.8, p2p=1.0, bisection=1.0)
    read = {
        "collapsed": lambda b: b.collapsed.total,
        "hierarchical": lambda b: b.hierarchical.total,
        "collapsed_exchange": lambda b: b.collapsed.summed("com_cost"),
        "hierarchical_exchange": lambda b: b.hierarchical.summed("com_cost"),
        "bandwidth_gbs": lambda b: b.p2p_gbs,
    }
    columns: dict[str, list[float]] = {name: [] for name in read}
    with jax.enable_x64(True):
        for n in devices:
            case = mm.Case(seq_len=seq_len, batch=float(n), devices=float(n))
            both = published.networks(case, machine, topology, Coefficients(), strategy)
            for name, value in read.items():
                columns[name].append(float(value(both)))
    return NetworkCurve(
        strategy=strategy,
        cluster=cluster,
        devices=tuple(devices),
        **{name: tuple(values) for name, values in columns.items()},
    )


__all__ = ["DEVICES", "NetworkCurve", "networks"]
