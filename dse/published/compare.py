"""What each published method thinks the time of one DeepSeek-V3/R1 deployment is made of: seconds by part.

The same plain numbers go to every method. Prefill: each of `dp` attention ranks prefills one prompt of `isl` tokens.
Decode: each GPU of the ranks holds `batch` requests at `context`. Parts of one method sum to its total.
"""

from __future__ import annotations

from types import MappingProxyType

import jax
import jax.numpy as jnp

from dse.cost.coefficients import Coefficients
from dse.cost.types import Number, Topology, pytree, replace
from dse.published import corrected_roofline as cr
from dse.published import modelmeter as mm
from dse.published import shallowsim as ss
from dse.published.deepseek import DENSE_LAYERS, LAYERS, MOE_LAYERS
from dse.published.rows import over_rows
from dse.published.shallowsim_gpus import Gpu
from dse.units import GB, MS, TERA

Parts = dict[str, Number]


@pytree
class Deployment:
    """A DeepSeek-V3/R1 case as numbers. `gpu`: ShallowSim's row; the rest of the hardware is ModelMeter's."""

    isl: Number
    context: Number
    batch: Number
    tp: Number
    dp: Number
    ep: Number
    gpu: Gpu
    cuda_tflops: Number = 67.0
    p2p_gbs: Number = 450.0
    bisection_gbs: Number = 1800.0
    cached: Number = 0.0  # share of the prompt
    chunk: Number = 32768.0
    discount: Number = 0.85  # ShallowSim's eta
    weight_bytes: Number = 1.0
    kv_bytes: Number = 1.0


def shallowsim_prefill(x: Deployment) -> Parts:
    """`attention` holds the TP all-reduce; `exchange` is the exposed part of the all-to-alls only."""
    t = ss.prefill_one(
        x.gpu, ss.PrefillCase(seq_len=x.isl, kv_cache_rate=x.cached, tp=x.tp, dp=x.dp, discount_rate=x.discount)
    )
    return {
        "attention": (DENSE_LAYERS * t.MLA + MOE_LAYERS * t.TP_MLA) * MS,
        "dense FFN": DENSE_LAYERS * t.DenseMLP * MS,
        "shared expert": MOE_LAYERS * t.SharedExpert * MS,
        "routed experts": MOE_LAYERS * t.RoutedExpert * MS,
        "exchange": MOE_LAYERS * (jnp.maximum(t.Overlap1, 0.0) + jnp.maximum(t.Overlap2, 0.0)) * MS,
    }


def shallowsim_decode(x: Deployment) -> Parts:
    """`exchange` is the exposed part only."""
    case = ss.DecodeCase(
        seq_len=x.context,
        decode_len=jnp.zeros_like(x.context),
        BatchSize=x.batch,
        TP=x.tp,
        EP=x.ep,
        discount_rate=x.discount,
    )
    t = ss.decode_one(x.gpu, case)
    return {
        "attention": (DENSE_LAYERS * t.DenseMLA + MOE_LAYERS * t.SparseMLA - LAYERS * t.LoadKV) * MS,
        "KV cache": LAYERS * t.LoadKV * MS,
        "dense FFN": DENSE_LAYERS * t.DenseMLP * MS,
        "shared expert": MOE_LAYERS * t.SharedExpert * MS,
        "routed experts": MOE_LAYERS * t.RoutedExpert * MS,
        "exchange": MOE_LAYERS * jnp.maximum(t.Delta, 0.0) * MS,
    }


def _modelmeter_inputs(x: Deployment) -> tuple[mm.Case, mm.Machine]:
    """tp x dp devices prefill dp prompts, at 100% of the hardware's peak."""
    case = mm.Case(
        seq_len=x.isl * (1.0 - x.cached),
        batch=x.dp,
        devices=x.tp * x.dp,
        chunk=x.chunk,
        weight_bits=8.0 * x.weight_bytes,
        kv_bits=8.0 * x.kv_bytes,
    )
    machine = mm.Machine(
        tensor=x.gpu.fp8_tflops,
        cuda=x.cuda_tflops,
        io=x.gpu.mem_bw_GBs / 1e3,
        p2p=x.p2p_gbs,
        bisection=x.bisection_gbs,
    )
    return case, machine


def modelmeter_parts(cost: mm.ModelCost) -> Parts:
    """By group; the exposed part of the sequence exchange, and the all-to-all, which nothing hides, apart."""
    exposed = jnp.maximum(cost.attention.sp_com_cost - cost.attention.flashatten_cost, 0.0)
    return {
        "attention": cost.attention.total_cost - exposed,
        "dense FFN": cost.ffn.total_cost,
        "experts": cost.moe.total_cost - cost.moe.com_cost,
        "sequence exchange": exposed,
        "exchange": cost.moe.com_cost,
    }


def modelmeter_dp_ep(x: Deployment) -> Parts:
    return modelmeter_parts(mm.dp_ep(*_modelmeter_inputs(x)))


def modelmeter_sp_ep(x: Deployment) -> Parts:
    return modelmeter_parts(mm.sp_ep(*_modelmeter_inputs(x)))


