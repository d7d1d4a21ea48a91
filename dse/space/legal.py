"""The legal designs of a space, found axis by axis, with a count of everything that was cut and why.

The raw product may be far beyond memory: a table of legal prefixes is crossed with one axis at a time, each cut prefix
standing for all the points that would have followed it. So `enumerated = legal + sum(cuts)` holds exactly, in integers.
Values that cannot matter (a dispatch rule without an all-to-all) are folded to one, and their copies counted as cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dse.cost.types import CP_METHODS, DISPATCHES, OVERLAPS
from dse.errors import InputError
from dse.space.facts import Facts

MOST_DESIGNS = 4_000_000
_MOST_CELLS = 2_000_000_000  # prefixes x values that an axis may be judged on
_TOO_MANY = (
    f"more than {MOST_DESIGNS} legal plans even before the load axes; give fewer values to the axes that multiply them"
    " (GPU counts, degrees, precisions, overlap rules)"
)
_BLOCK = 2_000_000  # cells of a prefix x value table that are judged at once

Array = np.ndarray
Columns = dict[str, Array]
# What a judge says of (prefixes x values): reasons in order of precedence, and what the value becomes in each prefix.
Verdict = tuple[list[tuple[str, Array]], dict[str, Array]]

CUT_CLUSTER = "more GPUs than the cluster has"
CUT_CONTEXT = "prompt and answer longer than the model's context"
CUT_LAYERS = "pp does not divide the layers"
CUT_HEADS = "tp does not divide heads, KV heads or FFN width"
CUT_REPLICA = "tp*attention_dp*cp*pp does not divide the GPUs"
CUT_DENSE_DP = "attention_dp > 1 without experts is the same as dp"
CUT_DENSE_MOE = "ep and moe_tp do not matter without experts"
CUT_EXPERTS = "ep does not divide the experts"
CUT_WIDTH = "moe_tp does not divide the expert width"
CUT_STAGE = "tp*attention_dp*cp is not ep*moe_tp"
CUT_DP = "dp replicas do not use the GPUs exactly"
CUT_FORMAT = "the same number formats as another value"
CUT_OVERLAP = "overlap rule that does not matter here"
CUT_DISPATCH = "dispatch rule that does not matter here"
CUT_EPLB = "eplb_replicas do not fill the ranks evenly"
CUT_NO_EPLB = "eplb_replicas do not matter without ep"
CUT_ULYSSES = "ulysses needs tp*cp within the KV heads"
CUT_CP_METHOD = "cp_method does not matter without cp"
CUT_SP = "sequence_parallel does not matter without tp"
CUT_MICRO = "microbatches that do not matter here"
CUT_DRAFT = "draft_tp is neither 1 nor the target's tp"
CUT_DRAFT_TP = "draft_tp that is another's, or of no draft model"


@dataclass(frozen=True)
class Axis:
    """One axis: `size` raw values, and the judge of what each becomes after a legal prefix."""

    name: str
    size: int
    judge: Callable[[Columns], Verdict]


@dataclass
class Enumeration:
    """Legal designs as columns, and the count of raw ones and of those cut by reason."""

    columns: Columns
    enumerated: int
    cuts: dict[str, int] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True)
class Degrees:
    """Values of the parallel axes; None: derived from the others."""

    gpus: Array
    tp: Array
    pp: Array
    attention_dp: Array
    cp: Array
    moe_ep: Array | None
    moe_tp: Array | None
    replicas: Array | None


@dataclass(frozen=True)
class Rules:
    """Values of the other axes, as codes; `formats` are all (weights, activations, kv) triples of indices."""

    formats: Array  # (combinations, 3)
    format_rows: Array  # (models, machines, combinations) row of the precision table; -1: a copy of an earlier one
    overlaps: Array  # (rules, 2): prefill, decode
    dispatch: Array
    eplb_replicas: Array
    cp_method: Array
    sequence_parallel: Array
    microbatches: Array
    utilisation: Array
    draft_model: Array
    draft_over: Array  # (models, draft models, target's tp): TP of a draft model that is shared out; 0: none drafts
    draft_tp: Array  # 0: shared out


def enumerate_designs(
    facts: Facts, sizes: Array, fits: Array, degrees: Degrees, rules: Rules, uneven: bool
) -> Enumeration:
    """All legal designs. `sizes`: GPUs of each machine; `fits`: models whose context holds the workloads."""
    axes = [*_parallel_axes(facts, sizes, fits, degrees, uneven), *_rule_axes(facts, rules)]
    left = 1
    for axis in axes:
        left *= axis.size
    result = Enumeration(columns={}, enumerated=left)
    rows = 1
    for axis in axes:
        left //= axis.size
        result.columns, rows = _join(result, rows, axis, left)
        if not rows:
            break  # nothing is legal: the caller says why, from the cuts
    result.size = rows
    return result


def _join(table: Enumeration, rows: int, axis: Axis, left: int) -> tuple[Columns, int]:
    """Cross the table with one axis and keep what is legal; each cut cell stands for `left` points."""
    if rows * axis.size > _MOST_CELLS:
        raise InputError(f"axes.{axis.name}: {_TOO_MANY}")
    block = max(1, _BLOCK // axis.size)
    parts: list[tuple[Array, Columns]] = []
    kept = 0
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        prefix = {name: column[start:stop].astype(np.int64) for name, column in table.columns.items()}
        reasons, values = axis.judge(prefix)
        bad = np.zeros((stop - start, axis.size), bool)
        for reason, mask in reasons:
            count = int(np.count_nonzero(mask & ~bad))
            if count:
                table.cuts[reason] = table.cuts.get(reason, 0) + count * left
            bad |= mask
        row, column = np.nonzero(~bad)
        kept += len(row)
        if kept > MOST_DESIGNS:
            raise InputError(f"axes.{axis.name}: {_TOO_MANY}")
        parts.append((row + start, {n: _narrow(np.broadcast_to(x, bad.shape)[row, column]) for n, x in values.items()}))
    taken = np.concatenate([row for row, _ in parts])
    columns = {name: old[taken] for name, old in table.columns.items()}
    for name in parts[0][1]:
        columns[name] = np.concatenate([new[name] for _, new in parts])
    return columns, kept


def _narrow(values: Array) -> Array:
    return values.astype(np.int32 if values.dtype.kind in "iub" else np.float64)


def _keep_first(values: Array) -> Array:
    """(prefixes, values): True where an earlier value of the row is equal."""
    order = np.argsort(values, axis=1, kind="stable")
    ranked = np.take_along_axis(values, order, axis=1)
    copy = np.zeros(values.shape, bool)
    copy[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    out = np.empty_like(copy)
    np.put_along_axis(out, order, copy, axis=1)
    return out


# ------------------------------------------------------------------------------------------- the degrees


def _parallel_axes(facts: Facts, sizes: Array, fits: Array, d: Degrees, uneven: bool) -> list[Axis]:
    tp_ok, pp_ok = facts.tp(d.tp), facts.pp(d.pp, uneven)

    def models(prefix: Columns) -> Verdict:
        return [(CUT_CONTEXT, ~fits[None, :])], {"model": np.arange(len(fits))[None, :]}

    def machines(prefix: Columns) -> Verdict:
        return [], {"machine": np.arange(len(sizes))[None, :]}

    def gpus(prefix: Columns) -> Verdict:
        return [(CUT_CLUSTER, d.gpus[None, :] > sizes[prefix["machine"]][:, None])], {"gpus": d.gpus[None, :]}

    def splits(
        name: str, values: Array, before: tuple[str, ...], first: Callable[[Columns], list[tuple[str, Array]]]
    ) -> Axis:
        def judge(prefix: Columns) -> Verdict:
            used = _product(prefix, before)[:, None] * values[None, :]
            return [*first(prefix), (CUT_REPLICA, prefix["gpus"][:, None] % used != 0)], {name: values[None, :]}

        return Axis(name, len(values), judge)

    def dense_dp(prefix: Columns) -> list[tuple[str, Array]]:
        return [(CUT_DENSE_DP, ~facts.moe[prefix["model"]][:, None] & (d.attention_dp[None, :] > 1))]

    return [
        Axis("model", len(fits), models),
        Axis("machine", len(sizes), machines),
        Axis("gpus", len(d.gpus), gpus),
        splits("pp", d.pp, (), lambda p: [(CUT_LAYERS, ~pp_ok[p["model"]])]),
        splits("tp", d.tp, ("pp",), lambda p: [(CUT_HEADS, ~tp_ok[p["model"]])]),
        splits("cp", d.cp, ("pp", "tp"), lambda p: []),
        splits("attention_dp", d.attention_dp, ("pp", "tp", "cp"), dense_dp),
        *_expert_axes(facts, d),
        Axis("dp", 1 if d.replicas is None else len(d.replicas), lambda p: _replicas(p, d.replicas)),
    ]


def _product(columns: Mapping[str, Array], names: Sequence[str]) -> Array:
    rows = len(next(iter(columns.values())))
    return np.prod([columns[name] for name in names], axis=0, dtype=np.int64) * np.ones(rows, np.int64)


def _stage(prefix: Columns) -> Array:
    return _product(prefix, ("tp", "attention_dp", "cp"))


def _expert_axes(facts: Facts, d: Degrees) -> list[Axis]:
    """ep, then moe_tp. One that is derived has a single raw value, whatever it comes to."""

    def dense(prefix: Columns, size: int) -> Array:
        """Without experts the first value stands for all."""
        return ~facts.moe[prefix["model"]][:, None] & (np.arange(size) > 0)[None, :]

    def ep(prefix: Columns) -> Verdict:
        moe, experts = facts.moe[prefix["model"]][:, None], facts.experts_of[prefix["model"]][:, None]
        stage = _stage(prefix)[:, None]
        if d.moe_ep is None:
            return [], {"moe_ep": np.ones_like(stage)}  # until moe_tp, which decides it
        value = np.where(moe, d.moe_ep[None, :], 1)
        reasons = [
            (CUT_DENSE_MOE, dense(prefix, len(d.moe_ep))),
            (CUT_EXPERTS, moe & (experts % value != 0)),
            (CUT_STAGE, moe & (stage % value != 0)),
        ]
        return reasons, {"moe_ep": value}

    def moe_tp(prefix: Columns) -> Verdict:
        moe = facts.moe[prefix["model"]][:, None]
        experts, width = facts.experts_of[prefix["model"]][:, None], facts.expert_width_of[prefix["model"]][:, None]
        stage = _stage(prefix)[:, None]
        if d.moe_tp is None:
            value = np.where(moe, stage // prefix["moe_ep"][:, None], 1)
            return [(CUT_WIDTH, moe & (width % value != 0))], {"moe_tp": value}
        value = np.where(moe, d.moe_tp[None, :], 1)
        split = prefix["moe_ep"][:, None] if d.moe_ep is not None else np.where(moe, np.maximum(stage // value, 1), 1)
        reasons = [
            (CUT_DENSE_MOE, dense(prefix, len(d.moe_tp))),
            (CUT_WIDTH, moe & (width % value != 0)),
            (CUT_STAGE, moe & (split * value != stage)),
            (CUT_EXPERTS, moe & (experts % split != 0)),
        ]
        return reasons, {"moe_tp": value, "moe_ep": split}

    ep_size = 1 if d.moe_ep is None else len(d.moe_ep)
    return [Axis("ep", ep_size, ep), Axis("moe_tp", 1 if d.moe_tp is None else len(d.moe_tp), moe_tp)]


def _replicas(prefix: Columns, given: Array | None) -> Verdict:
    replica = _stage(prefix)[:, None] * prefix["pp"][:, None]
    gpus = prefix["gpus"][:, None]
    if given is None:
        return [], {"replicas": gpus // replica}
    return [(CUT_DP, given[None, :] * replica != gpus)], {"replicas": given[None, :]}


# ------------------------------------------------------------------------------------------- the rules


def _rule_axes(facts: Facts, r: Rules) -> list[Axis]:
    none, auto = OVERLAPS.index("none"), DISPATCHES.index("auto")
    needs_exchange = np.isin(r.overlaps, [OVERLAPS.index("shared_expert")])
    node_dedup, node_limited = DISPATCHES.index("node_dedup"), DISPATCHES.index("node_limited")
    ulysses = CP_METHODS.index("ulysses")

    def exchange(prefix: Columns) -> Array:
        """Tokens travel to their experts only where ranks hold different tokens and different experts."""
        apart = prefix["attention_dp"] * prefix["cp"] > 1
        return (facts.moe[prefix["model"]] & apart & (prefix["moe_ep"] > 1))[:, None]

    def formats(prefix: Columns) -> Verdict:
        row = r.format_rows[prefix["model"], prefix["machine"]]
        names = ("weights", "activations", "kv")
        values = {name: r.formats[None, :, i] for i, name in enumerate(names)}
        return [(CUT_FORMAT, row < 0)], {"precision_index": row, **values}

    def overlap(prefix: Columns) -> Verdict:
        alone = (_stage(prefix) * prefix["pp"] == 1)[:, None, None]
        idle = alone | (needs_exchange[None] & ~exchange(prefix)[:, :, None])
        value = np.where(idle, none, r.overlaps[None])
        copies = _keep_first(value[:, :, 0] * len(OVERLAPS) + value[:, :, 1])
        return [(CUT_OVERLAP, copies)], {"overlap_prefill": value[:, :, 0], "overlap_decode": value[:, :, 1]}

    def dispatch(prefix: Columns) -> Verdict:
        value = np.where(exchange(prefix), r.dispatch[None, :], auto)
        limited = facts.limited[prefix["model"]][:, None] > 0
        value = np.where((value == node_limited) & ~limited, node_dedup, value)
        return [(CUT_DISPATCH, _keep_first(value))], {"dispatch": value}

    def eplb(prefix: Columns) -> Verdict:
        model, ep = prefix["model"], prefix["moe_ep"][:, None]
        value = np.where(facts.moe[model][:, None] & (ep > 1), r.eplb_replicas[None, :], 0)
        uneven = (facts.experts_of[model][:, None] + value) % ep != 0
        return [(CUT_EPLB, (value > 0) & uneven), (CUT_NO_EPLB, _keep_first(value))], {"eplb_replicas": value}

    def cp_method(prefix: Columns) -> Verdict:
        cp, kv = prefix["cp"][:, None], facts.least_kv[prefix["model"]][:, None]
        value = np.where(cp > 1, r.cp_method[None, :], 0)
        beyond = (value == ulysses) & (cp * np.minimum(prefix["tp"][:, None], kv) > kv)
        return [(CUT_ULYSSES, beyond), (CUT_CP_METHOD, _keep_first(value))], {"cp_method": value}

    def sequence_parallel(prefix: Columns) -> Verdict:
        value = np.where(prefix["tp"][:, None] > 1, r.sequence_parallel[None, :], 0)
        return [(CUT_SP, _keep_first(value))], {"sequence_parallel": value}

    def microbatches(prefix: Columns) -> Verdict:
        pp = prefix["pp"][:, None]
        value = np.where((pp == 1) | (r.microbatches[None, :] == pp), 0, r.microbatches[None, :])
        return [(CUT_MICRO, _keep_first(value))], {"microbatches": value}

    def utilisation(prefix: Columns) -> Verdict:
        return [], {"utilisation": r.utilisation[None, :]}

    def draft_model(prefix: Columns) -> Verdict:
        return [], {"draft_model": r.draft_model[None, :]}

    def draft_tp(prefix: Columns) -> Verdict:
        shared = r.draft_over[prefix["model"], prefix["draft_model"], prefix["tp"]][:, None]
        value = np.where((r.draft_tp[None, :] == 0) | (shared == 0), np.maximum(shared, 1), r.draft_tp[None, :])
        return [(CUT_DRAFT, (value != 1) & (value != shared)), (CUT_DRAFT_TP, _keep_first(value))], {"draft_tp": value}

    return [
        Axis("weights", len(r.formats), formats),
        Axis("overlap", len(r.overlaps), overlap),
        Axis("dispatch", len(r.dispatch), dispatch),
        Axis("eplb_replicas", len(r.eplb_replicas), eplb),
        Axis("cp_method", len(r.cp_method), cp_method),
        Axis("sequence_parallel", len(r.sequence_parallel), sequence_parallel),
        Axis("microbatches", len(r.microbatches), microbatches),
        Axis("utilisation", len(r.utilisation), utilisation),
        Axis("draft_model", len(r.draft_model), draft_model),
        Axis("draft_tp", len(r.draft_tp), draft_tp),
    ]


__all__ = ["MOST_DESIGNS", "Degrees", "Enumeration", "Rules", "enumerate_designs"]
