"""How metrics, settings and numbers are called and written for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Label(NamedTuple):
    """A metric's name in a table's head, in a sentence, and its unit."""

    short: str
    long: str
    unit: str

    @property
    def axis(self) -> str:
        text = self.long[0].upper() + self.long[1:]
        return f"{text} ({self.unit})" if self.unit else text


METRIC_LABELS: Mapping[str, Label] = MappingProxyType(
    {
        "ttft_ms": Label("TTFT ms", "TTFT", "ms"),
        "tpot_ms": Label("TPOT ms", "TPOT", "ms"),
        "e2e_ms": Label("E2E ms", "end-to-end latency", "ms"),
        "output_tok_s_gpu": Label("out tok/s/GPU", "output throughput", "tokens/s/GPU"),
        "total_tok_s_gpu": Label("all tok/s/GPU", "prompt + output throughput", "tokens/s/GPU"),
        "tok_s_user": Label("tok/s/user", "speed for a user", "tokens/s/user"),
        "gpus": Label("GPUs", "number of GPUs", ""),
        "usd_per_mtok": Label("$/Mtok", "cost", "USD/M output tokens"),
        "memory_gib": Label("mem GiB", "memory a GPU", "GiB"),
        "goodput_req_s_gpu": Label("req/s/GPU", "goodput", "requests/s/GPU"),
        "ttft_p90_ms": Label("TTFT P90 ms", "TTFT P90", "ms"),
        "ttft_p99_ms": Label("TTFT P99 ms", "TTFT P99", "ms"),
        "tpot_p90_ms": Label("TPOT P90 ms", "TPOT P90", "ms"),
        "tpot_p99_ms": Label("TPOT P99 ms", "TPOT P99", "ms"),
        "attainment": Label("attainment", "share of requests within targets", ""),
        "requests_s": Label("req/s", "requests a second", "requests/s"),
        "requests_s_gpu": Label("req/s/GPU", "requests a GPU", "requests/s/GPU"),
        "usd_per_request": Label("$/request", "cost of a request", "USD"),
    }
)

# Settings of a plan in reading order, by column: head of a table's column, and the value that goes without saying.
SETTINGS: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {
        "model": ("model", None),
        "gpu": ("GPU", None),
        "cluster": ("cluster", None),
        "gpus": ("GPUs", None),
        "replicas": ("replicas", 1),
        "tp": ("tp", 1),
        "pp": ("pp", 1),
        "attention_dp": ("attention_dp", 1),
        "cp": ("cp", 1),
        "moe_ep": ("ep", 1),
        "moe_tp": ("moe_tp", 1),
        "weights": ("weights", None),
        "activations": ("activations", None),
        "kv": ("kv", None),
        "concurrency": ("concurrency", None),
        "static_batch": ("static batch", 0),
        "chunk": ("chunk", None),
        "speculation": ("draft tokens", 0),
        "eplb_replicas": ("redundant experts", 0),
        "overlap": ("overlap", "none"),
        "dispatch": ("dispatch", "auto"),
        "cp_method": ("cp_method", "auto"),
        "sequence_parallel": ("sequence parallel", 0),
        "microbatches": ("microbatches", 0),
        "utilisation": ("memory utilisation", None),
        "isl": ("isl", None),
        "osl": ("osl", None),
        "prefix_hit": ("prefix hit", 0),
        "serving": ("serving", None),
        "pipeline": ("pipeline", None),
        "kv_transfer": ("KV transfer", "after_prefill"),
        **{
            f"{pool}_{column}": (f"{pool} {head}", usual)
            for pool in ("prefill", "decode")
            for column, head, usual in (
                ("gpu", "GPU", None),
                ("num_workers", "workers", None),
                ("tp_size", "tp", 1),
                ("pp_size", "pp", 1),
                ("attention_dp_size", "attention_dp", 1),
                ("cp_size", "cp", 1),
                ("moe_ep_size", "ep", 1),
                ("moe_tp_size", "moe_tp", 1),
                ("weights", "weights", None),
                ("kv", "kv", None),
                ("chunk", "chunk", None),
                ("overlap", "overlap", "none"),
            )
        },
    }
)
DEGREES = ("tp", "pp", "attention_dp", "cp", "moe_ep", "moe_tp")

PART_LABELS: Mapping[str, str] = MappingProxyType(
    {
        "dense": "dense FFN",
        "head": "LM head",
        "reduce": "all-reduce",
        "exchange": "expert dispatch, combine",
        "sequence": "sequence exchange",
        "overhead": "launch, host overhead",
        "kv": "KV cache",
        "buffers": "communication buffers",
        "reserve": "runtime reserve",
    }
)


def label(metric: str) -> Label:
    return METRIC_LABELS.get(metric, Label(metric, metric, ""))


def plain(value: object) -> str:
    """Text on one line without control characters: names come from files of others."""
    return "".join(c if c.isprintable() else " " for c in str(value)).strip()


def number(value: Any) -> str:
    """Three significant digits, whole numbers in full: 0.908, 46.5, 1,234; text unchanged."""
    if isinstance(value, str) or value is None:
        return plain(value or "")
    x = float(value)
    if not math.isfinite(x):
        return "–" if math.isnan(x) else ("∞" if x > 0 else "−∞")
    if x == int(x) or abs(x) >= 999.5:
        return f"{x:,.0f}" if abs(x) < 1e15 else f"{x:.3g}"
    if abs(x) < 1e-4:
        return f"{x:.2e}"
    magnitude = math.floor(math.log10(abs(float(f"{x:.2e}"))))
    return f"{x:.{max(0, 2 - magnitude)}f}"


def setting(value: Any) -> str:
    """A setting as a search space writes it: 16384, 0.9, fp8."""
    if isinstance(value, str) or value is None:
        return plain(value or "")
    if math.isnan(float(value)):  # a setting that this plan does not have
        return ""
    return f"{float(value):.0f}" if float(value).is_integer() else f"{float(value):g}"


def quantity(metric: str, value: Any) -> str:
    """`TPOT 46.5 ms`, `903 tokens/s/GPU`, `1 GPU`."""
    if metric == "gpus":
        return f"{number(value)} GPU{'' if value == 1 else 's'}"
    name = label(metric)
    named = "" if "tokens" in name.unit else f"{name.long} "
    return f"{named}{number(value)} {name.unit}".strip()


def amount(metric: str, value: Any) -> str:
    """The same beside its name: `46.5 ms`."""
    return f"{number(value)} {label(metric).unit}".strip()


def percent(share: float) -> str:
    """`7.4%`, `59%`; never 0% of something nor 100% of less than all."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    text = f"{100 * share:.1f}" if share < 0.1 or 0.99 < share < 1 else f"{100 * share:.0f}"
    return text.removesuffix(".0") + "%"


def limit(metric: str, op: str, bound: float) -> str:
    """`TTFT ≤ 2,000 ms`."""
    return f"{label(metric).long} {'≤' if op == 'max' else '≥'} {amount(metric, bound)}"


def broken(metric: str, op: str, bound: float) -> str:
    """`TTFT over 2,000 ms`."""
    return f"{label(metric).long} {'over' if op == 'max' else 'under'} {amount(metric, bound)}"


def seconds(value: float) -> str:
    if value < 120:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def rate(value: float) -> str:
    return f"{value / 1e6:.1f} M points/s" if value >= 1e6 else f"{value:,.0f} points/s"
