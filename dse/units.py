"""Units at the edges and number formats. Inside the model everything is SI: seconds, bytes, FLOP/s."""

from __future__ import annotations

from types import MappingProxyType

MIB = 1024.0**2
GIB = 1024.0**3
GB = 1e9
TB = 1e12
TERA = 1e12
GIGA = 1e9
MS = 1e-3
US = 1e-6
HOUR = 3600.0

# Bytes an element, block scales included: mxfp4 has one byte a 32 elements (OCP MX v1.0), nvfp4 one a 16, fp8 with
# 128x128 float32 block scales adds 1/4096 (ignored), int4 with group 32 a 16-bit scale (compressed-tensors).
BYTES_PER_ELEMENT = MappingProxyType(
    {
        "fp32": 4.0,
        "bf16": 2.0,
        "fp8": 1.0,
        "int8": 1.0,
        "fp4": 0.5 + 1.0 / 16.0,
        "mxfp4": 0.5 + 1.0 / 32.0,
        "int4": 0.5 + 2.0 / 32.0,
    }
)
PRECISIONS = ("bf16", "fp8", "fp4", "mxfp4", "int8", "int4")

# Order of the peak rates of a device (`Device.peak_flops`).
RATES = ("bf16", "fp8", "fp4", "int8")
# The tensor-core rate that belongs to a weight format when activations are in the same class; int4 is weight-only
# in every engine (activations stay 16-bit), so it computes at the 16-bit rate.
RATE_OF_PRECISION = MappingProxyType(
    {"bf16": "bf16", "fp8": "fp8", "fp4": "fp4", "mxfp4": "fp4", "int8": "int8", "int4": "bf16"}
)
