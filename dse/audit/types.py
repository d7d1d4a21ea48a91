"""The nouns of an audit: what a plan says, and what came of checking it. SI units; a stated range has two ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from dse.catalog.model_schema import ModelEntry
from dse.cost.types import Architecture, Device, Precision

Verdict = Literal["holds", "wrong", "impossible", "unknown"]
Span = tuple[float, float]


@dataclass(frozen=True)
class Quantity:
    """A written number or range. `sign`: "", "~", "<" or ">"; `dimension` names a row of `quantity.UNITS`."""

    low: float
    high: float
    dimension: str
    sign: str = ""
    per_gpu: bool = False  # a rate "tokens/ms/GPU"
    loose: float = 1.0  # 1.024 for "KB", 1.0486 for "MB", ...: the number if binary units were meant

    @property
    def span(self) -> Span:
        return self.low, self.high


@dataclass(frozen=True)
class Claim:
    """One statement of a plan. `kind` is a row of `kinds.KINDS`; "" with a `problem` where it is not understood."""

    kind: str
    text: str
    quantity: Quantity | None = None
    length: float | None = None  # tokens, where the statement names its own
    problem: str = ""
    sides: tuple[tuple[float, str], ...] = ()  # of an equation: values and what they are


@dataclass(frozen=True)
class Variant:
    """A model as the plan may mean it; several where the plan leaves something out."""

    label: str
    entry: ModelEntry
    architecture: Architecture
    parameters: int  # without embeddings where no vocabulary is stated
    active: int


@dataclass(frozen=True)
class Degrees:
    """Parallel degrees as written; None: not stated."""

    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    ep: int | None = None
    moe_tp: int | None = None
    attention_dp: int | None = None
    cp: int | None = None
    tp_internal: bool = False  # "TP inside one GPU"

    def written(self) -> str:
        names = ("tp", "pp", "dp", "ep", "moe_tp", "attention_dp", "cp")
        return ", ".join(f"{n.upper()}={v}" for n in names if (v := getattr(self, n)) is not None) or "none"


@dataclass(frozen=True)
class Network:
    """Bytes/s a GPU a direction; None: not stated."""

    node: int | None = None
    link: float | None = None
    between: float | None = None


@dataclass(frozen=True)
class Workload:
    """`batch` sequences over the whole deployment, prompts from `prompt[0]` to `prompt[1]` tokens."""

    batch: float
    prompt: Span
    output: float = 0.0

    @property
    def longest(self) -> float:
        return self.prompt[1] + self.output


@dataclass(frozen=True)
class Targets:
    ttft: Quantity | None = None
    tpot: Quantity | None = None
    throughput: Quantity | None = None
    phase: str = ""  # of the throughput: "prefill", "decode" or not stated


@dataclass(frozen=True)
class WrittenPlan:
    """A plan as its file says it, looked up. `mfu`, `utilisation`: None where neither stated nor wanted at 100%."""

    name: str
    description: str
    variants: tuple[Variant, ...]
    hardware: str
    device: Device
    precision: Precision
    rate: float  # FLOP/s that `mfu` is a share of
    mfu: float | None
    utilisation: float | None
    network: Network
    gpus: int | None
    most_gpus: int | None
    degrees: Degrees
    workload: Workload
    targets: Targets
    claims: tuple[Claim, ...]
    launch: str = ""


@dataclass(frozen=True)
class Layout:
    """One way to read the plan's degrees. The first of a list is the one that the plan's numbers are held against."""

    name: str
    tp: float
    pp: float
    attention_dp: float
    cp: float
    moe_tp: float
    moe_ep: float
    replicas: float = 1.0

    @property
    def stage(self) -> float:
        return self.tp * self.attention_dp * self.cp

    @property
    def gpus(self) -> float:
        return self.stage * self.pp * self.replicas


@dataclass(frozen=True)
class Finding:
    """A claim and what it comes to. `numbers`: the figures behind the text, SI, low and high end."""

    name: str
    verdict: Verdict
    claimed: str
    computed: str
    why: str
    numbers: Mapping[str, Span] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Bound:
    """A limit that no plan on this hardware passes. `kind`: memory, FLOPs, bandwidth or latency."""

    kind: str
    text: str
    broken: bool  # it rules the targets out
    numbers: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Nearest:
    """The nearest plan that meets the targets (`meets`), or the one that misses them by least with the bounds."""

    meets: bool
    text: str
    plan: Mapping[str, float | str] | None
    bounds: tuple[Bound, ...]
    tried: int


@dataclass(frozen=True)
class Audit:
    name: str
    description: str
    findings: tuple[Finding, ...]
    layouts: tuple[Layout, ...]
    assumptions: tuple[str, ...]
    nearest: Nearest | None

    def count(self, verdict: Verdict) -> int:
        return sum(f.verdict == verdict for f in self.findings)


def as_dict(audit: Audit) -> dict[str, Any]:
    """The audit as plain data: `{"claims": [{name, verdict, claimed, computed, why, numbers}], ...}`."""
    nearest = audit.nearest
    return {
        "plan": audit.name,
        "description": audit.description,
        "verdicts": {v: audit.count(v) for v in ("holds", "wrong", "impossible", "unknown")},
        "claims": [
            {
                "name": f.name,
                "verdict": f.verdict,
                "claimed": f.claimed,
                "computed": f.computed,
                "why": f.why,
                "numbers": {key: list(span) for key, span in f.numbers.items()},
            }
            for f in audit.findings
        ],
        "readings": [{"name": x.name, "gpus": x.gpus, **_degrees(x)} for x in audit.layouts],
        "assumptions": list(audit.assumptions),
        "nearest": None
        if nearest is None
        else {
            "meets_targets": nearest.meets,
            "text": nearest.text,
            "plan": None if nearest.plan is None else dict(nearest.plan),
            "bounds": [
                {"kind": b.kind, "text": b.text, "broken": b.broken, "numbers": dict(b.numbers)} for b in nearest.bounds
            ],
            "tried": nearest.tried,
        },
    }


def _degrees(x: Layout) -> dict[str, float]:
    return {name: getattr(x, name) for name in ("tp", "pp", "attention_dp", "cp", "moe_tp", "moe_ep", "replicas")}


__all__ = [
    "Audit",
    "Bound",
    "Claim",
    "Degrees",
    "Finding",
    "Layout",
    "Nearest",
    "Network",
    "Quantity",
    "Span",
    "Targets",
    "Variant",
    "Verdict",
    "Workload",
    "WrittenPlan",
    "as_dict",
]
