"""A benchmark run as any tool reports it, and its one row in the columns of a serving table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dse.errors import InputError

Stats = Mapping[str, float]  # "mean", "median", "p90", ...: milliseconds

NEEDED = ("model", "gpu", "engine", "weights", "tp")
# What a person may say of a run; the columns of `dse estimate` and of a serving table.
SAYABLE = (
    *NEEDED,
    *("engine_version", "moe_tp", "moe_ep", "attention_dp", "pp", "cp", "cluster", "kv", "chunk", "prefix_hit"),
    *("speculation", "overlap", "isl", "osl", "concurrency"),
)
MOST_FAILED = 0.05  # share of requests above which the load was not what the log says it was
APART = 1.2  # two readings of one quantity that differ by more than this are not the same quantity
REACHED = 0.9  # of the cap on requests in flight: an open loop held there is a closed one


@dataclass(frozen=True)
class Run:
    """Times in ms, lengths in tokens a request (means of completed requests), rates in requests/s; NaN: not said.

    `max_concurrency` None: no cap. `request_rate` None: as fast as the cap allows. `chunk_ms`: mean time between two
    streamed chunks, whatever tokens they carry (what vLLM and SGLang call ITL).
    """

    tool: str
    said: Mapping[str, str]  # columns that the log itself states
    isl: float
    osl: float
    completed: float
    failed: float
    ttft: Stats
    tpot: Stats
    e2e: Stats = field(default_factory=dict)
    chunk_ms: float = math.nan
    asked_osl: float = math.nan
    max_concurrency: float | None = None
    request_rate: float | None = None
    throughput: float = math.nan
    speculated: bool = False
    unusable: str = ""


def to_row(run: Run, given: Mapping[str, str]) -> dict[str, object]:
    """The row of a run: the columns of serving_calibration.csv, `speculation`, percentiles, `tool`, `note`.

    What was `given` goes before what the log says. Raises InputError where the run cannot serve: what is wrong, and
    what to give.
    """
    if run.unusable:
        raise InputError(run.unusable)
    _whole(run)
    said = {**run.said, **given}
    isl, osl = (float(said[k]) if said.get(k) else v for k, v in (("isl", run.isl), ("osl", run.osl)))
    if not (isl >= 1 and osl >= 1):
        raise InputError(f"mean lengths of {isl:g} prompt and {osl:g} output tokens: give isl and osl")
    ttft, tpot, notes = _times(run, osl)
    concurrency, how = _in_flight(run, said.get("concurrency", ""))
    missing = [name for name in NEEDED if not said.get(name)]
    if missing:
        raise InputError(
            f"the log does not say {', '.join(missing)}; give {' '.join(f'{name}=...' for name in missing)} "
            "(--given, or a file of the same name with .yaml added)"
        )
    speculation = said.get("speculation") or _speculation(run, tpot, notes)
    return {
        "model": said["model"],
        "gpu": said["gpu"],
        "engine": said["engine"],
        "engine_version": said.get("engine_version", ""),
        "weights": said["weights"],
        **{name: said.get(name, "") for name in ("tp", "moe_tp", "moe_ep")},
        "isl": round(isl, 1),
        "osl": round(osl, 1),
        "concurrency": concurrency,
        "speculation": speculation,
        "measured_ttft_ms": ttft,
        "measured_tpot_ms": tpot,
        **{name: said[name] for name in SAYABLE if said.get(name) and name not in _OWN},
        **_percentiles("ttft", run.ttft),
        **_percentiles("tpot", run.tpot),
        "requests": run.completed,
        "requests_failed": run.failed,
        "tool": run.tool,
        "note": "; ".join(filter(None, (*notes, how))),
    }


_OWN = frozenset((*NEEDED, "engine_version", "moe_tp", "moe_ep", "isl", "osl", "concurrency", "speculation"))


def _whole(run: Run) -> None:
    total = run.completed + run.failed
    if run.completed == 0:
        raise InputError(f"no request completed ({run.failed:g} failed)")
    if run.failed > MOST_FAILED * total:
        raise InputError(
            f"{run.failed:g} of {total:g} requests failed: the load was not the one asked for; measure again"
        )


def _times(run: Run, osl: float) -> tuple[float, float, list[str]]:
    """(TTFT, TPOT, notes) in ms: means; TPOT is (end - first token)/(output tokens - 1), NaN for one token.

    The tool's own TPOT is checked against mean latency - mean TTFT over mean length - 1: where they are apart, the tool
    counted something else (chunks, or tokens twice), and the difference of the means is what counts.
    """
    notes: list[str] = []
    ttft, what = _mean(run.ttft)
    if math.isnan(ttft) or ttft <= 0:
        raise InputError("no time to first token: was the run streamed?")
    notes += [f"TTFT is the {what}"] if what != "mean" else []
    e2e, _ = _mean(run.e2e)
    if osl > 1.5 and e2e <= 1.001 * ttft:
        raise InputError("time to first token equals the whole latency: the run was not streamed; give --streaming")
    asked = run.asked_osl
    if asked > 0 and osl > 1.5 * asked:
        raise InputError(
            f"{osl:g} output tokens where {asked:g} were asked for: tokens were counted wrongly "
            "(GenAI-Perf 24.11 and 24.12 count them five times); measure with another version, or give osl"
        )
    if osl < 1.5:
        return ttft, math.nan, [*notes, "one output token: no TPOT"]
    tpot, what = _mean(run.tpot)
    between = (e2e - ttft) / (osl - 1.0)
    if math.isnan(tpot) or tpot <= 0:
        if not between > 0:
            raise InputError("no time per output token, and no request latency to work it out from")
        return ttft, between, [*notes, "TPOT from mean latency, TTFT and length"]
    notes += [f"TPOT is the {what}"] if what != "mean" else []
    if between > 0 and not 1 / APART < tpot / between < APART:
        notes.append(
            f"TPOT from mean latency, TTFT and length: the tool's own, {tpot:.4g} ms, does not agree with them"
        )
        return ttft, between, notes
    return ttft, tpot, notes


def _mean(stats: Stats) -> tuple[float, str]:
    """The mean; the median where there is none, said so."""
    for name in ("mean", "median"):
        value = stats.get(name, math.nan)
        if math.isfinite(value):
            return float(value), name
    return math.nan, ""


def _speculation(run: Run, tpot: float, notes: list[str]) -> str:
    """`yes` where the log says so; `unknown` where chunks carry more than one token and nobody said why."""
    if run.speculated:
        return "yes"
    if math.isfinite(run.chunk_ms) and math.isfinite(tpot) and run.chunk_ms > APART * tpot:
        notes.append(
            f"chunks of {run.chunk_ms / tpot:.2g} tokens in the mean: speculation, or a stream interval "
            "(give speculation=no if the latter)"
        )
        return "unknown"
    return ""


def _in_flight(run: Run, asked: str) -> tuple[float, str]:
    """Requests in flight, and how that is known. Little's law: throughput x mean latency."""
    e2e, _ = _mean(run.e2e)
    little = run.throughput * e2e * 1e-3
    if asked.lower() == "little":
        if not little > 0:
            raise InputError("concurrency=little needs the mean request latency, which the log does not have")
        return round(little, 2), f"concurrency by Little's law: {run.throughput:.4g} requests/s x {e2e:.4g} ms"
    if asked:
        try:
            return float(asked), "concurrency as given"
        except ValueError:
            raise InputError(f"concurrency: {asked!r} is neither a number nor `little`") from None
    cap, rate = run.max_concurrency, run.request_rate
    total = run.completed + run.failed
    if cap is not None and (rate is None or little >= REACHED * cap):
        if total < cap:
            return total, f"{total:g} requests under a cap of {cap:g}: one wave"
        return cap, "" if rate is None else f"held at its cap of {cap:g} requests in flight"
    if rate is None:
        raise InputError(
            f"all {total:g} requests were sent at once, with no cap: no closed loop; "
            "run with --max-concurrency, or give concurrency=N (or `little`: the mean in flight)"
        )
    raise InputError(
        f"an open loop ({rate:g} requests/s): it has no concurrency; give concurrency=little for the mean in flight "
        "by Little's law, or run a closed loop (--max-concurrency)"
    )


def _percentiles(name: str, stats: Stats) -> dict[str, float]:
    words = {"median": "p50", **{word: word for word in stats if word[:1] == "p" and word[1:2].isdigit()}}
    return {f"measured_{name}_{word}_ms": stats[key] for key, word in words.items() if key in stats}


__all__ = ["NEEDED", "SAYABLE", "Run", "Stats", "to_row"]
