"""Tables of single kernels for tests: cases that an operator may meet, on any GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from dse.catalog import hardware
from dse.catalog.kernel_coefficients import KERNELS
from dse.space.kernel_cases import PRECISIONS, VENDORS

OPS = tuple(KERNELS)
GPUS = [entry.name for entry in hardware.gpus() if entry.vendor in VENDORS]


def power_of_two(rng: np.random.Generator, low: int, high: int, n: int) -> np.ndarray:
    return 2 ** rng.integers(low, high + 1, n)


def random_table(op: str, n: int, seed: int, gpus: list[str] | None = None) -> pd.DataFrame:
    """Cases an operator may meet, on any GPU."""
    rng = np.random.default_rng(seed)
    kind = op if op in PRECISIONS else "attention"
    dtype = rng.choice(list(PRECISIONS[kind]), n)
    columns: dict[str, Any] = {"gpu": rng.choice(gpus or GPUS, n)}
    if op == "gemm":
        columns |= {name: power_of_two(rng, 0 if name == "m" else 6, 15, n) + rng.integers(0, 2, n) for name in "mnk"}
        return pd.DataFrame(columns | {"gemm_dtype": dtype})
    if op == "moe":
        experts = power_of_two(rng, 3, 8, n)
        columns |= {
            "num_tokens": power_of_two(rng, 0, 15, n),
            "hidden_size": 1024 * rng.integers(1, 8, n),
            "inter_size": 512 * rng.integers(1, 8, n),
            "topk": power_of_two(rng, 0, 3, n),
            "num_experts": experts,
            "moe_tp_size": power_of_two(rng, 0, 3, n),
            "moe_ep_size": np.minimum(power_of_two(rng, 0, 6, n), experts),
            "distribution": rng.choice(["balanced", "power_law_1.01", "power_law_1.2", "power_law_0.6"], n),
            "kernel_source": rng.choice(["moe_torch_flow", "moe_torch_flow_nongated"], n),
        }
        return pd.DataFrame(columns | {"moe_dtype": dtype})
    kv_heads = power_of_two(rng, 0, 3, n)
    columns |= {
        "batch_size": power_of_two(rng, 0, 9, n),
        "num_heads": kv_heads * power_of_two(rng, 0, 6, n),
        "num_key_value_heads": kv_heads,
        "head_dim": rng.choice([64, 128, 192, 256], n),
        "window_size": rng.choice([0, 0, 128, 4096], n),
        "isl": power_of_two(rng, 0, 14, n) if op.startswith("context") else 1,
        "step": power_of_two(rng, 0, 16, n) - 1,
        "kv_cache_dtype": dtype,
        "attn_dtype": rng.choice(["bfloat16", "fp8"], n),
    }
    return pd.DataFrame(columns)
