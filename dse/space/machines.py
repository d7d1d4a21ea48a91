"""The machines of a space: a GPU and a cluster each, from the catalogue or from the space's own `hardware`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dse.catalog import hardware
from dse.catalog.schema import ClusterEntry, ClusterFile, GpuEntry, GpuFile, parse
from dse.errors import InputError, UnknownName, unknown
from dse.space.schema import ClusterChoice, SpaceSpec

_SOURCE = "given by the search space"


@dataclass(frozen=True)
class Machine:
    """One choice of hardware. `size`: GPUs that the cluster may hold."""

    gpu: GpuEntry
    cluster: ClusterEntry

    @property
    def size(self) -> int:
        return math.prod(level.size.value for level in self.cluster.levels)


def machines(spec: SpaceSpec) -> tuple[list[Machine], list[str]]:
    """The machines that a space names, and what is wrong with the others."""
    gpus, clusters = own_hardware(spec)
    found: list[Machine] = []
    problems: list[str] = []
    for i, choice in enumerate(spec.clusters):
        place = f"clusters[{i}]" if len(spec.clusters) > 1 else "clusters"
        try:
            machine = _machine(choice, gpus, clusters)
        except InputError as error:
            problems.append(f"{place}: {error}")
            continue
        if machine in found:
            problems.append(f"{place}: {machine.cluster.name} with {machine.gpu.name} is listed twice; name each once")
        found.append(machine)
    return found, problems


def _machine(choice: ClusterChoice, gpus: Sequence[GpuEntry], clusters: Sequence[ClusterEntry]) -> Machine:
    """A cluster alone brings its usual GPU, a GPU alone its usual cluster."""
    if choice.cluster is None:
        gpu = hardware.gpu(str(choice.gpu), gpus)
        return Machine(gpu, hardware.cluster(gpu.default_cluster, clusters))
    try:
        cluster = hardware.cluster(choice.cluster, clusters)
    except UnknownName:
        if choice.gpu is not None:
            raise
        try:
            return _machine(ClusterChoice(gpu=choice.cluster), gpus, clusters)
        except UnknownName:
            known = {e.name for e in (*hardware.clusters(), *hardware.gpus(), *gpus, *clusters)}
            raise unknown("cluster or GPU", choice.cluster, known, remedy="`dse gpus` lists them") from None
    if choice.gpu is not None:
        return Machine(hardware.gpu(choice.gpu, gpus), cluster)
    if not cluster.default_gpus:
        raise InputError(f"cluster {cluster.name} has no usual GPU; write {{cluster: {cluster.name}, gpu: ...}}")
    return Machine(hardware.gpu(cluster.default_gpus[0], gpus), cluster)


def own_hardware(spec: SpaceSpec) -> tuple[list[GpuEntry], list[ClusterEntry]]:
    """The space's own entries, checked by the catalogue's schema."""
    where = f"{spec.where}: hardware"
    clusters: list[ClusterEntry] = []
    gpus: list[GpuEntry] = []
    if spec.hardware.clusters:
        text = yaml.safe_dump({"clusters": {k: _cluster(v) for k, v in spec.hardware.clusters.items()}})
        clusters = list(parse(text, ClusterFile, where).clusters.values())
    if spec.hardware.gpus:
        home = clusters[0].name if clusters else None
        text = yaml.safe_dump({"gpus": {k: _gpu(v, home) for k, v in spec.hardware.gpus.items()}})
        gpus = list(parse(text, GpuFile, where).gpus.values())
    return gpus, clusters


def _gpu(entry: Any, home: str | None) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    marketed = {"capacity_gb": entry["capacity_gib"]} if "capacity_gib" in entry else {}
    usual = {"vendor": "own", "generation": "own", **({"default_cluster": home} if home else {})}
    return {**usual, **_sourced({**marketed, **entry})}


def _cluster(entry: Any) -> Any:
    if not isinstance(entry, Mapping):
        return entry
    levels = entry.get("levels")
    if isinstance(levels, list):
        levels = [
            _sourced({"oversubscription": 1, **level}) if isinstance(level, Mapping) else level for level in levels
        ]
    return _sourced({"multicast": False, **entry, **({} if levels is None else {"levels": levels})})


def _sourced(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Bare numbers get the space as their source."""
    return {k: {"value": v, "source": _SOURCE} if isinstance(v, int | float) else v for k, v in entry.items()}


__all__ = ["Machine", "machines", "own_hardware"]