def _roofline(x: Deployment, step: cr.Step) -> Parts:
    shape = replace(cr.SHAPES["DeepSeek-V3"], weight_bytes=x.weight_bytes, kv_bytes=x.kv_bytes)
    peak = cr.Peak(flops=x.gpu.fp16_tflops * TERA, bandwidth=x.gpu.mem_bw_GBs * GB)
    prefill, decode, static, moe, reduce, _, _ = cr.terms(cr.features_one(shape, x.tp, peak, step))
    return {
        "compute or KV": prefill + decode,
        "static weights": static,
        "expert weights": moe,
        "all-reduce": reduce,
    }


def roofline_prefill(x: Deployment) -> Parts:
    """One TP group with all experts: the method has no EP."""
    new = x.isl * (1.0 - x.cached)
    return _roofline(x, cr.step_of(jnp.ones_like(new), new, x.isl - new, jnp.zeros_like(new), jnp.zeros_like(new)))


def roofline_decode(x: Deployment) -> Parts:
    """One TP group with all experts: the method has no EP; `batch` requests a GPU, as in ShallowSim."""
    zero = jnp.zeros_like(x.batch)
    return _roofline(x, cr.step_of(zero, zero, zero, x.batch * x.tp, x.context))


PREFILL = MappingProxyType(
    {
        "shallowsim-prefill": shallowsim_prefill,
        "modelmeter dp_ep": modelmeter_dp_ep,
        "modelmeter sp_ep": modelmeter_sp_ep,
        "corrected-roofline": roofline_prefill,
    }
)
DECODE = MappingProxyType({"shallowsim-decode": shallowsim_decode, "corrected-roofline": roofline_decode})

# Every part, in the order in which a breakdown is drawn
PARTS = (
    *("attention", "compute or KV", "KV cache", "dense FFN", "static weights", "shared expert", "routed experts"),
    *("experts", "expert weights", "all-reduce", "sequence exchange", "exchange"),
)

# Why a method differs from the others, for the reader of a comparison
REASONS = MappingProxyType(
    {
        "shallowsim-prefill": "attention is full, not causal; weights are loaded after, not under, the compute; all "
        "rates are at 85% of the peak, without the SMs that communicate",
        "shallowsim-decode": "expert GEMMs run at 5-70% of the peak by a step table (H200 gets the H20's); weights are "
        "loaded after, not under, the compute; exchanges hide behind attention and the shared expert",
        "modelmeter dp_ep": "100% of every peak; one bandwidth for the whole network and nothing hides the all-to-all; "
        "attention of fewer prompts than GPUs leaves GPUs idle",
        "modelmeter sp_ep": "100% of every peak; one bandwidth for the whole network and nothing hides the all-to-all; "
        "one prompt is split over all GPUs",
        "corrected-roofline": "100% of the 16-bit peak before its betas are fitted; no expert parallelism: the experts "
        "of all layers are read by one TP group; compute and weight reads are added",
    }
)


def breakdowns(cases: Deployment, phase: str = "prefill") -> dict[str, Parts]:
    """Method -> part -> seconds, of a batch: every leaf of `cases` has one leading axis. `phase`: prefill or decode."""
    methods = PREFILL if phase == "prefill" else DECODE
    found = {name: over_rows(parts)(cases) for name, parts in methods.items()}
    return {name: {part: parts[part] for part in PARTS if part in parts} for name, parts in found.items()}


def total(parts: Parts) -> Number:
    """Seconds of a breakdown."""
    result: Number = 0.0
    for value in parts.values():
        result = result + value
    return result


def curve(lengths: Number, x: mm.Case, machine: mm.Machine, strategy: str = "dp_ep") -> Parts:
    """ModelMeter's parts against sequence length: `x` and `machine` are single, the result has the lengths' axis."""
    rows = jnp.shape(lengths)
    cases, machines = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, rows), (x, machine))
    cost = {"dp_ep": mm.dp_ep_batch, "sp_ep": mm.sp_ep_batch}[strategy](replace(cases, seq_len=lengths), machines)
    return modelmeter_parts(cost)


# ---------------------------------------------------------------- one bandwidth against a network of levels


@pytree
class Networks:
    """ModelMeter's prefill under its collapsed network and under the hierarchical one, seconds."""

    collapsed: mm.ModelCost
    hierarchical: mm.ModelCost
    p2p_gbs: Number
    bisection_gbs: Number


def networks(
    x: mm.Case, machine: mm.Machine, topology: Topology, c: Coefficients, strategy: str = "dp_ep", dispatch: float = 0.0
) -> Networks:
    """One case both ways: the machine's two bandwidths are what one would collapse this topology to at N devices."""
    p2p, bisection = mm.collapsed(topology, x.devices)
    one = replace(machine, p2p=p2p, bisection=bisection)
    model = {"dp_ep": mm.dp_ep, "sp_ep": mm.sp_ep}[strategy]
    return Networks(
        collapsed=model(x, one),
        hierarchical=model(x, one, mm.com_seconds(x, topology, c, dispatch)),
        p2p_gbs=p2p,
        bisection_gbs=bisection,
    )
