"""ShallowSim's GPUs as its own tables have them, and the rates it makes of them.

Numbers are the published spreadsheet's, not datasheets: see `dse.catalog` for those. DGX-B300 and GB300-NVL72 stand at
8000 GB/s in the decode report; the published prefill table computes them at 9600.
"""

from __future__ import annotations

from types import MappingProxyType

import jax.numpy as jnp

from dse.cost.types import Number, pytree
from dse.errors import unknown
from dse.numerics import safe_divide
from dse.published.deepseek import EXPERT_FFN, FFN, HIDDEN, MLA_WEIGHTS
from dse.units import MIB


@pytree
class Gpu:
    """TFLOP/s, GB, GB/s a GPU. `fp4_tflops` 0: no such unit. `h20`: 1 where the name contains "H20"."""

    sm: Number
    comm_sm: Number
    fp16_tflops: Number
    fp8_tflops: Number
    fp4_tflops: Number
    mem_GB: Number
    mem_bw_GBs: Number
    nvlink_GBs: Number
    pcie_GBs: Number
    gpu_per_node: Number
    h20: Number = 0.0


FIELDS = (
    *("sm", "comm_sm", "fp16_tflops", "fp8_tflops", "fp4_tflops"),
    *("mem_GB", "mem_bw_GBs", "nvlink_GBs", "pcie_GBs", "gpu_per_node"),
)
_TABLE = {
    "DGX-B300": (160, 20, 3375, 7500, 15000, 288, 8000, 900, 100, 8),
    "DGX-B200": (160, 20, 2250, 4500, 9000, 180, 8000, 900, 100, 8),
    "GB200-NVL72": (160, 20, 2500, 5000, 10000, 192, 8000, 900, 100, 72),
    "GB300-NVL72": (160, 20, 3750, 7500, 15000, 288, 8000, 900, 100, 72),
    "Rubin-NVL144": (110, 12, 6400, 12800, 25600, 144, 6500, 900, 100, 144),
    "RubinU-NVL576": (110, 12, 6500, 13000, 26000, 256, 8000, 1350, 100, 576),
    "H800": (132, 20, 989, 1979, 0, 80, 4000, 200, 50, 8),
    "H200": (132, 20, 989, 1979, 0, 141, 4800, 450, 50, 8),
    "H20": (78, 10, 148, 296, 0, 96, 4000, 450, 50, 8),
    "H20-3E": (78, 10, 148, 296, 0, 141, 4800, 450, 50, 8),
    "MI300X": (304, 30, 1307, 2614, 0, 192, 5300, 448, 50, 8),
    "MI308X": (304, 30, 190, 380, 0, 192, 5300, 448, 50, 8),
}
_ALIASES = {
    "Rubin-NVL576": "RubinU-NVL576",
    "B300": "DGX-B300",
    "B200": "DGX-B200",
    "GB200": "GB200-NVL72",
    "GB300": "GB300-NVL72",
}


def named_h20(name: str) -> float:
    """1 where ShallowSim uses its H20 efficiency table: it asks whether "H20" is in the name, so H200 gets it too."""
    return float("H20" in name.upper())


GPUS = MappingProxyType(
    {name: Gpu(**{f: float(v) for f, v in zip(FIELDS, row)}, h20=named_h20(name)) for name, row in _TABLE.items()}
)
_BY_KEY = {key.lower().replace("_", "-"): name for key, name in {**{n: n for n in GPUS}, **_ALIASES}.items()}


def gpu(name: str) -> Gpu:
    """A GPU of the published tables by its name (any case) or alias."""
    key = str(name).strip().lower().replace("_", "-").replace(" ", "-")
    if key not in _BY_KEY:
        raise unknown("GPU", name, GPUS, remedy="or give its numbers in the row: " + ", ".join(FIELDS))
    return GPUS[_BY_KEY[key]]


@pytree
class Rates:
    """What is left after the discount: TFLOP/s (= GFLOP a ms) and GB/s."""

    fp16: Number
    fp8: Number
    fp4: Number
    best: Number  # FP4 where there is one, else FP8: what FFNs run at
    has_fp4: Number  # bool
    memory: Number
    nvlink: Number
    pcie: Number


def rates(gpu: Gpu, discount: Number, comm_sm: Number) -> Rates:
    """F = peak eta (sm - comm_sm)/sm; memory, NVLink and PCIe bandwidth times eta."""
    compute = discount * (gpu.sm - comm_sm) / gpu.sm
    has_fp4 = gpu.fp4_tflops > 0
    return Rates(
        fp16=gpu.fp16_tflops * compute,
        fp8=gpu.fp8_tflops * compute,
        fp4=gpu.fp4_tflops * compute,
        best=jnp.where(has_fp4, gpu.fp4_tflops, gpu.fp8_tflops) * compute,
        has_fp4=has_fp4,
        memory=gpu.mem_bw_GBs * discount,
        nvlink=gpu.nvlink_GBs * discount,
        pcie=gpu.pcie_GBs * discount,
    )


def mla_ms(gemm: Number, attention: Number, r: Rates) -> Number:
    """MLA of `gemm` and `attention` GFLOP, FlashMLA at 70%: FP8 GPU (gemm/F8 + attn/F16)/.7 + 178.4375/BW, FP4 GPU
    gemm/F4 + attn/(.7 F16) without the weights. 178.4375 MiB = 187 105 280 one-byte weights; MiB/(GB/s) taken as ms."""
    fp8 = (gemm / r.fp8 + attention / r.fp16) / 0.7 + MLA_MIB / r.memory
    return jnp.where(r.has_fp4, safe_divide(gemm, r.fp4) + attention / (0.7 * r.fp16), fp8)


# matrices of DeepSeek-V3 at one byte a weight
MLA_MIB = MLA_WEIGHTS / MIB
DENSE_MIB = 3.0 * HIDDEN * FFN / MIB
EXPERT_MIB = 3.0 * HIDDEN * EXPERT_FFN / MIB


def ffn_gflop(tokens: Number, width: float) -> Number:
    """6 T d f, in GFLOP."""
    return 6.0 * tokens * HIDDEN * width * 1e-9


def dense_mlp_ms(tokens: Number, r: Rates) -> Number:
    """A dense FFN layer, compute and load added (378 MiB)."""
    return ffn_gflop(tokens, FFN) / r.best + DENSE_MIB / r.memory


def tp_mla_ms(mla: Number, tokens: Number, tp: Number, r: Rates) -> Number:
    """MLA/tp + all-reduce of T d bf16 over NVLink + 15 us + 50 us; tp = 1: MLA + 50 us."""
    reduce = tokens * HIDDEN * 2.0 / MIB / r.nvlink + 0.015
    return jnp.where(tp > 1, mla / tp + reduce, mla) + 0.05
