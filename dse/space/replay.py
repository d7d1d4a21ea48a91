"""A trace replayed on plans: rows of estimate's columns in, one row of what users would have felt out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import numpy as np
import pandas as pd

from dse.catalog.coefficients import CoefficientSet
from dse.cost.batching import POLICIES
from dse.cost.simulate import SEATS, Requests, Simulation, simulate
from dse.errors import InputError, unknown
from dse.space.cases import Case, parse_cases, scenarios_of
from dse.space.traces import Trace
from dse.units import GIB, MS

Array = np.ndarray
AUTO = "auto"  # the policy of each row's engine
ENGINE_POLICY = {"sglang": "prefill"}  # others: mixed
PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Replay:
    """What happened. `frame`: a row a plan, in order; `simulated`: their indices in `simulation`, -1 where refused."""

    frame: pd.DataFrame
    trace: Trace
    simulation: Simulation | None
    simulated: Array
    ranking: Array  # rows of `frame` that were run, best first
    overhead: Array  # seconds an arrival waits outside the engine, of each simulated plan
    replicas: Array  # of each simulated plan; the replay is of the first
    targets: tuple[float | None, float | None]  # TTFT and TPOT, ms

    @property
    def best(self) -> int:
        """Row of `frame`; -1 where no plan could be run."""
        return int(self.ranking[0]) if len(self.ranking) else -1

    def requests(self, row: int | None = None) -> pd.DataFrame:
        """Each request of a plan (default: the best): lengths, and seconds of arrival, admission, first token, end."""
        row = self.best if row is None else row
        if not 0 <= row < len(self.frame) or self.simulated[row] < 0 or self.simulation is None:
            able = [str(i) for i in np.flatnonzero(self.simulated >= 0)[:8]]
            raise InputError(f"requests: row {row} was not replayed (replayed: {', '.join(able) or 'none'})")
        place = int(self.simulated[row])
        late, took = self.overhead[place], slice(None, None, int(self.replicas[place]))
        length = len(self.trace.input_tokens[took])
        o = jax.tree.map(lambda x: x[place, :length], self.simulation.outcome)
        table = pd.DataFrame(
            {
                "request": np.arange(len(self.trace))[took],
                "input_tokens": self.trace.input_tokens[took],
                "output_tokens": self.trace.output_tokens[took],
                "prefix_tokens": self.trace.prefix_tokens[took],
                "arrival_s": o.arrival,
                "admitted_s": o.admitted + late,
                "first_token_s": o.first_token + late,
                "finished_s": o.finished + late,
            }
        )
        return table.assign(**_latencies(table))


def shape_trace(trace: Trace, rate: float | None = None, limit: int | None = None, seed: int = 0) -> Trace:
    """The first `limit` requests, from time 0, at `rate` requests a second.

    Arrivals are stretched so that their mean rate is `rate`; a trace without arrivals gets Poisson ones (`seed`).
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} is out of range (allowed: whole numbers from 1)")
    if rate is not None and not 0 < rate < np.inf:
        raise InputError(f"rate: {rate:g} is out of range (allowed: above 0 requests a second)")
    n = len(trace) if limit is None else min(limit, len(trace))
    if trace.arrival_s is None:
        if rate is None:
            raise InputError("rate: the trace has no arrival_s; give a rate (requests a second), for Poisson arrivals")
        arrival = np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, n))
    else:
        arrival = trace.arrival_s[:n] - trace.arrival_s[0]
        if rate is not None and arrival[-1] > 0:
            arrival = arrival * ((n - 1) / arrival[-1] / rate)
        elif rate is not None and n > 1:
            raise InputError(f"rate: all {n} requests arrive at once, so that their rate cannot be set")
    return Trace(
        arrival_s=arrival,
        input_tokens=trace.input_tokens[:n],
        output_tokens=trace.output_tokens[:n],
        prefix_tokens=trace.prefix_tokens[:n],
    )


