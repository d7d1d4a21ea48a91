"""What nccl-tests print (all_reduce_perf, all_gather_perf, ...), as a table.

The header names the ranks (`#  Rank  0 ... on host device 0 [0x07] NVIDIA H100 80GB HBM3`); each line of the table has
size, count, type, redop, root, and time (us), algbw, busbw (GB/s), #wrong, first out of place, then in place
(github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md). `size` is the whole buffer for all-reduce, the gathered buffer for
all-gather, what one rank sends for all-to-all: our own conventions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from dse.catalog import hardware
from dse.errors import InputError, UnknownName

OPS = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "alltoall",
    "sendrecv": "send_recv",
}
_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s+.*\bon\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.+?)\s*$")
_STARTING = re.compile(r"Collective test starting:\s*(\w+?)_perf")
_THREADS = re.compile(r"nThread\s+(\d+)\s+nGpus\s+(\d+)")
_UNIT = re.compile(r"^#.*\((us|ms|s)\).*\(GB/s\)")
_PER_US = {"us": 1.0, "ms": 1e3, "s": 1e6}
COLUMNS = 13  # size count type redop root, twice (time algbw busbw #wrong)
BANDWIDTH_SLACK = 0.05  # algbw is printed with two digits: size / time must agree up to that


@dataclass(frozen=True)
class Run:
    """What the header says."""

    op: str
    ranks: int
    nodes: int
    gpu: str


def read_nccl_tests(text: str, op: str | None = None, gpu: str | None = None) -> pd.DataFrame:
    """One row a measurement: gpu, op_name, num_workers, devices_per_node, message_bytes, dtype, in_place, time_us,
    `wrong` (elements, NaN where the run did not check) and `problem` ("" or why the line cannot be used).

    `op` and `gpu` stand in where the header does not say (older versions print no test name). InputError: no ranks, no
    table, no operation, or a GPU that the catalogue does not have.
    """
    lines = text.splitlines()
    run = _header(lines, op, gpu)
    units = {m.group(1) for m in map(_UNIT.match, lines) if m}
    if len(units) != 1:
        raise InputError("nccl-tests output: no line of units such as `# (B) (elements) (us) (GB/s) (GB/s)`")
    scale = _PER_US[units.pop()]
    rows = [row for line in lines if line.strip() and not line.lstrip().startswith("#") for row in _rows(line, scale)]
    if not rows:
        raise InputError("nccl-tests output: no lines of measurements; give the whole output of one run")
    table = pd.DataFrame(rows)
    return table.assign(
        gpu=run.gpu, op_name=run.op, num_workers=run.ranks, devices_per_node=max(run.ranks // run.nodes, 1)
    )


def _header(lines: list[str], op: str | None, gpu: str | None) -> Run:
    ranks = [m.groups() for m in map(_RANK.match, lines) if m]
    if not ranks:
        threads = [m.groups() for m in map(_THREADS.search, lines) if m]
        found = " (it says nThread and nGpus, not which GPUs)" if threads else ""
        raise InputError(f"nccl-tests output: no `#  Rank  0 ... on HOST device 0 [...] GPU` lines{found}")
    started = [m.group(1) for m in map(_STARTING.search, lines) if m]
    name = op or (started[0] if started else None)
    if name not in OPS:
        raise InputError(
            f"nccl-tests output: operation {name!r} (allowed: {', '.join(OPS)}); older versions print none: say op="
        )
    return Run(
        op=OPS[name],
        ranks=len({rank for rank, _, _ in ranks}),
        nodes=len({host for _, host, _ in ranks}),
        gpu=gpu or _gpu(ranks[0][2]),
    )


def _gpu(words: str) -> str:
    """`NVIDIA H100 80GB HBM3` -> h100: the longest start of the driver's name that the catalogue knows."""
    parts = words.split()
    for stop in range(len(parts), 0, -1):
        try:
            return hardware.gpu(" ".join(parts[:stop])).name
        except UnknownName:
            continue
    return hardware.gpu(words).name


def _rows(line: str, scale: float) -> list[dict[str, object]]:
    """Out of place and in place, or one row that says why the line cannot be read."""
    fields = line.split()
    if len(fields) != COLUMNS:
        return [
            {"message_bytes": float("nan"), "time_us": float("nan"), "problem": f"cannot be read: {line.strip()!r}"}
        ]
    size, _, dtype = fields[:3]
    result: list[dict[str, object]] = []
    for in_place, (time, algbw, _, wrong) in ((False, fields[5:9]), (True, fields[9:13])):
        numbers = [pd.to_numeric(x, errors="coerce") for x in (size, time, algbw, wrong)]
        result.append(
            {
                "message_bytes": numbers[0],
                "dtype": dtype,
                "in_place": in_place,
                "time_us": numbers[1] * scale,
                "wrong": numbers[3],
                "problem": _problem(numbers[0], numbers[1] * scale, numbers[2], numbers[3]),
            }
        )
    return result


def _problem(size: float, us: float, algbw: float, wrong: float) -> str:
    if wrong > 0:
        return f"{wrong:g} wrong elements"
    if us > 0 and algbw > 0.1 and abs(size / us / 1e3 / algbw - 1.0) > BANDWIDTH_SLACK:
        return f"{size:g} bytes in {us:g} us are not {algbw:g} GB/s"
    return ""


__all__ = ["read_nccl_tests"]
