"""Which format each part of a model keeps, and which rate it runs at."""

from __future__ import annotations

import pytest

from dse.catalog.hardware import gpu, to_device
from dse.catalog.models import model
from dse.catalog.precision import native, resolve, served_formats, weight_formats
from dse.cost.types import Precision
from dse.errors import UnknownName
from dse.units import BYTES_PER_ELEMENT, PRECISIONS, RATES


def parts(p: Precision, name: str) -> tuple[float, float, str]:
    return getattr(p, f"{name}_bytes"), getattr(p, f"{name}_act"), RATES[int(getattr(p, f"{name}_rate"))]


@pytest.mark.parametrize(
    ("name", "on", "weights", "mixer", "ffn", "expert"),
    [
        # the whole model, and the unit exists
        ("Llama-3.1-70B", "h100", "bf16", (2.0, 2.0, "bf16"), (2.0, 2.0, "bf16"), None),
        ("Llama-3.1-70B", "h100", "fp8", (1.0, 1.0, "fp8"), (1.0, 1.0, "fp8"), None),
        ("Llama-3.1-70B", "a100", "int8", (1.0, 1.0, "int8"), (1.0, 1.0, "int8"), None),
        ("Llama-3.1-70B", "b200", "fp4", (0.5625, 0.5625, "fp4"), (0.5625, 0.5625, "fp4"), None),
        # no unit for it: weight-only
        ("Llama-3.1-70B", "a100", "fp8", (1.0, 2.0, "bf16"), (1.0, 2.0, "bf16"), None),
        ("Llama-3.1-70B", "h100", "fp4", (0.5625, 2.0, "bf16"), (0.5625, 2.0, "bf16"), None),
        ("Llama-3.1-70B", "b200", "int4", (0.5625, 2.0, "bf16"), (0.5625, 2.0, "bf16"), None),
        # 4 bits only where the model's checkpoints have them
        ("DeepSeek-V3", "b200", "fp4", (2.0, 2.0, "bf16"), (0.5625, 0.5625, "fp4"), (0.5625, 0.5625, "fp4")),
        ("DeepSeek-V3", "h200", "native", (1.0, 1.0, "fp8"), (1.0, 1.0, "fp8"), (1.0, 1.0, "fp8")),
        ("gpt-oss-120b", "h100", "native", (2.0, 2.0, "bf16"), (2.0, 2.0, "bf16"), (0.53125, 2.0, "bf16")),
        ("gpt-oss-120b", "b200", "mxfp4", (2.0, 2.0, "bf16"), (2.0, 2.0, "bf16"), (0.53125, 0.5625, "fp4")),
        ("DeepSeek-V4-Pro", "h100", "native", (1.0, 1.0, "fp8"), (1.0, 1.0, "fp8"), (0.53125, 2.0, "bf16")),
    ],
)
def test_parts(
    name: str,
    on: str,
    weights: str,
    mixer: tuple[float, float, str],
    ffn: tuple[float, float, str],
    expert: tuple[float, float, str] | None,
) -> None:
    p = resolve(model(name), gpu(on), weights)
    assert parts(p, "mixer") == mixer
    assert parts(p, "ffn") == ffn
    if expert is not None:
        assert parts(p, "expert") == expert


@pytest.mark.parametrize(
    ("on", "weights", "activations", "expected"),
    [
        ("h100", "fp8", "bf16", (1.0, 2.0, "bf16")),  # W8A16: the wider decides
        ("h100", "int4", "fp8", (0.5625, 1.0, "fp8")),  # W4A8
        ("h100", "fp4", "fp8", (0.5625, 1.0, "fp8")),
        ("b200", "fp4", "fp8", (0.5625, 1.0, "fp8")),
        ("h100", "bf16", "fp8", (2.0, 2.0, "bf16")),  # W16A8 is no kernel
        ("h100", "fp8", "int8", (1.0, 1.0, "fp8")),  # nor is fp8 times int8
        ("a100", "int4", "int8", (0.5625, 1.0, "int8")),
        ("a100", "int4", "fp8", (0.5625, 2.0, "bf16")),  # no such unit
    ],
)
def test_given_activations(on: str, weights: str, activations: str, expected: tuple[float, float, str]) -> None:
    assert parts(resolve(model("Llama-3.1-70B"), gpu(on), weights, activations=activations), "ffn") == expected


def test_dispatch_is_quantised_where_the_experts_are() -> None:
    assert resolve(model("DeepSeek-V3"), gpu("h200"), "fp8").dispatch_bytes == 1 + 4 / 128
    assert resolve(model("DeepSeek-V3"), gpu("h200"), "bf16").dispatch_bytes == 2
    assert resolve(model("DeepSeek-V3"), gpu("a100"), "fp8").dispatch_bytes == 2
    assert resolve(model("DeepSeek-V3"), gpu("h200"), "fp8").combine_bytes == 2


def test_kv_needs_no_unit() -> None:
    assert resolve(model("Llama-3.1-8B"), gpu("a100"), "bf16").kv_bytes == 2
    for kv in PRECISIONS:
        assert resolve(model("Llama-3.1-8B"), gpu("a100"), "bf16", kv).kv_bytes == BYTES_PER_ELEMENT[kv]


def test_an_entry_or_a_device_will_do() -> None:
    entry = gpu("h100")
    assert resolve(model("Qwen3-8B"), entry, "fp8") == resolve(model("Qwen3-8B"), to_device(entry), "fp8")


def test_names_are_resolved() -> None:
    v3, h100 = model("DeepSeek-V3"), to_device(gpu("h100"))
    assert native(v3, "native") == "fp8"
    assert weight_formats(v3, "int4") == ("bf16", "int4", "int4")
    assert served_formats(v3, h100, "native") == ("fp8", "fp8", "fp8")
    assert served_formats(v3, h100, "fp4", "fp8") == ("fp4", "bf16", "fp8")


@pytest.mark.parametrize("which", ["weights", "kv", "activations"])
def test_unknown_formats_name_the_nearest(which: str) -> None:
    formats = {"weights": "fp8", "kv": "auto", "activations": "auto", which: "fp7"}
    with pytest.raises(UnknownName, match=rf"{which}: unknown .*'fp7' \(nearest: fp"):
        resolve(model("Qwen3-8B"), gpu("h100"), **formats)
