"""GPUs and clusters by name: entries as the catalogue's files say them, and in SI as the cost model wants them.

A name matches whatever its case, spaces, underscores, hyphens and vendor prefix: `NVIDIA H100-SXM-80GB` is `h100`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dse.catalog.schema import ClusterEntry, ClusterFile, GpuEntry, GpuFile, NamedEntry, parse, read
from dse.errors import InputError, unknown
from dse.units import GB, GIB, GIGA, MIB, TERA, US

if TYPE_CHECKING:  # the listing of names needs no JAX
    from dse.cost.types import Device, Topology

Entry = TypeVar("Entry", bound=NamedEntry)
_VENDORS = frozenset({"nvidia", "amd", "google", "instinct"})


def gpu(name: str, own: Sequence[GpuEntry] = ()) -> GpuEntry:
    """The GPU of a name or alias; `own` entries (of `load_gpus`) go before the catalogue's."""
    return _find("gpu", name, _gpu_index(), own, "`dse gpus` lists them; a YAML file of your own can add one")


def cluster(name: str, own: Sequence[ClusterEntry] = ()) -> ClusterEntry:
    """The cluster of a name or alias; `own` entries (of `load_clusters`) go before the catalogue's."""
    return _find("cluster", name, _cluster_index(), own, "a YAML file of your own can add one")


def gpus() -> list[GpuEntry]:
    """Every GPU of the catalogue, in the file's order."""
    return list(dict.fromkeys(_gpu_index().values()))


def clusters() -> list[ClusterEntry]:
    """Every cluster of the catalogue, in the file's order."""
    return list(dict.fromkeys(_cluster_index().values()))


def load_gpus(path: str | Path) -> list[GpuEntry]:
    """A person's own GPUs, from a file like `gpus.yaml`; what is wrong with it is one `InputError`."""
    entries = list(read(Path(path), GpuFile).gpus.values())
    _index(entries, str(path))
    return entries


def load_clusters(path: str | Path) -> list[ClusterEntry]:
    """A person's own clusters, from a file like `clusters.yaml`; what is wrong with it is one `InputError`."""
    entries = list(read(Path(path), ClusterFile).clusters.values())
    _index(entries, str(path))
    return entries


# --------------------------------------------------------------------------------------------------- SI


def to_device(entry: GpuEntry) -> Device:
    """A GPU in SI: FLOP/s, bytes/s, bytes (those software sees), W, Hz; USD an hour."""
    from dse.cost.types import Device

    optional = {
        "sms": (entry.sms, 1.0),
        "clock": (entry.clock_ghz, GIGA),
        "l2": (entry.l2_mib, MIB),
    }
    return Device(
        peak_bf16=entry.peak_bf16_tflops.value * TERA,
        peak_fp8=entry.peak_fp8_tflops.value * TERA,
        peak_fp4=entry.peak_fp4_tflops.value * TERA,
        peak_int8=entry.peak_int8_tops.value * TERA,
        bandwidth=entry.hbm_gb_s.value * GB,
        capacity=entry.capacity_gib.value * GIB,
        power=entry.tdp_w.value,
        price=entry.price_usd_hour.value,
        **{name: number.value * unit for name, (number, unit) in optional.items() if number},
    )


def to_topology(entry: ClusterEntry) -> Topology:
    """A cluster in SI: bytes/s a GPU a direction, seconds a hop."""
    from dse.cost.types import Level, Topology

    return Topology(
        levels=tuple(
            Level(
                size=float(level.size.value),
                bandwidth=level.bandwidth_gb_s.value * GB,
                latency=level.latency_us.value * US,
                oversubscription=level.oversubscription.value,
                rails=1.0 if level.rails is None else float(level.rails.value),
            )
            for level in entry.levels
        ),
        multicast=float(entry.multicast.value),
    )


def pad_levels(topology: Topology, n: int) -> Topology:
    """The same network with n levels, so that topologies of different depth stack: outer levels of size 1 are free."""
    from dse.cost.types import Level, replace

    have = len(topology.levels)
    if have > n:
        raise InputError(f"a topology of {have} levels does not fit in {n}; pad to {have} levels or more")
    free = Level(size=1.0, bandwidth=topology.levels[-1].bandwidth, latency=0.0, oversubscription=1.0)
    return replace(topology, levels=topology.levels + (free,) * (n - have))


def stacked(topologies: Sequence[Topology]) -> Topology:
    """Networks of any depth as one batch: leaves (n,), as many levels as the deepest has."""
    from dse.cost.types import stack

    depth = max(len(t.levels) for t in topologies)
    return stack([pad_levels(t, depth) for t in topologies])


# ------------------------------------------------------------------------------------------------- names


def _key(name: str) -> str:
    """One key for every spelling of a name: `NVIDIA H100-SXM_80GB` -> h100sxm80gb."""
    words = [word for word in re.split(r"[\s_\-]+", name.lower()) if word]
    while len(words) > 1 and words[0] in _VENDORS:
        words = words[1:]
    return "".join(words)


def _index(entries: Iterable[Entry], where: str) -> dict[str, Entry]:
    """Key -> entry, over names and aliases; a key that would mean two entries is an error."""
    index: dict[str, Entry] = {}
    for entry in entries:
        for spelling in (entry.name, *entry.aliases):
            other = index.setdefault(_key(spelling), entry)
            if other is not entry:
                raise InputError(
                    f"{where}: {spelling!r} names both {other.name!r} and {entry.name!r}; rename one of them"
                )
    return index


def _find(kind: str, name: str, index: Mapping[str, Entry], own: Sequence[Entry], remedy: str) -> Entry:
    key = _key(str(name))
    index = {**index, **_index(own, f"own {kind} entries")}
    if key not in index:
        raise unknown(kind, name, {entry.name for entry in index.values()}, remedy=remedy)
    return index[key]


@cache
def _gpu_index() -> dict[str, GpuEntry]:
    text = files("dse.catalog").joinpath("gpus.yaml").read_text(encoding="utf-8")
    return _index(parse(text, GpuFile, "gpus.yaml").gpus.values(), "gpus.yaml")


@cache
def _cluster_index() -> dict[str, ClusterEntry]:
    text = files("dse.catalog").joinpath("clusters.yaml").read_text(encoding="utf-8")
    return _index(parse(text, ClusterFile, "clusters.yaml").clusters.values(), "clusters.yaml")
