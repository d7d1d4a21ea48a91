"""The catalogue of GPUs and clusters: sourced, unambiguous, right where datasheets can be checked, kind to typos."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from pydantic import BaseModel

from dse.catalog import hardware
from dse.catalog.schema import ClusterEntry, GpuEntry, LevelEntry
from dse.cost.types import stack
from dse.errors import InputError, UnknownName
from dse.units import GIB

MEASURED = Path(__file__).parents[2] / "shared" / "measured"
GPUS = hardware.gpus()
CLUSTERS = hardware.clusters()


def sourced(entry: BaseModel) -> Iterator[tuple[str, Any]]:
    """Every `{value, source}` under an entry, with its path."""
    for field in type(entry).model_fields:
        value = getattr(entry, field)
        if isinstance(value, BaseModel):
            yield field, value
        elif isinstance(value, tuple):
            for i, part in enumerate(p for p in value if isinstance(p, BaseModel)):
                yield from ((f"{field}.{i}.{path}", number) for path, number in sourced(part))


# ------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("entry", [*GPUS, *CLUSTERS], ids=lambda e: e.name)
def test_every_number_says_where_it_is_from(entry: GpuEntry | ClusterEntry) -> None:
    found = dict(sourced(entry))
    assert len(found) >= (9 if isinstance(entry, GpuEntry) else 1 + 4 * len(entry.levels))
    for path, number in found.items():
        says_when = re.search(r"\b20[12]\d\b|\bestimate\b|\bchoice\b|\bNCCL 2\.\d+", number.source)
        assert says_when, f"{entry.name}.{path}: {number.source!r} names no year and does not call itself an estimate"


def test_numbers_of_a_gpu_are_all_sourced() -> None:
    """No plain float slips into the schema."""
    for model in (GpuEntry, ClusterEntry, LevelEntry):
        for name, field in model.model_fields.items():
            assert field.annotation not in (int, float, bool), f"{model.__name__}.{name} has no source"


@pytest.mark.parametrize("entry", GPUS, ids=lambda e: e.name)
def test_capacity_agrees_with_the_mebibytes_its_source_quotes(entry: GpuEntry) -> None:
    quoted = re.search(r"(\d+) MiB", entry.capacity_gib.source)
    if quoted:
        assert entry.capacity_gib.value == pytest.approx(int(quoted[1]) / 1024, rel=1e-5)
    assert 0.9 < entry.capacity_gib.value / entry.capacity_gb.value <= 1.01


@pytest.mark.parametrize("entry", GPUS, ids=lambda e: e.name)
def test_sparse_figures_that_were_halved_are_halved(entry: GpuEntry) -> None:
    """`3958 sparse/2`; `72 PFLOP/s sparse over 8 GPUs /2`; `108 PFLOP/s dense over 8 GPUs`."""
    for path, number in sourced(entry):
        if half := re.search(r"(\d+) sparse/2", number.source):
            assert number.value == pytest.approx(float(half[1]) / 2), path
        if over := re.search(r"(\d+) (PFLOP/s|POP/s) (sparse|dense)? ?over (\d+)", number.source):
            value = float(over[1]) * 1000 / float(over[4]) / (2 if over[3] == "sparse" else 1)
            assert number.value == pytest.approx(value, rel=1e-3), path
        if bits := re.search(r"(\d+(?:\.\d+)?) (TB/s|PB/s) over (\d+)", number.source):
            value = float(bits[1]) * (1e3 if bits[2] == "TB/s" else 1e6) / float(bits[3])
            assert number.value == pytest.approx(value, rel=0.01), path


@pytest.mark.parametrize("entry", GPUS, ids=lambda e: e.name)
def test_the_peak_is_units_by_clock_by_a_power_of_two(entry: GpuEntry) -> None:
    """SMs (CUs, MXUs) and the clock belong to one another: their matrix units do 2^n FLOP a cycle."""
    assert entry.sms is not None
    assert entry.clock_ghz is not None
    assert entry.l2_mib is not None
    device = hardware.to_device(entry)
    if entry.name in ("h20", "h20-3e"):
        return  # cut by other means than its clock
    bits = np.log2(device.peak_bf16 / device.sms / device.clock)
    assert bits == pytest.approx(round(bits), abs=0.02)
    assert 2 ** round(bits) >= 1024


def test_an_own_gpu_may_leave_out_its_streaming_multiprocessors() -> None:
    entry = hardware.gpu("b200").model_copy(update={"sms": None, "clock_ghz": None, "l2_mib": None})
    device = hardware.to_device(entry)
    assert (device.sms, device.clock, device.l2) == (132.0, 1.83e9, 50e6)


# --------------------------------------------------------------------------------------------------- names


def test_every_spelling_means_one_entry() -> None:
    for entries, find in ((GPUS, hardware.gpu), (CLUSTERS, hardware.cluster)):
        for entry in entries:
            for spelling in (entry.name, *entry.aliases):
                for variant in (
                    spelling,
                    spelling.upper(),
                    spelling.lower().replace("-", "_"),
                    spelling.replace(" ", "-"),
                ):
                    assert find(variant) is entry


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("h100", "h100"),
        ("H100-SXM-80GB", "h100"),
        ("H100-SXM5", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("nvidia_h200", "h200"),
        ("H200-SXM-141GB", "h200"),
        ("B200-SXM", "b200"),
        ("A100 (40 or 80GB not stated in repo)", "a100"),
        ("A100-SXM-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("AMD Instinct MI300X", "mi300x"),
        ("L40S", "l40s"),
        ("gb200", "gb200"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("DGX-B200", "b200"),
        ("DGX-B300", "b300"),
        ("GB200-NVL72", "gb200"),
        ("GB300-NVL72", "gb300"),
        ("Rubin-NVL144", "rubin"),
        ("RubinU-NVL576", "rubin-ultra"),
        ("Rubin-NVL576", "rubin-ultra"),
        ("H20-3E", "h20-3e"),
        ("H20", "h20"),
        ("H800", "h800"),
        ("MI308X", "mi308x"),
        ("Google TPU v5e", "tpu-v5e"),
        ("Ironwood", "tpu-v7"),
    ],
)
def test_spellings_in_use_find_their_gpu(spelling: str, name: str) -> None:
    assert hardware.gpu(spelling).name == name


@pytest.mark.skipif(not MEASURED.is_dir(), reason="the measured tables (../shared/measured) are not here")
def test_every_gpu_of_the_measured_tables_is_known() -> None:
    spellings = set()
    for path in MEASURED.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            spellings |= {row["gpu"] for row in csv.DictReader(file) if row.get("gpu")}
    assert len(spellings) > 10
    for spelling in sorted(spellings):
        assert isinstance(hardware.gpu(spelling), GpuEntry)


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"unknown gpu 'h1000'.*nearest:.*h100"):
        hardware.gpu("h1000")
    with pytest.raises(UnknownName, match=r"unknown cluster 'gb200-nvl7'.*nearest:.*gb200-nvl72"):
        hardware.cluster("gb200-nvl7")


def test_gpus_and_clusters_know_each_other() -> None:
    for entry in GPUS:
        assert entry.name in hardware.cluster(entry.default_cluster).default_gpus
    for cluster in CLUSTERS:
        assert cluster.default_gpus
        assert all(hardware.gpu(name).name == name for name in cluster.default_gpus)


# ------------------------------------------------------------------------------------- published figures


def test_dense_peaks_of_the_datasheets() -> None:
    peaks = {
        name: tuple(
            getattr(hardware.gpu(name), f).value
            for f in ("peak_bf16_tflops", "peak_fp8_tflops", "peak_fp4_tflops", "peak_int8_tops")
        )
        for name in ("a100", "h100", "h200", "h20", "b200", "gb200", "gb300", "mi300x", "tpu-v7")
    }
    assert peaks["a100"] == (312, 0, 0, 624)
    assert peaks["h100"] == peaks["h200"] == (989.5, 1979, 0, 1979)
    assert peaks["h20"] == (148, 296, 0, 296)
    assert peaks["b200"] == (2250, 4500, 9000, 4500)
    assert peaks["gb200"] == (2500, 5000, 10000, 5000)
    assert peaks["gb300"][:3] == (2500, 5000, 15000)
    assert peaks["mi300x"] == (1307.4, 2614.9, 0, 2614.9)
    assert peaks["tpu-v7"][:2] == (2307, 4614)


@pytest.mark.parametrize(
    ("name", "flop_per_byte"), [("a100", 153), ("h100", 295), ("h200", 206), ("b200", 292), ("mi300x", 247)]
)
def test_ridge_points_in_bf16(name: str, flop_per_byte: float) -> None:
    device = hardware.to_device(hardware.gpu(name))
    assert device.peak_bf16 / device.bandwidth == pytest.approx(flop_per_byte, abs=0.6)


def test_peaks_grow_as_bits_shrink() -> None:
    for entry in GPUS:
        assert entry.peak_fp8_tflops.value == 0 or entry.peak_fp8_tflops.value >= entry.peak_bf16_tflops.value
        assert entry.peak_fp4_tflops.value == 0 or entry.peak_fp4_tflops.value > entry.peak_fp8_tflops.value


def test_devices_are_in_si() -> None:
    device = hardware.to_device(hardware.gpu("h100"))
    assert device.peak_bf16 == 989.5e12
    assert device.bandwidth == 3.35e12
    assert device.capacity == pytest.approx(81559 * 2**20, rel=1e-6)  # 85.5e9 bytes: not 80e9, not 80 GiB
    assert 80e9 < device.capacity < 80 * GIB
    assert (device.power, device.price) == (700, 2.95)


def test_topologies_are_in_si() -> None:
    topology = hardware.to_topology(hardware.cluster("h100-dgx"))
    node, network = topology.levels
    assert (node.size, node.bandwidth, network.bandwidth, topology.multicast) == (8, 450e9, 50e9, 1)
    assert node.latency == pytest.approx(1.9e-6)
    assert network.latency == pytest.approx(4e-6)
    rack = hardware.to_topology(hardware.cluster("gb200-nvl72")).levels[0]
    assert (rack.size, rack.bandwidth) == (72, 900e9)
    assert hardware.to_topology(hardware.cluster("a100-dgx")).multicast == 0


@pytest.mark.parametrize("entry", CLUSTERS, ids=lambda e: e.name)
def test_networks_slow_down_outwards_and_hold_big_plans(entry: ClusterEntry) -> None:
    levels = hardware.to_topology(entry).levels
    effective = [level.bandwidth / level.oversubscription for level in levels]
    assert effective[0] == max(effective)
    assert [level.latency for level in levels] == sorted(level.latency for level in levels)
    assert np.prod([level.size for level in levels]) >= 1024
    assert len({level.name for level in entry.levels}) == len(levels)


def test_topologies_pad_to_one_depth_and_stack() -> None:
    topologies = [hardware.to_topology(entry) for entry in CLUSTERS]
    depth = max(len(t.levels) for t in topologies)
    padded = [hardware.pad_levels(t, depth) for t in topologies]
    for before, after in zip(topologies, padded, strict=True):
        assert after.levels[: len(before.levels)] == before.levels
        for level in after.levels[len(before.levels) :]:
            assert (level.size, level.latency, level.oversubscription) == (1, 0, 1)
            assert level.bandwidth == before.levels[-1].bandwidth
    batch = stack(padded)
    assert all(leaf.shape == (len(CLUSTERS),) and np.isfinite(leaf).all() for leaf in jax.tree.leaves(batch))
    assert stack([hardware.to_device(entry) for entry in GPUS]).capacity.shape == (len(GPUS),)
    with pytest.raises(InputError, match="4 levels does not fit in 2"):
        hardware.pad_levels(padded[0], 2)


# ---------------------------------------------------------------------------------------------- own files

OWN = """
gpus:
  mine:
    aliases: [my gpu]
    vendor: me
    generation: first
    peak_bf16_tflops: {value: 100, source: simulator}
    peak_fp8_tflops: {value: 200, source: simulator}
    peak_fp4_tflops: {value: 0, source: simulator}
    peak_int8_tops: {value: 200, source: simulator}
    hbm_gb_s: {value: 1000, source: simulator}
    capacity_gb: {value: 64, source: simulator}
    capacity_gib: {value: 63.5, source: simulator}
    tdp_w: {value: 300, source: simulator}
    price_usd_hour: {value: 0.5, source: quote}
    default_cluster: h100-dgx
