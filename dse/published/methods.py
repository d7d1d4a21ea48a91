"""Each published method as a table reader: columns -> typed cases -> columns, in the units of its own tables."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from types import MappingProxyType, SimpleNamespace
from typing import Any

import jax
import numpy as np

from dse.batches import at_rows, in_blocks
from dse.cost.types import Architecture
from dse.errors import InputError, unknown
from dse.numerics import pick
from dse.published import corrected_roofline as cr
from dse.published import distserve as ds
from dse.published import modelmeter as mm
from dse.published import shallowsim as ss
from dse.published import shallowsim_gpus as gpus
from dse.published.cells import Array, Cells, looked_up
from dse.published.placement import LAYERS, capacity_tokens
from dse.published.rows import over_rows
from dse.units import GB, MS, TERA, US

Columns = dict[str, Array]
Find = Callable[[str], Architecture] | None
BLOCK = 65_536  # rows a call
_DEEPSEEK = re.compile(
    r"deepseek[-_ ]?(v3(\.1)?|r1)([-_ ](\d{4}|base|terminus|bf16|fp8|nvfp4|fp4|instruct|chat|turbo))*", re.IGNORECASE
)


def _priced(function: Callable[..., Any], rows: int, *trees: Any) -> Any:
    """`function` of batches of so many rows, in float64; of none the result's structure."""
    if rows == 0:
        return at_rows(_priced(function, 1, *jax.tree.map(lambda leaf: np.ones(1), trees)), slice(0))
    with jax.enable_x64(True):
        return in_blocks(function, *trees, block=BLOCK)


def _usable(cells: Cells, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, float)[cells.usable], tree)


def _deepseek(cells: Cells, method: str) -> None:
    names = cells.text("model")
    bad = np.array([bool(n) and not _DEEPSEEK.fullmatch(n.rstrip("/").split("/")[-1]) for n in names], bool)
    cells.refuse(bad, lambda i: f"model: {names[i]!r} is outside the method: {method} knows DeepSeek-V3/R1 only")


# ----------------------------------------------------------------------------------------------- ShallowSim


def _gpu(cells: Cells, needed: tuple[str, ...]) -> gpus.Gpu:
    """The row's own hardware columns; a named GPU of the published tables fills those that are missing.

    A name that is not in the tables is a GPU of one's own where all its numbers are given, else a reason.
    """
    names = cells.text("gpu")
    known, why = looked_up(names, gpus.gpu, gpus.FIELDS)
    given = np.all([cells.text(field) != "" for field in needed], axis=0)
    cells.refuse((why != "") & ~given, lambda i: why[i])
    cells.refuse((names == "") & ~given, f"gpu: is empty, and not all of {', '.join(needed)} are given")
    positive = set(gpus.FIELDS) - {"comm_sm", "fp4_tflops"}
    numbers = {
        field: cells.number(field, default=known[field], above=field in positive)
        if field in needed
        else np.ones(cells.n)
        for field in gpus.FIELDS
    }
    cells.refuse(
        numbers["comm_sm"] >= numbers["sm"],
        lambda i: f"comm_sm: {numbers['comm_sm'][i]:g} leaves none of {numbers['sm'][i]:g} SMs",
    )
    cells.refuse(numbers["gpu_per_node"] < 1, "gpu_per_node: must be 1 or more")
    return gpus.Gpu(**numbers, h20=np.array([gpus.named_h20(name) for name in names]))


def shallowsim_prefill(cells: Cells, find: Find) -> Columns:
    _deepseek(cells, "ShallowSim")
    gpu = _gpu(cells, tuple(f for f in gpus.FIELDS if f != "mem_GB"))
    case = ss.PrefillCase(
        seq_len=cells.number("seq_len", above=True),
        kv_cache_rate=cells.number("kv_cache_rate", high=1.0),
        tp=cells.number("tp", low=1.0, whole=True),
        dp=cells.number("dp", low=1.0, whole=True),
        discount_rate=cells.number("discount_rate", default=0.85, high=1.0, above=True),
    )
    return _run(cells, ss.prefill, gpu, case)


