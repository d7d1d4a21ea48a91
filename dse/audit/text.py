"""The free-text form of plans: statements to claims, "EP=16, TP=4" to degrees. What is ambiguous stays unknown."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dse.audit.kinds import KINDS
from dse.audit.quantity import find
from dse.audit.types import Claim, Degrees, Quantity

# What a statement is about, the most telling words first.
_TOPICS = tuple(
    (name, re.compile(words, re.IGNORECASE))
    for name, words in (
        ("headroom", r"\bheadroom\b|\bfree memory\b"),
        ("capacity", r"\bcapacity factor\b"),
        ("imbalance", r"\b(im)?balanc\w*|\bvariance\b"),
        ("tp_overhead", r"\b(tp|tensor[- ]parallel\w*) overhead\b"),
        ("expert_communication", r"\bexpert (communication|traffic)\b|\ball-to-all\b"),
        ("communication", r"\bcommunication\b|\ball-?reduces?\b"),
        ("mfu", r"\bmfu\b|\bflops? utili[sz]ation\b"),
        ("bandwidth_utilisation", r"\b(bandwidth|memory) utili[sz]ation\b"),
        ("active", r"\bactive (params?|parameters)\b|\bactivated\b"),
        ("parameters", r"\bparam(eter)?s?\b|\bmodel size\b"),
        ("ttft", r"\bttft\b|\bfirst[- ]token\b"),
        ("prefill", r"\bprefill\b"),
        ("decode", r"\bdecod(e|ing)\b|\btpot\b|\bitl\b|\binter-token\b"),
        ("throughput", r"\bthroughput\b"),
        ("kv", r"\bkv\b"),
        ("weights", r"\bweights?\b"),
        ("activations", r"\bactivations?\b"),
        ("buffers", r"\bbuffers?\b"),
        ("memory", r"\btotal\b|\bmemory\b|\bfootprint\b"),
    )
)
_SCOPES = tuple(
    (name, re.compile(words, re.IGNORECASE))
    for name, words in (
        ("gpu", r"(\ban?|\bper|\beach|\bevery|/)\s*(gpu|device|card)\b"),
        ("sequence", r"(\ban?|\bper|\beach|\bevery|/)\s*(sequence|request|seq)\b"),
        ("token", r"(\ban?|\bper|\beach|\bevery|/)\s*token\b"),
        ("expert", r"(\ban?|\bper|\beach|\bevery|/)\s*expert\b"),
        ("total", r"\bin (all|total)\b|\btotal\b|\baltogether\b|\bsystem-wide\b|\ball gpus\b"),
    )
)
_KIND = {
    ("headroom", "share"): "headroom",
    ("capacity", "ratio"): "capacity_factor",
    ("imbalance", "share"): "imbalance",
    ("tp_overhead", "seconds"): "tp_overhead_time",
    ("tp_overhead", "share"): "tp_overhead",
    ("communication", "share"): "communication_share",
    ("communication", "bytes"): "communication_bytes",
    ("expert_communication", "bytes"): "expert_communication",
    ("expert_communication", "share"): "communication_share",
    ("mfu", "share"): "mfu",
    ("bandwidth_utilisation", "share"): "bandwidth_utilisation",
    ("active", "parameters"): "active_parameters",
    ("parameters", "parameters"): "parameters",
    ("ttft", "seconds"): "ttft",
    ("prefill", "seconds"): "prefill_time",
    ("decode", "seconds"): "decode_latency",
    ("activations", "bytes"): "activations_gpu",
    ("buffers", "bytes"): "buffers_gpu",
    ("memory", "bytes"): "memory_gpu",
    ("memory", "share"): "memory_share",
}
_NONE = re.compile(r"\b(no|zero|without|none)\b", re.IGNORECASE)
_LENGTH = re.compile(r"(?:\b(?:at|for|of|with)\s+|\()(\d[\d,_]*)[ -]?tokens?\b(?:\s*(?:prompts?|context))?\)?", re.I)
_DEGREE = re.compile(r"\b(attention[-_ ]?dp|moe[-_ ]?tp|moe[-_ ]?ep|ep|tp|pp|dp|cp)\s*[=:]?\s*(\d+)\b", re.I)
_GPUS = re.compile(r"\b(\d+)\s*[x×]?\s*gpus?\b", re.IGNORECASE)
_INTERNAL = re.compile(r"(internal to|inside|within) (a|one|each|the same) gpu", re.IGNORECASE)
_TIMES = re.compile(r"\s+[×x*]\s+", re.IGNORECASE)
_CLAUSE = re.compile(r"[;,](?!\d)|\s+and\s+")


def degrees_of(text: str) -> tuple[Degrees, int | None]:
    """Degrees and the number of GPUs that a text names. Raises ValueError where one is named twice differently."""
    found: dict[str, int] = {}
    for match in _DEGREE.finditer(text):
        name = match[1].lower().replace("-", "_").replace(" ", "_").replace("moe_ep", "ep")
        name = {"attentiondp": "attention_dp", "moetp": "moe_tp", "moeep": "ep"}.get(name, name)
        value = int(match[2])
        if value < 1:
            raise ValueError(f"{name}={value} is out of range (allowed: whole numbers from 1)")
        if found.setdefault(name, value) != value:
            raise ValueError(f"{name} is given as {found[name]} and as {value}; keep one")
    gpus = _GPUS.search(text)
    return Degrees(**found, tp_internal=bool(_INTERNAL.search(text))), int(gpus[1]) if gpus else None


def claims_of(text: str, length: float | None = None) -> list[Claim]:
    """The claims of one statement; at least one, which says why where nothing is understood."""
    if _DEGREE.search(text) and re.search(r"=\s*\d", text):
        return [Claim(kind="degrees", text=text)]
    condition = _LENGTH.search(text)
    body = text
    if condition is not None:
        length = float(condition[1].replace(",", "").replace("_", ""))
        body = text[: condition.start()] + " " + text[condition.end() :]
    claims: list[Claim] = []
    topic = ""
    for clause in _CLAUSE.split(body):
        topic = _topic(clause) or topic
        claims += _clause(clause, topic, text, length)
    return claims or [_unknown(text, "no quantity with a unit is named; write e.g. `weights 8 GB a GPU`")]


def _topic(clause: str) -> str:
    return next((name for name, words in _TOPICS if words.search(clause)), "")


def _clause(clause: str, topic: str, text: str, length: float | None) -> Iterator[Claim]:
    if topic == "expert_communication" and _NONE.search(clause):
        yield Claim(kind="expert_communication", text=text, quantity=Quantity(0.0, 0.0, "bytes"), length=length)
        return
    sides = clause.split("=")
    if len(sides) > 1 and (equation := _equation(sides)):
        yield Claim(kind="equation", text=clause.strip(), sides=equation)
    for side in sides:
        if len(_TIMES.split(side)) > 1:
            continue  # a product is half of an equation, not a claim of its own
        part = side.split("%")[0] + "%" if "% of" in side else side
        for quantity, _ in find(part):
            if quantity.dimension in ("", "count", "tokens"):
                continue
            if len(sides) > 1 and not topic:
                continue  # `16 layers x 12.1 GB = 12.1 GB`: the equation is all it says
            yield _claim(topic, quantity, clause if len(sides) == 1 else side, text, length)


def _claim(topic: str, q: Quantity, clause: str, text: str, length: float | None) -> Claim:
    scope = next((name for name, words in _SCOPES if words.search(clause)), "")
    kind = _KIND.get((topic, q.dimension), "")
    if q.dimension == "tokens/s":
        kind = "throughput_gpu" if q.per_gpu or scope == "gpu" else "throughput"
    elif q.dimension == "GPUs":
        kind = "gpus"
    elif q.dimension == "parameters" and not kind:
        kind = "parameters" if topic in ("", "parameters", "weights") else ""
    elif topic in ("weights", "kv") and q.dimension == "bytes":
        kind = f"{topic}_{scope}" if f"{topic}_{scope}" in KINDS else topic
    if kind:
        return Claim(kind=kind, text=text, quantity=q, length=length)
    if not topic:
        return _unknown(text, f"it does not say what the {q.dimension} are of (weights, KV, prefill, ...)")
    return _unknown(text, f"a number of {q.dimension} does not say anything about {topic.replace('_', ' ')}")


def _equation(sides: list[str]) -> tuple[tuple[float, str], ...]:
    """The value and dimension of each side; () where one cannot be worked out."""
    values = []
    for side in sides:
        factors = [[q for q, _ in find(part)] for part in _TIMES.split(side)]
        share = "% of" in side and len(factors) == 1 and len(factors[0]) == 2
        if share:
            factors = [[q] for q in factors[0]]
        if any(len(found) != 1 for found in factors):
            return ()
        product, dimension = 1.0, ""
        for (q,) in factors:
            if q.low != q.high:
                return ()
            product *= q.low
            if q.dimension not in ("", "count", "share", "ratio", "GPUs", "tokens"):
                if dimension:
                    return ()
                dimension = q.dimension
        values.append((product, dimension or "number"))
    return tuple(values) if len({dimension for _, dimension in values}) == 1 else ()


def _unknown(text: str, problem: str) -> Claim:
    return Claim(kind="", text=text, problem=problem)


__all__ = ["claims_of", "degrees_of"]
