"""How long commands take: python benchmarks/commands.py [NAME...] [--rounds 5] [--source DIR]

Cold: nothing kept from before (a fresh DSE_CACHE each time). Warm: the programs of a cold run are there. Off: programs
kept by XLA's own cache alone. Medians of the rounds, which take turns, so that what else the machine does falls on all
of them; CPU seconds beside them, which a busy machine changes less. The answer is checked while it is timed: tables are
the same to the last byte. `--source` times another checkout of dse as well, turn by turn.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
CASES = """model,gpu,isl,osl,tp,concurrency,weights,moe_ep,attention_dp
meta-llama/Llama-3.1-70B,h100,2048,512,4,32,fp8,,
deepseek-ai/DeepSeek-V3,NVIDIA H200,4096,1024,1,512,fp8,16,16
"""
COMMANDS = {
    "disaggregated": ("search", str(HERE / "search_spaces" / "deepseek_v3_disagg_h200.yaml"), "--out"),
    "quickstart": ("search", str(HERE / "search_spaces" / "quickstart.yaml"), "--out"),
    "estimate": ("estimate", "{cases}", "-o"),
}
AT_MOST = {"disaggregated": 5.0}  # seconds, warm, on four cores
TABLES = ("pareto.csv", "candidates.csv", "estimate.csv")


def timed(name: str, source: Path, cache: Path, folder: Path, keep: bool) -> tuple[float, float, list[bytes]]:
    """Seconds and CPU seconds of one command, and the tables that it wrote."""
    cases, out = folder / "cases.csv", folder / (f"{name}.csv" if name == "estimate" else name)
    cases.write_text(CASES)
    words = [word.format(cases=cases) for word in COMMANDS[name]]
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    own |= {"DSE_CACHE": str(cache), "DSE_PROGRAMS": "on" if keep else "off", "PYTHONPATH": str(source)}
    started, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-c", "from dse.cli import main; main()", *words, str(out)],
        env=own,
        cwd=folder,  # whose packages would come before PYTHONPATH
        stdout=subprocess.DEVNULL,
        check=True,
    )
    seconds, after = time.perf_counter() - started, os.times()
    worked = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, worked, [path.read_bytes() for path in (out, *(out / t for t in TABLES)) if path.is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--source", type=Path)
    arguments = parser.parse_args()
    sources = {"": HERE} | ({f" ({arguments.source})": arguments.source.resolve()} if arguments.source else {})
    ways = [(label, source, True) for label, source in sources.items()] + [("", HERE, False)]
    failed = []
    for name in arguments.names or COMMANDS:
        seconds: dict[str, list[float]] = {}
        worked: dict[str, list[float]] = {}
        told: dict[str, set[tuple[bytes, ...]]] = {}
        with tempfile.TemporaryDirectory() as place:
            for n in range(arguments.rounds):
                for (label, source, keep), turn in itertools.product(ways, ("cold", "warm")):
                    folder = Path(place, f"{n}{keep}{len(label)}")
                    folder.mkdir(exist_ok=True)
                    took, cpu, tables = timed(name, source, folder / "cache", folder, keep)
                    which = f"{turn if keep else f'{turn}, off'}{label}"
                    seconds.setdefault(which, []).append(took)
                    worked.setdefault(which, []).append(cpu)
                    told.setdefault(label, set()).add(tuple(tables))
        load = os.getloadavg()[0]
        for which, times in seconds.items():
            each = ", ".join(f"{t:.1f}" for t in times)
            middle, cpu = statistics.median(times), statistics.median(worked[which])
            print(f"{name:14} {which:10} {middle:6.2f} s, CPU {cpu:6.2f} s  ({each}; load {load:.1f})", flush=True)
        if any(len(tables) != 1 for tables in told.values()):
            failed.append(f"{name}: tables differ between runs")
        warm = statistics.median(seconds["warm"])
        if warm > AT_MOST.get(name, warm):
            failed.append(f"{name}: {warm:.1f} s warm, at most {AT_MOST[name]:g}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
