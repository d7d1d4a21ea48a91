"""Number formats of a model on a GPU: which bytes each part keeps, and which peak rate multiplies them.

4-bit checkpoints quantise only part of a model (`low_bit_scope`) and leave the rest in `rest_precision`; other formats
cover every linear layer. Where the GPU has no unit for a format, the weights stay small and are widened on the way to
the 16-bit unit (weight-only), as Marlin-style kernels do. Ignored: per-layer exceptions within a checkpoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from dse.cost.types import Device, Precision
from dse.errors import unknown
from dse.units import BYTES_PER_ELEMENT, PRECISIONS, RATE_OF_PRECISION, RATES

if TYPE_CHECKING:
    from dse.catalog.model_schema import ModelEntry

NATIVE = "native"
AUTO = "auto"
LOW_BIT = ("fp4", "mxfp4", "int4")
WEIGHTS = (NATIVE, *PRECISIONS)
KV_FORMATS = (AUTO, *PRECISIONS)
# No engine has 4-bit integer activations; mxfp4 and fp4 activations differ in block size only.
ACTIVATIONS = (AUTO, "bf16", "fp8", "fp4", "mxfp4", "int8")
# Block scales of a dispatched fp8 payload: one float32 a 128 elements (DeepEP).
DISPATCH_QUANTISED = 1.0 + 4.0 / 128.0


class Formats(NamedTuple):
    """The weight formats of the three parts of a model."""

    mixer: str
    ffn: str
    expert: str


def weight_formats(entry: ModelEntry, weights: str) -> Formats:
    """The format of each part when the model is served in `weights` ("native": as its checkpoint is)."""
    name = native(entry, weights)
    if name not in LOW_BIT:
        return Formats(name, name, name)
    rest = entry.rest_precision
    mixer = name if entry.low_bit_scope == "all" else rest
    ffn = name if entry.low_bit_scope in ("all", "ffn") else rest
    return Formats(mixer, ffn, name)


def native(entry: ModelEntry, weights: str) -> str:
    """`weights` with "native" replaced by the checkpoint's own format."""
    name = entry.native_weights if weights == NATIVE else weights
    if name not in PRECISIONS:
        raise unknown("precision", weights, WEIGHTS, "weights")
    return name


def activation_format(weights: str, device: Device, activations: str = AUTO) -> tuple[str, str]:
    """The format of a GEMM's input and the rate it runs at: `("fp8", "fp8")`.

    Automatic: the class of the weights' rate. Given: the wider of the two decides the rate; activations narrower than
    the weights have no kernel (W16A8), so such a part keeps its automatic format.
    """
    auto = _rate(RATE_OF_PRECISION[weights], device)
    if activations == AUTO:
        return auto, auto
    if activations not in ACTIVATIONS:
        raise unknown("activation precision", activations, ACTIVATIONS, "activations")
    given = RATE_OF_PRECISION[activations]
    wide, narrow = BYTES_PER_ELEMENT[given], BYTES_PER_ELEMENT[weights]
    if wide < narrow or _rate(given, device) != given:
        return auto, auto
    if wide == narrow and given != RATE_OF_PRECISION[weights]:  # int8 with fp8: no unit multiplies the two
        return auto, auto
    return given, given


def _rate(rate: str, device: Device) -> str:
    return rate if float(getattr(device, f"peak_{rate}")) > 0 else "bf16"


def _cache(weights: str, device: Device) -> str:
    """The usual cache of a checkpoint: fp8 beside fp8 and fp4 weights where the GPU has fp8, else 16 bits."""
    return "fp8" if weights in ("fp8", "fp4") and float(device.peak_fp8) > 0 else "bf16"


def resolve(entry: ModelEntry, device: Any, weights: str, kv: str = AUTO, activations: str = AUTO) -> Precision:
    """The `Precision` of a model served in `weights` on a GPU (a catalogue entry or a `Device`)."""
    if not isinstance(device, Device):
        from dse.catalog.hardware import to_device

        device = to_device(device)
    if kv not in KV_FORMATS:
        raise unknown("KV-cache precision", kv, KV_FORMATS, "kv")
    formats = weight_formats(entry, weights)
    parts = {}
    for part, weight in formats._asdict().items():
        act, rate = activation_format(weight, device, activations)
        parts[f"{part}_bytes"] = BYTES_PER_ELEMENT[weight]
        parts[f"{part}_act"] = BYTES_PER_ELEMENT[act]
        parts[f"{part}_rate"] = float(RATES.index(rate))
    return Precision(
        **parts,
        kv_bytes=BYTES_PER_ELEMENT[_cache(native(entry, weights), device) if kv == AUTO else kv],
        dispatch_bytes=2.0 if parts["expert_rate"] == RATES.index("bf16") else DISPATCH_QUANTISED,
        combine_bytes=2.0,
    )


def served_formats(
    entry: ModelEntry, device: Device, weights: str, kv: str = AUTO, activations: str = AUTO
) -> tuple[str, str, str]:
    """What "native" and "auto" come to: weights, activations (of the part the weights' format is for) and KV cache."""
    name = native(entry, weights)
    return name, activation_format(name, device, activations)[0], _cache(name, device) if kv == AUTO else kv


__all__ = [
    "ACTIVATIONS",
    "KV_FORMATS",
    "LOW_BIT",
    "NATIVE",
    "WEIGHTS",
    "Formats",
    "activation_format",
    "native",
    "resolve",
    "served_formats",
    "weight_formats",
]
