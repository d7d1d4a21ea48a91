"""What a person writes, and what it comes to: YAML -> validated space -> legal plans and operating points as arrays."""

from dse.space.compile import (
    CompiledSpace,
    Constraint,
    Designs,
    Operating,
    PrecisionName,
    Workloads,
    compile_space,
)
from dse.space.load import load_space, parse_space
from dse.space.metrics import METRICS
from dse.space.rank import axis_names, rank_decode, rank_encode
from dse.space.schema import SpaceSpec
from dse.space.tables import describe, loads, plans

__all__ = [
    "METRICS",
    "CompiledSpace",
    "Constraint",
    "Designs",
    "Operating",
    "PrecisionName",
    "SpaceSpec",
    "Workloads",
    "axis_names",
    "compile_space",
    "describe",
    "load_space",
    "loads",
    "parse_space",
    "plans",
    "rank_decode",
    "rank_encode",
]