def replay(
    trace: Trace,
    plans: pd.DataFrame,
    coefficients: CoefficientSet,
    *,
    rate: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    policy: str = AUTO,
    seats: int = SEATS,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Replay:
    """Replay a trace on every plan: a row of `estimate`'s columns each (isl, osl and concurrency are not needed).

    `replicas` of a row share the requests round robin. `seats`: requests that run at once on an attention-DP rank, at
    most. Latencies are from arrival; `queue` counts requests before their first token, `waiting` those of them that
    are not admitted; `attainment` is the share of requests that meet both targets. A plan that cannot be run has its
    `reason`. Raises InputError where the whole call is unusable.
    """
    if policy not in (AUTO, *POLICIES):
        raise unknown("policy", policy, [AUTO, *POLICIES], "policy")
    if seats < 1:
        raise InputError(f"seats: {seats} is out of range (allowed: whole numbers from 1)")
    for name, target in (("ttft_ms", ttft_ms), ("tpot_ms", tpot_ms)):
        if target is not None and not 0.0 < target < np.inf:
            raise InputError(f"{name}: {target:g} is out of range (allowed: finite numbers above 0)")
    missing = [name for name in ("model", "gpu") if name not in plans.columns]
    if missing or not len(plans):
        what = f"column {missing[0]} missing" if missing else "no plans"
        raise InputError(f"plans: {what}; give rows with model, gpu and the columns of a plan (tp, pp, weights, ...)")
    shaped = shape_trace(trace, rate, limit, seed)
    rows, copies = _cases(plans, shaped, seats)
    cases = [row for row in rows if isinstance(row, Case)]
    simulated = np.cumsum([isinstance(row, Case) for row in rows]) - 1
    simulated = np.where([isinstance(row, Case) for row in rows], simulated, -1)
    frame = plans.drop(columns=[c for c in plans.columns if c in COLUMNS]).reset_index(drop=True)
    if not cases:
        nothing = np.zeros(0)
        refusals = [{"feasible": False, "reason": str(row)} for row in rows]
        frame = pd.concat([frame, pd.DataFrame(refusals, columns=list(COLUMNS))], axis=1)
        return Replay(frame, shaped, None, simulated, nothing, nothing, nothing, (ttft_ms, tpot_ms))
    with jax.enable_x64(True):
        scenarios = scenarios_of(cases, coefficients)
    policies = [ENGINE_POLICY.get(case.engine, "mixed") if policy == AUTO else policy for case in cases]
    mine = np.array([n for row, n in zip(rows, copies, strict=True) if isinstance(row, Case)])
    index = np.array([POLICIES.index(name) for name in policies])
    simulation = simulate(
        scenarios,
        _dealt(shaped, mine),
        policy=index,
        seats=seats,
        workers=workers or os.cpu_count() or 1,
        progress=progress,
    )
    overhead = np.broadcast_to(np.asarray(scenarios.coefficients.arrival_overhead, float), len(cases))
    done = Replay(frame, shaped, simulation, simulated, np.zeros(0), overhead, mine, (ttft_ms, tpot_ms))
    whole = pd.DataFrame([_row(done, i, row, policies) for i, row in enumerate(rows)], columns=list(COLUMNS))
    frame = pd.concat([frame, whole], axis=1)
    refused = np.array([isinstance(reason, str) and reason != "" for reason in frame["reason"]])
    kept = replace(done, frame=frame, simulated=np.where(refused, -1, simulated))
    return replace(kept, ranking=_ranking(frame, kept.simulated, ttft_ms is not None or tpot_ms is not None))


COLUMNS = (
    *(f"{name}_{what}" for name in LATENCIES for what in ("ms", *(f"p{p}_ms" for p in PERCENTILES))),
    *("attainment", "requests_s", "output_tok_s", "output_tok_s_gpu", "tok_s_user", "gpus", "policy"),
    *("mean_queue", "most_queue", "most_waiting", "mean_decoding", "mean_kv_share", "most_kv_share", "drain_s"),
    *("feasible", "reason"),
)


def _cases(plans: pd.DataFrame, trace: Trace, seats: int) -> tuple[list[Case | str], list[int]]:
    """Rows looked up, with the trace's mean lengths and as many requests as may run; and their replicas."""
    dp = pd.to_numeric(plans.get("attention_dp", pd.Series(1, plans.index)), errors="coerce").fillna(1)
    filled = plans.assign(
        isl=str(float(trace.input_tokens.mean())),
        osl=str(float(trace.output_tokens.mean())),
        concurrency=(seats * dp.clip(lower=1)).round().astype(int).astype(str),
        prefix_hit="",
    )
    rows = parse_cases(filled)
    given = plans.get("replicas", pd.Series(1, plans.index))
    copies = pd.to_numeric(given, errors="coerce").where(given.notna(), 1).to_numpy(float)
    counts = []
    for i, n in enumerate(copies):
        good = n >= 1 and n == round(n)
        counts.append(int(n) if good else 1)
        if not good:
            rows[i] = f"replicas: {given.iloc[i]!r} is out of range (allowed: whole numbers from 1)"
    return rows, counts


def _dealt(trace: Trace, replicas: Array) -> Requests:
    """What the first replica of each plan gets; one table for all where they have as many replicas."""
    assert trace.arrival_s is not None
    columns = {
        "arrival": trace.arrival_s,
        "isl": trace.input_tokens,
        "osl": trace.output_tokens,
        "prefix": trace.prefix_tokens,
    }
    if len(np.unique(replicas)) == 1:
        own = {name: values[:: replicas[0]] for name, values in columns.items()}
        return Requests(**own, count=np.array(len(own["isl"])))
    counts = -(-len(trace) // replicas)
    wide = int(counts.max())
    index = np.minimum(np.arange(wide) * replicas[:, None], len(trace) - 1)
    return Requests(**{name: values[index] for name, values in columns.items()}, count=counts)


def _latencies(requests: pd.DataFrame) -> dict[str, Array]:
    """Milliseconds; TPOT is NaN for requests of one token."""
    arrival, first, end = (requests[f"{name}_s"].to_numpy() for name in ("arrival", "first_token", "finished"))
    more = requests["output_tokens"].to_numpy() - 1.0
    tpot = np.where(more > 0, (end - first) / np.where(more > 0, more, 1.0), np.nan)
    return {"ttft_ms": (first - arrival) / MS, "tpot_ms": tpot / MS, "e2e_ms": (end - arrival) / MS}


def _row(done: Replay, i: int, row: Case | str, policies: list[str]) -> dict[str, object]:
    """One plan's line of the table."""
    if isinstance(row, str) or done.simulation is None:
        return {"feasible": False, "reason": row}
    place = int(done.simulated[i])
    if not done.simulation.fits[place]:
        return {"feasible": False, "reason": _refusal(done, place)}
    n, gpus = int(done.replicas[place]), row.plan["tp"] * row.plan["pp"] * row.plan["attention_dp"] * row.plan["cp"]
    requests = done.requests(i)
    line: dict[str, object] = {}
    for name in LATENCIES:
        values = requests[f"{name}_ms"].dropna().to_numpy()
        shown = np.percentile(values, PERCENTILES) if len(values) else np.full(len(PERCENTILES), np.nan)
        line[f"{name}_ms"] = values.mean() if len(values) else np.nan
        line |= {f"{name}_p{p}_ms": x for p, x in zip(PERCENTILES, shown, strict=True)}
    totals = jax.tree.map(lambda x: float(x[place]), done.simulation.totals)
    output = float(requests["output_tokens"].sum())
    met = attained(requests, done.targets)
    return line | {
        "attainment": np.nan if met is None else met.mean(),
        "requests_s": n * len(requests) / totals.seconds,
        "output_tok_s": n * output / totals.seconds,
        "output_tok_s_gpu": output / totals.seconds / gpus,
        "tok_s_user": 1.0 / (float(str(line["tpot_ms"])) * MS) if np.isfinite(float(str(line["tpot_ms"]))) else np.nan,
        "gpus": gpus * n,
        "policy": policies[place],
        "mean_queue": totals.queue,
        "most_queue": totals.most_queue,
        "most_waiting": totals.most_waiting,
        "mean_decoding": totals.decoding,
        "mean_kv_share": totals.kv_share,
        "most_kv_share": totals.most_kv_share,
        "drain_s": totals.seconds - float(requests["arrival_s"].iloc[-1]),
        "feasible": True,
        "reason": "",
    }


def attained(requests: pd.DataFrame, targets: tuple[float | None, float | None]) -> Array | None:
    """Which requests meet both targets (ms); None where there are none. A single token has no TPOT to miss."""
    ttft, tpot = targets
    if ttft is None and tpot is None:
        return None
    met = np.ones(len(requests), bool)
    if ttft is not None:
        met &= requests["ttft_ms"].to_numpy() <= ttft
    if tpot is not None:
        met &= ~(requests["tpot_ms"].to_numpy() > tpot)
    return met


def _refusal(done: Replay, place: int) -> str:
    assert done.simulation is not None
    space = float(done.simulation.capacity[place])
    if space <= 0:
        return "the weights leave no room for a KV cache"
    longest = float((done.trace.input_tokens + done.trace.output_tokens).max())
    return f"a request of the trace (up to {longest:,.0f} tokens) does not fit in {space / GIB:.1f} GiB of KV space"


def _ranking(frame: pd.DataFrame, simulated: Array, targets: bool) -> Array:
    """With targets: most attainment (all above 99% are alike), then the fewest GPUs; then the least mean latency."""
    able = np.flatnonzero(simulated >= 0)
    some = frame.iloc[able]
    met = -np.minimum(some["attainment"].astype(float).to_numpy(), 0.99) if targets else np.zeros(len(able))
    gpus = some["gpus"].astype(float).to_numpy() if targets else np.zeros(len(able))
    return able[np.lexsort((some["e2e_ms"].astype(float).to_numpy(), gpus, met))]


__all__ = ["AUTO", "COLUMNS", "Replay", "attained", "replay", "shape_trace"]
