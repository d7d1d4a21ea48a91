"""What the coefficients of single kernels may be: (least, start, greatest), in the units of `dse.cost.kernels`.

Seconds, cycles, shares, elements. `SWITCHES` are choices of a kernel library, not quantities: the fit picks one of the
listed values for each GPU generation, and a generation nobody measured takes what most others have.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dse.calibrate.levenberg import Bounds

_L2 = {"l2_share": (0.05, 0.5, 3.0), "l2_rate": (3.0, 25.0, 220.0)}
_CORNER = (0.01, 0.3, 1.0)

BOUNDS: Mapping[str, Bounds] = MappingProxyType(
    {
        "gemm": Bounds(
            {
                "launch": (0.3e-6, 4e-6, 30e-6),
                "serial": (0.02, 2.7, 36.0),
                "split": (50.0, 2000.0, 1e5),
                "peak_share": (0.1, 0.7, 1.0),
                "half_m": (0.1, 32.0, 300.0),
                "half_k": (0.1, 64.0, 2000.0),
                "memory_share": (0.2, 0.8, 1.0),
                "quantise": (1e-3, 0.1, 10.0),
                **_L2,
            }
        ),
        "context_attention": Bounds(
            {
                "launch": (1e-6, 12e-6, 40e-6),
                "launch_narrow": (-8e-6, 0.0, 8e-6),
                "launch_wide": (-8e-6, 0.0, 16e-6),
                "peak_share": (0.05, 0.6, 1.0),
                "narrow_power": (-1.0, 0.2, 2.0),
                "wide_power": (-2.0, 0.0, 2.0),
                "half_k": (1.0, 64.0, 1000.0),
                "window_edge": (0.1, 50.0, 1000.0),
                "memory_share": (0.1, 0.6, 1.0),
                "query_passes": (0.1, 1.0, 10.0),
                "wave": (18.0, 1800.0, 54000.0),
                "serial": (0.02, 3.6, 180.0),
                "split": (50.0, 3000.0, 1e7),
                "corner": _CORNER,
                **_L2,
            },
            linear=frozenset(("launch_narrow", "launch_wide", "narrow_power", "wide_power")),
        ),
        "generation_attention": Bounds(
            {
                "launch": (1e-6, 8e-6, 40e-6),
                "launch_narrow": (-3e-6, 0.0, 6e-6),
                "launch_grouped": (0.0, 0.5e-6, 8e-6),
                "memory_share": (0.2, 0.8, 1.0),
                "flops": (20.0, 400.0, 8192.0),
                "wave": (90.0, 5400.0, 54000.0),
                "wave_ratio": (8.0, 40.0, 1000.0),
                "head_dim": (1.0, 60.0, 5000.0),
                "serial": (0.02, 36.0, 360.0),
                "split": (10.0, 300.0, 1e8),
                "split_keys": (20.0, 200.0, 1e5),
                "most_splits": (0.1, 4.0, 100.0),
                "resident": (0.3, 1.0, 10.0),
                "corner": (0.01, 0.2, 1.0),
                "wave_corner": (0.01, 0.2, 1.0),
                **_L2,
                "plain_launch": (1e-6, 8e-6, 40e-6),
                "plain_wave": (90.0, 2700.0, 54000.0),
                "plain_resident": (0.3, 2.0, 30.0),
                "plain_flops": (1.0, 25.0, 1000.0),
                "plain_serial": (0.02, 36.0, 360.0),
                "plain_split": (10.0, 300.0, 1e8),
            },
            linear=frozenset(("launch_narrow", "launch_grouped")),
        ),
        "context_mla": Bounds(
            {
                "launch": (1e-6, 12e-6, 60e-6),
                "peak_share": (0.05, 0.6, 1.0),
                "half_k": (1.0, 200.0, 2000.0),
                "memory_share": (0.1, 0.6, 1.0),
                "wave": (18.0, 3600.0, 54000.0),
                "serial": (0.02, 9.0, 180.0),
                "split": (50.0, 1e4, 1e7),
                "corner": _CORNER,
                **_L2,
            }
        ),
        "generation_mla": Bounds(
            {
                "launch": (1e-6, 10e-6, 60e-6),
                "memory_share": (0.1, 0.7, 1.0),
                "peak_share": (0.005, 0.3, 1.0),
                "idle_heads": (0.1, 8.0, 256.0),
                "query_passes": (0.3, 1.0, 30.0),
                "wave": (18.0, 5400.0, 108000.0),
                "wave_heads": (1.0, 64.0, 1e4),
                "serial": (0.02, 9.0, 540.0),
                "split": (10.0, 1000.0, 1e8),
                "corner": _CORNER,
                "wave_corner": _CORNER,
                **_L2,
            }
        ),
        "moe": Bounds(
            {
                "launch": (1e-6, 15e-6, 100e-6),
                "launch_expert": (1e-10, 2e-8, 3e-6),
                "memory_share": (0.1, 0.7, 1.0),
                "peak_share": (0.03, 0.5, 1.0),
                "half_m": (0.5, 40.0, 300.0),
                "half_n": (0.1, 50.0, 2000.0),
                "serial": (0.02, 3.6, 108.0),
                "serial_full": (0.02, 9.0, 180.0),
                "full_rows": (1.0, 30.0, 1000.0),
                "permute": (0.05, 1.0, 20.0),
                "imbalance": (0.3, 1.3, 4.0),
            }
        ),
    }
)
SWITCHES: Mapping[str, Mapping[str, tuple[float, ...]]] = MappingProxyType(
    {"generation_attention": {"plain_below": (1.0, 0.0), "bytes_share": (1.0, 0.5)}}
)

__all__ = ["BOUNDS", "SWITCHES"]