def shallowsim_decode(cells: Cells, find: Find) -> Columns:
    _deepseek(cells, "ShallowSim")
    gpu = _gpu(cells, gpus.FIELDS)
    case = ss.DecodeCase(
        seq_len=cells.number("seq_len", above=True),
        decode_len=cells.number("decode_len"),
        BatchSize=cells.number("BatchSize", above=True),
        TP=cells.number("TP", low=1.0, whole=True),
        EP=cells.number("EP", low=1.0, whole=True),
        fp8_combine=cells.flag("fp8_combine"),
        mbs=cells.number("mbs", default=2.0, low=1.0, whole=True),
        discount_rate=cells.number("discount_rate", default=0.85, high=1.0, above=True),
    )
    return _run(cells, ss.decode, gpu, case)


def _run(cells: Cells, function: Callable[..., Any], *trees: Any) -> Columns:
    """Columns of the usable rows, named after the result's fields."""
    table = _priced(function, int(cells.usable.sum()), *(_usable(cells, tree) for tree in trees))
    return {field.name: getattr(table, field.name) for field in fields(table)}


# ----------------------------------------------------------------------------------------------- ModelMeter

STRATEGIES = ("dp_ep", "sp_ep", "dp", "ep", "attention_sp", "ffn_sp")
# FP32 rates, dense, TFLOP/s: NVIDIA H100/H200 (67), H20 (44), HGX B200 (600 of 8), GB200 NVL72 (5760 of 72), AMD MI300X
_CUDA = MappingProxyType(
    {"H800": 67, "H200": 67, "H20": 44, "H20-3E": 44, "DGX-B200": 75, "GB200-NVL72": 80, "MI300X": 163.4}
)
_MACHINE = ("tensor_tflops", "cuda_tflops", "io_tbs", "link", "network", "node")


def _machine(name: str) -> Any:
    """ShallowSim's numbers of a GPU in ModelMeter's terms."""
    gpu = gpus.gpu(name)
    own = next(n for n, g in gpus.GPUS.items() if g is gpu)
    values = (
        gpu.fp8_tflops,
        _CUDA.get(own, np.nan),
        gpu.mem_bw_GBs / 1e3,
        gpu.nvlink_GBs,
        gpu.pcie_GBs,
        gpu.gpu_per_node,
    )
    return SimpleNamespace(**dict(zip(_MACHINE, values, strict=True)))


def modelmeter(cells: Cells, find: Find) -> Columns:
    """Whole models (dp_ep, sp_ep) of `seq_len`, or single groups whose work the row gives."""
    strategy = np.where((text := cells.text("strategy")) == "", "dp_ep", text)
    cells.refuse(
        ~np.isin(strategy, STRATEGIES), lambda i: f"strategy: {strategy[i]!r} (allowed: {', '.join(STRATEGIES)})"
    )
    _deepseek(cells, "ModelMeter")
    whole = np.isin(strategy, STRATEGIES[:2])
    if whole.any() and not (cells.has("seq_len") or cells.has("isl")):
        raise InputError(f"{cells.where}: column seq_len missing (required by dp_ep and sp_ep)")
    devices = cells.number("devices", low=1.0, whole=True)
    known, why = looked_up(cells.text("gpu"), _machine, _MACHINE)
    cells.refuse(why != "", lambda i: why[i])
    link = np.where(devices <= known["node"], known["link"], known["network"])
    machine = mm.Machine(
        tensor=cells.number("tensor_tflops", default=known["tensor_tflops"], above=True),
        cuda=cells.number("cuda_tflops", default=known["cuda_tflops"], above=True),
        io=cells.number("io_tbs", default=known["io_tbs"], above=True),
        p2p=cells.number("p2p_gbs", default=link, above=True),
        bisection=cells.number("bisection_gbs", default=link * np.maximum(devices / 2.0, 1.0), above=True),
    )
    chosen = {"default": np.where(whole, np.nan, 1.0)}  # required by whole models only
    case = mm.Case(
        seq_len=cells.number("seq_len", "isl", **chosen, above=True),  # type: ignore[arg-type]
        batch=cells.number("batch", default=1.0, above=True),
        devices=devices,
        chunk=cells.number("chunk", default=32768.0, above=True),
        weight_bits=cells.number("weight_bits", default=8.0, above=True),
        act_bits=cells.number("act_bits", default=16.0, above=True),
        kv_bits=cells.number("kv_bits", default=16.0, above=True),
        cast_bytes=cells.number("cast_bytes", default=1.0),
        gather_bytes=cells.number("gather_bytes", default=2.0),
        capacity_factor=cells.number("capacity_factor", default=1.0, above=True),
    )
    work, flash = (
        mm.Stats(
            tensor=cells.number(f"{part}tensor_work_tflop", default=0.0),
            cuda=cells.number(f"{part}cuda_work_tflop", default=0.0),
            io=cells.number(f"{part}io_work_tb", default=0.0),
            comm=cells.number(f"{part}comm_work_gb", default=0.0),
        )
        for part in ("", "flash_")
    )
    code = np.array([STRATEGIES.index(s) if s in STRATEGIES else 0 for s in strategy], float)
    return _run(cells, over_rows(_modelmeter_one), case, machine, work, flash, code)


