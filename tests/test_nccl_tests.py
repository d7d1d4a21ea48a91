"""The text that nccl-tests print, read as measurements: sizes, ranks, time units, lines that contradict themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from dse.calibrate.collective_calls import Transfer
from dse.calibrate.collectives import read_collectives
from dse.calibrate.nccl_tests import read_nccl_tests
from dse.errors import InputError

PRINTED = """\
# Collective test starting: all_gather_perf
# nThread 1 nGpus 1 minBytes 1048576 maxBytes 4194304 step: 2(factor) warmup iters: 1 iters: 20 validation: 1 graph: 0
#
# Using devices
#  Rank  0 Group  0 Pid 4242 on  node-a device  0 [0000:18:00] NVIDIA H100 80GB HBM3
#  Rank  1 Group  0 Pid 4243 on  node-a device  1 [0000:2a:00] NVIDIA H100 80GB HBM3
#  Rank  2 Group  0 Pid 1717 on  node-b device  0 [0000:18:00] NVIDIA H100 80GB HBM3
#  Rank  3 Group  0 Pid 1718 on  node-b device  1 [0000:2a:00] NVIDIA H100 80GB HBM3
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576         65536     float    none      -1    58.21   18.01   13.51      0    57.90   18.11   13.58      0
     2097152        131072     float    none      -1    80.10   26.18   19.64      0    79.00   26.55   19.91      2
     4194304        262144     float    none      -1   120.00   99.99   74.99      0   118.00   35.55   26.66    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 20.6
"""


def test_nccl_tests_text() -> None:
    table = read_nccl_tests(PRINTED)
    assert len(table) == 6
    assert list(table.loc[0, ["gpu", "op_name", "num_workers", "devices_per_node"]]) == ["h100", "all_gather", 4, 2]
    assert table["message_bytes"].tolist() == [1 << 20, 1 << 20, 1 << 21, 1 << 21, 1 << 22, 1 << 22]
    assert table["time_us"].tolist() == [58.21, 57.90, 80.10, 79.00, 120.00, 118.00]
    assert table["in_place"].tolist() == [False, True] * 3
    assert table["problem"].tolist()[:3] == ["", "", ""]
    assert table["problem"][3] == "2 wrong elements"
    assert table["problem"][4] == "4.1943e+06 bytes in 120 us are not 99.99 GB/s"


def test_nccl_tests_file_as_observations(tmp_path: Path) -> None:
    path = tmp_path / "all_gather.txt"
    path.write_text(PRINTED + "  8388608 131072 float\n")
    rows = read_collectives(path, "nccl_tests")
    assert len(rows) == 4
    assert [r.row for r in rows.refused] == [3, 4, 6]
    assert "cannot be read" in rows.refused[-1].reason
    assert rows.labels["gpu"] == ["h100"] * 4
    assert isinstance(rows.inputs, Transfer)
    assert float(rows.inputs.stride[0]) == 4.0  # two of eight GPUs a node


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no `#  Rank"),
        (PRINTED.replace("Rank", "Row"), "says nThread and nGpus"),
        (PRINTED.replace("(us)", ""), "line of units"),
        (PRINTED.replace("# Collective test starting: all_gather_perf\n", ""), "say op="),
        (PRINTED.replace("NVIDIA H100 80GB HBM3", "Abacus 3000"), "unknown gpu"),
        ("\n".join(line for line in PRINTED.splitlines() if line.startswith("#")), "no lines of measurements"),
    ],
)
def test_nccl_tests_that_cannot_be_read(text: str, word: str) -> None:
    with pytest.raises(InputError, match=word):
        read_nccl_tests(text)


def test_nccl_tests_time_in_milliseconds() -> None:
    table = read_nccl_tests(PRINTED.replace("(us)", "(ms)").replace("58.21", ".05821"))
    assert table["time_us"][0] == pytest.approx(58.21)
    assert "are not" in table["problem"][2]  # the others were microseconds after all