"""
OWN_CLUSTER = """
clusters:
  lab:
    multicast: {value: false, source: manual}
    levels:
      - name: bus
        size: {value: 4, source: manual}
        bandwidth_gb_s: {value: 10, source: manual}
        latency_us: {value: 3, source: manual}
        oversubscription: {value: 2, source: manual}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_own_entries_are_found_beside_and_before_the_catalogue(tmp_path: Path) -> None:
    own = hardware.load_gpus(written(tmp_path, OWN))
    assert hardware.gpu("My_GPU", own).name == "mine"
    assert hardware.gpu("h100", own).vendor == "nvidia"
    better = hardware.load_gpus(written(tmp_path, OWN.replace("mine", "h100")))
    assert hardware.gpu("H100", better).vendor == "me"
    assert hardware.gpu("H100").vendor == "nvidia"
    lab = hardware.load_clusters(written(tmp_path, OWN_CLUSTER))
    assert hardware.to_topology(hardware.cluster("lab", lab)).levels[0].bandwidth == 10e9
    with pytest.raises(UnknownName, match="lab"):
        hardware.cluster("labs", lab)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("value: 1000,", "value: -3,", [r"gpus\.mine\.hbm_gb_s\.value: -3", "greater than 0"]),
        ("value: 1000,", "value: 0,", [r"gpus\.mine\.hbm_gb_s\.value: 0", "greater than 0"]),
        ("value: 200,", "value: -1,", [r"peak_fp8_tflops\.value: -1", r"peak_int8_tops\.value: -1", "equal to 0"]),
        ("value: 1000,", "value: .nan,", [r"gpus\.mine\.hbm_gb_s\.value: nan", "finite"]),
        ("value: 1000,", "value: .inf,", [r"gpus\.mine\.hbm_gb_s\.value: inf", "finite"]),
        ("value: 1000,", "value: true,", [r"gpus\.mine\.hbm_gb_s\.value: True", "number"]),
        ("value: 1000,", "value: 1e3,", [r"gpus\.mine\.hbm_gb_s\.value: '1e3'", r"1\.0e\+3"]),
        ("{value: 1000, source: simulator}", "1000", [r"gpus\.mine\.hbm_gb_s: 1000 has no source", r"\{value: 1000"]),
        (
            "{value: 1000, source: simulator}",
            "{value: 1000}",
            [r"hbm_gb_s\.source: missing", "where the number is from"],
        ),
        ("source: quote", "source: ''", [r"price_usd_hour\.source: ''"]),
        ("hbm_gb_s:", "hbm_gbs:", ["unknown key 'hbm_gbs'", "nearest: hbm_gb_s", r"gpus\.mine\.hbm_gb_s: missing"]),
        (
            "tdp_w:",
            "vendor:",
            [r"line \d+: not valid YAML: key 'vendor' is written twice \(also on line \d+\); keep one"],
        ),
        ("aliases: [my gpu]", "name: other", ["'other'", "remove the line"]),
        ("gpus:", "gpu:", ["unknown key 'gpu'", "nearest: gpus"]),
        ("  mine:", "  mine: [", ["not valid YAML"]),
    ],
)
def test_a_bad_gpu_file_is_one_error_with_place_value_and_remedy(
    tmp_path: Path, old: str, new: str, says: list[str]
) -> None:
    path = written(tmp_path, OWN.replace(old, new))
    with pytest.raises(InputError) as caught:
        hardware.load_gpus(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "pydantic" not in message
    for pattern in says:
        assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("value: 2,", "value: 0.5,", r"clusters\.lab\.levels\.0\.oversubscription\.value: 0\.5.*equal to 1"),
        ("value: 4,", "value: 0,", r"clusters\.lab\.levels\.0\.size\.value: 0.*equal to 1"),
        ("value: 4,", "value: 4.5,", r"clusters\.lab\.levels\.0\.size\.value: 4\.5.*integer"),
        ("value: false,", "value: 0,", r"clusters\.lab\.multicast\.value: 0.*boolean"),
        ("bandwidth_gb_s", "bandwith_gb_s", r"levels\.0\.bandwith_gb_s: unknown key.*nearest: bandwidth_gb_s"),
    ],
)
def test_a_bad_cluster_file_names_the_level(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        hardware.load_clusters(written(tmp_path, OWN_CLUSTER.replace(old, new)))


@pytest.mark.parametrize("text", ["", "- 1", "3", "gpus:", "gpus: {}", "gpus: {a: 3}", "gpus: {1: {}}"])
def test_files_without_entries_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"own\.yaml"):
        hardware.load_gpus(written(tmp_path, text))


def test_unreadable_files_and_clashing_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        hardware.load_gpus(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        hardware.load_gpus(binary)
    twice = OWN + OWN.replace("gpus:\n", "").replace("  mine:", "  MI_NE:").replace("    aliases: [my gpu]\n", "")
    with pytest.raises(InputError, match="'MI_NE' names both 'mine' and 'MI_NE'"):
        hardware.load_gpus(written(tmp_path, twice))