def _modelmeter_one(case: mm.Case, machine: mm.Machine, work: mm.Stats, flash: mm.Stats, code: Any) -> Any:
    """All six strategies, then the row's own."""
    n = case.devices
    zero = mm.Cost()
    alone = [
        mm.dp(work, machine, n, case.batch),
        mm.ep(work, machine, n),
        mm.attention_sp(work, flash, machine, n),
        mm.ffn_sp(work, machine, n),
    ]
    costs = [mm.dp_ep(case, machine), mm.sp_ep(case, machine)]
    costs += [mm.ModelCost(attention=cost, ffn=zero, moe=zero) for cost in alone]
    chosen: mm.ModelCost = jax.tree.map(lambda *leaves: pick(code, list(leaves)), *costs)
    return ModelMeterTable(
        **{name.name: chosen.summed(name.name) for name in fields(mm.Cost)},
        attention_cost=chosen.attention.total_cost,
        ffn_cost=chosen.ffn.total_cost,
        moe_cost=chosen.moe.total_cost,
    )


@mm.pytree
class ModelMeterTable:
    """Seconds. For single groups the last three are the group's own, 0 and 0."""

    tensor_cost: Any
    cuda_cost: Any
    io_cost: Any
    com_cost: Any
    total_cost: Any
    sp_com_cost: Any
    flashatten_cost: Any
    attention_cost: Any
    ffn_cost: Any
    moe_cost: Any


# --------------------------------------------------------------------------------------- corrected roofline

_H100 = cr.Peak(flops=989.5, bandwidth=3350.0)  # TFLOP/s bf16, GB/s: the worked figures' hardware
_SHAPE = tuple(f.name for f in fields(cr.Shape) if f.name not in ("weight_bytes", "kv_bytes"))

_NEEDED = ("hidden", "heads", "kv_heads", "head_dim")  # of a model given by columns; the rest default to 0


def _peak(name: str) -> cr.Peak:
    if name.lower().startswith("h100"):
        return _H100
    gpu = gpus.gpu(name)
    return cr.Peak(flops=gpu.fp16_tflops, bandwidth=gpu.mem_bw_GBs)


def _shape(name: str, find: Find) -> cr.Shape:
    if name in cr.SHAPES or find is None:
        if name not in cr.SHAPES:
            raise unknown("model", name, cr.SHAPES, remedy="or give its shape in the row: " + ", ".join(_SHAPE))
        return cr.SHAPES[name]
    return cr.shape_of(find(name))


def corrected_roofline(cells: Cells, find: Find) -> Columns:
    names = cells.text("model")
    known, why = looked_up(names, lambda name: _shape(name, find), _SHAPE)
    cells.refuse(why != "", lambda i: why[i])
    peaks, no_gpu = looked_up(np.where((text := cells.text("gpu")) == "", "h100", text), _peak, ("flops", "bandwidth"))
    own_peak = (cells.text("peak_tflops") != "") & (cells.text("bandwidth_gbs") != "")
    cells.refuse((no_gpu != "") & ~own_peak, lambda i: no_gpu[i])
    shape = {
        f: cells.number(f, default=np.where((names == "") & (f not in _NEEDED), 0.0, known[f]), above=f in _NEEDED)
        for f in _SHAPE
    }
    cells.refuse(shape["dense_layers"] + shape["moe_layers"] < 1, "dense_layers and moe_layers: no layer at all")
    amounts = {
        f: cells.number(f, default=0.0)
        for f in ("prefill_requests", "prefill_tokens", "prefill_cached", "decode_requests", "decode_context")
    }
    step = cr.step_of(*amounts.values())
    betas = [f.name for f in fields(cr.Beta)]
    beta = {
        name: cells.number(f"beta{i}", default=float(i < 6)) * (1.0 if i < 6 else US)
        for i, name in enumerate(betas, start=1)
    }
    alpha = {f.name: cells.number(f"alpha{i}", default=0.0) * US for i, f in enumerate(fields(cr.Alpha))}
    outside = np.asarray(cr.request_overhead(cr.Alpha(**alpha), cells.number("output_tokens", default=0.0)))
    peak = cr.Peak(
        flops=cells.number("peak_tflops", default=peaks["flops"], above=True) * TERA,
        bandwidth=cells.number("bandwidth_gbs", default=peaks["bandwidth"], above=True) * GB,
    )
    inputs = (
        cr.Shape(
            **shape,
            weight_bytes=cells.number("weight_bytes", default=2.0, above=True),
            kv_bytes=cells.number("kv_bytes", default=2.0, above=True),
        ),
        cells.number("tp", default=1.0, low=1.0, whole=True),
        peak,
        step,
        cr.Beta(**beta),
    )
    features, seconds = _priced(cr.evaluate, int(cells.usable.sum()), *(_usable(cells, tree) for tree in inputs))
    timed = [f.name for f in fields(features) if f.name != "requests"]
    return {
        **{f"{name}_us": getattr(features, name) / US for name in timed},
        "num_requests": features.requests,
        "step_us": seconds / US,
        "request_overhead_us": outside[cells.usable] / US,
    }


