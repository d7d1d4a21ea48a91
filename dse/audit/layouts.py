"""Which divisions of the model over GPUs the written degrees may mean."""

from __future__ import annotations

import math

from dse.audit.types import Layout, WrittenPlan


def layouts(plan: WrittenPlan) -> tuple[Layout, ...]:
    """Readings of the degrees, the most faithful first. Dense models have one, MoE without attention_dp several."""
    d = plan.degrees
    tp, pp, cp, dp = (float(x or 1) for x in (d.tp, d.pp, d.cp, d.dp))
    if not is_moe(plan) or d.attention_dp is not None or d.ep is None:
        return (_plain(plan, tp, pp, cp, dp),)
    ep = float(d.ep)
    inner = float(d.moe_tp or 1)
    stage = plan.gpus / pp if plan.gpus else max(tp * cp * dp, ep * inner)
    replicas = 1.0
    if dp > 1 and stage / dp >= ep * inner:  # DP of whole replicas; otherwise it is that of attention
        stage, replicas = stage / dp, dp
    found = []
    if d.tp_internal and tp > 1 and (stage / ep).is_integer():
        name = f"EP{ep:g} with attention replicated on {stage:g} GPUs"
        found.append(Layout(name, 1.0, pp, stage, 1.0, stage / ep, ep, replicas))
    if (stage / (tp * cp)).is_integer() and (stage / ep).is_integer():
        ways = stage / (tp * cp)
        attention = "×".join(f"{n}{v:g}" for n, v in (("TP", tp), ("DP", ways)) if v > 1) or "on one GPU"
        name = f"EP{ep:g} over attention {attention} ({stage * pp * replicas:g} GPUs)"
        found.append(Layout(name, tp, pp, ways, cp, stage / ep, ep, replicas))
    if (d.tp_internal or not found) and tp > 1 and tp * ep != stage and ep > 1:
        name = f"TP{tp:g}×EP{ep:g} ({tp * ep * pp:g} GPUs)"
        found.append(Layout(name, tp, pp, ep, 1.0, tp, ep))
    return tuple(found) or (_plain(plan, tp, pp, cp, dp),)


def _plain(plan: WrittenPlan, tp: float, pp: float, cp: float, dp: float) -> Layout:
    """Degrees taken at their word; what is left of the GPUs are replicas."""
    d = plan.degrees
    ways = float(d.attention_dp or 1)
    stage = tp * ways * cp
    ep = float(d.ep or 1)
    if d.ep is None and d.moe_tp and is_moe(plan):
        ep = stage / d.moe_tp
    replicas = dp
    if d.dp is None and plan.gpus:
        replicas = float(max(1, plan.gpus // round(stage * pp)))
    parts = [("TP", tp), ("PP", pp), ("attention-DP", ways), ("CP", cp), ("EP", ep), ("replicas", replicas)]
    name = " × ".join(f"{n}{v:g}" for n, v in parts if v > 1) or "one GPU"
    return Layout(name, tp, pp, ways, cp, stage / ep, ep, replicas)


def is_moe(plan: WrittenPlan) -> bool:
    return any(f.routed is not None for f in plan.variants[0].entry.ffns)


def written_shards(plan: WrittenPlan) -> float | None:
    """Over how many GPUs the written degrees divide the KV cache; None where they do not say or say all."""
    d = plan.degrees
    if d.tp is None or d.dp is None or plan.gpus is None:
        return None
    shards = math.prod(x or 1 for x in (d.tp, d.pp, d.dp, d.cp, d.attention_dp))
    return float(shards) if shards < plan.gpus else None


__all__ = ["is_moe", "layouts", "written_shards"]