# ------------------------------------------------------------------------------------------------ DistServe


def distserve(cells: Cells, find: Find) -> Columns:
    names = cells.text("model")
    other = np.array([bool(n) and n.split("/")[-1].lower() != "opt-13b" for n in names], bool)
    cells.refuse(other, lambda i: f"model: {names[i]!r} is outside the method: it was profiled with OPT-13B only")
    pps = tuple(float(n) for n in range(1, LAYERS + 1) if LAYERS % n == 0)
    tp_p, pp_p, tp_d, pp_d = (
        cells.number(f"{kind}_{phase}", default=1.0, allowed=ds.TPS if kind == "tp" else pps)
        for phase in ("prefill", "decode")
        for kind in ("tp", "pp")
    )
    isl, osl = cells.number("isl", above=True), cells.number("osl", default=1.0, low=1.0)
    rate = cells.number("rate", default=0.0)
    batch = cells.number("batch", default=-1.0, low=-1.0)
    context = cells.number("context", default=isl + 0.5 * osl)
    cells.refuse((batch < 0) & (batch != -1.0), lambda i: f"batch: {batch[i]:g} is out of range (allowed: from 0)")
    case = ds.Case(tp_prefill=tp_p, pp_prefill=pp_p, tp_decode=tp_d, pp_decode=pp_d, isl=isl, osl=osl, rate=rate)
    usable, rows = cells.usable, int(cells.usable.sum())
    served: ds.Served = _priced(ds.serve, rows, _usable(cells, case))
    asked, per_request, tp, pp = _usable(cells, (batch, context, tp_d, pp_d))
    running = np.where(asked >= 0, asked, served.batch / pp)
    finite = np.isfinite(running)
    step = _priced(over_rows(_decode_one), rows, np.where(finite, running, 0.0), per_request, tp, pp)
    for i, row in enumerate(np.nonzero(usable)[0]):
        if not served.stable[i]:
            cells.notes[row] = _unstable(float(served.utilisation[i]), float(rate[row]))
    return {
        "gpus": served.gpus,
        "rate_per_gpu": served.rate_per_gpu,
        "prefill_ms": served.prefill / MS,
        "prefill_utilisation": served.utilisation,
        "ttft_ms": served.ttft / MS,
        "decode_batch": running,
        "decode_ms": np.where(finite, step, np.inf) / MS,
        "tpot_ms": served.tpot / MS,
        "l_m_tokens": np.asarray(capacity_tokens((tp_p * pp_p)[usable])),
        "stable": served.stable.astype(bool),
    }


def _decode_one(batch: Any, context: Any, tp: Any, pp: Any) -> Any:
    return ds.decode_stage(batch, batch * context, tp, pp)


def _unstable(busy: float, rate: float) -> str:
    if busy >= 1.0:
        return f"unstable: prefill has no steady state at {rate:g} requests/s (R D = {busy:.3g}, must be under 1)"
    return f"unstable: decode has no steady state at {rate:g} requests/s (they come faster than any batch finishes)"


METHODS: MappingProxyType[str, Callable[[Cells, Find], Columns]] = MappingProxyType(
    {
        "shallowsim-prefill": shallowsim_prefill,
        "shallowsim-decode": shallowsim_decode,
        "modelmeter": modelmeter,
        "corrected-roofline": corrected_roofline,
        "distserve": distserve,
    }
)
