"""From a plan's YAML to a `WrittenPlan`: everything wrong with it in one `InputError`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dse.audit.model import Dimensions, variants_of
from dse.audit.schema import BY_NAME, BY_NUMBERS, GpuSpec, ModelSpec, PlanSpec
from dse.audit.types import Degrees, Network, Targets, Workload, WrittenPlan
from dse.catalog import hardware
from dse.catalog.precision import resolve
from dse.cost.types import Device
from dse.errors import InputError
from dse.space import values as v
from dse.space.load import problem, together
from dse.space.yaml_file import parse_yaml, read_text
from dse.units import GIB, RATES

LEAST = "a written plan names at least model, gpu and workload"


def load_plan(path: str | Path) -> WrittenPlan:
    """The plan in a YAML file."""
    path = Path(path)
    return parse_plan(parse_yaml(read_text(path), str(path), LEAST), str(path))


def parse_plan(mapping: Mapping[str, Any], where: str = "plan") -> WrittenPlan:
    """The plan in plain data; `where` begins every message."""
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where}: expected keys with values (model: ..., gpu: ...), got {v.shown(mapping)}")
    try:
        spec = PlanSpec.model_validate(dict(mapping))
    except ValidationError as error:
        raise together(where, [_line(item) for item in error.errors(include_url=False)]) from None
    try:
        return _looked_up(spec)
    except InputError as error:
        raise type(error)(f"{where}: {error}") from None


def _looked_up(spec: PlanSpec) -> WrittenPlan:
    device, machine, node = _device(spec.gpu)
    variants = variants_of(spec.model if isinstance(spec.model, str) else _dimensions(spec.model))
    try:
        precision = resolve(variants[0].entry, device, spec.precision, spec.kv)
    except InputError as error:
        raise type(error)(f"precision, kv: {error}") from None
    rate = RATES[int(precision.expert_rate if variants[0].entry.ffns[0].routed else precision.mixer_rate)]
    stated = spec.plan
    if spec.gpus and stated.gpus and spec.gpus != stated.gpus:
        raise InputError(f"gpus: {spec.gpus} here, {stated.gpus} in `plan`; keep one")
    t = spec.targets
    phase = "prefill" if t.prefill_throughput else "decode" if t.decode_throughput else ""
    network = Network(spec.network.gpus_per_node or node, spec.network.link, spec.network.between_nodes)
    if isinstance(spec.gpu, str) and network.link is None:
        levels = hardware.to_topology(hardware.cluster(hardware.gpu(spec.gpu).default_cluster)).levels
        network = Network(network.node, float(levels[0].bandwidth), network.between or float(levels[-1].bandwidth))
    return WrittenPlan(
        name=spec.name,
        description=" ".join(spec.description.split()),
        variants=variants,
        hardware=machine,
        device=device,
        precision=precision,
        rate=float(getattr(device, f"peak_{rate}")),
        mfu=spec.mfu,
        utilisation=spec.bandwidth_utilisation,
        network=network,
        gpus=spec.gpus or stated.gpus,
        most_gpus=spec.most_gpus,
        degrees=Degrees(**{k: x for k, x in stated.model_dump().items() if k != "gpus"}),
        workload=Workload(float(spec.workload.batch), spec.workload.prompt, spec.workload.output),
        targets=Targets(t.ttft, t.tpot, t.throughput or t.prefill_throughput or t.decode_throughput, phase),
        claims=spec.claims,
        launch=" ".join(spec.launch.split()),
    )


def _device(gpu: str | GpuSpec) -> tuple[Device, str, int | None]:
    """The GPU in SI, what it is called, and the size of its usual node."""
    if isinstance(gpu, str):
        entry = hardware.gpu(gpu)
        size = hardware.cluster(entry.default_cluster).levels[0].size.value
        device = hardware.to_device(entry)
        return device, f"{entry.name} ({device.capacity / GIB:.4g} GiB, {device.bandwidth / 1e12:.4g} TB/s)", size
    device = Device(
        peak_bf16=gpu.flops,
        peak_fp8=gpu.flops_fp8 or 0.0,
        peak_fp4=gpu.flops_fp4 or 0.0,
        peak_int8=0.0,
        bandwidth=gpu.bandwidth,
        capacity=gpu.memory,
        power=0.0,
        price=0.0,
    )
    numbers = f"{gpu.flops / 1e12:.4g} TFLOP/s, {gpu.memory / 1e9:.4g} GB, {gpu.bandwidth / 1e12:.4g} TB/s"
    return device, f"{gpu.name} ({numbers})", None


def _dimensions(m: ModelSpec) -> Dimensions:
    dense = m.experts is None
    return Dimensions(
        name=m.name,
        layers=m.layers,
        hidden=m.hidden,
        heads=m.heads,
        head_dim=m.head_dim or m.hidden // m.heads,
        kv_heads=m.kv_heads or m.heads,
        ffn_width=m.ffn_width or 0,
        experts=0 if dense else m.experts or 0,
        top_k=0 if dense else m.top_k or 0,
        expert_width=0 if dense else m.expert_width or 0,
        gated=m.gated,
        vocab=m.vocab,
        tied=m.tied,
    )


# ------------------------------------------------------------------------------------------------ messages


def _line(item: Any) -> str:
    loc = tuple(part for part in item["loc"] if part not in (BY_NAME, BY_NUMBERS))
    return problem(item, loc, _place, _known, lambda loc: _REMEDIES.get(str(loc[-1]), "add it"))


def _place(loc: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in loc)


_REMEDIES = {
    "model": "write model: Llama-3.1-70B (`dse models` lists them), or its layers, hidden, heads, ...",
    "gpu": "write gpu: h100 (`dse gpus` lists them), or {flops: 400 TFLOP/s, memory: 64 GB, bandwidth: 1.8 TB/s}",
    "workload": "write workload: {batch: 32, prompt: 2048, output: 256}",
    "batch": "write the number of sequences in flight over the whole deployment",
    "prompt": "write prompt: 2048, or prompt: [128, 10240]",
}


def _known(loc: tuple[Any, ...]) -> list[str]:
    """The keys allowed at a place."""
    cls: type[BaseModel] = PlanSpec
    for part in loc:
        field = cls.model_fields.get(str(part))
        cls = next(iter(_models(field.annotation)), cls) if field is not None else cls
    return list(cls.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The schema classes somewhere inside an annotation."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for part in get_args(annotation) for found in _models(part)]


__all__ = ["load_plan", "parse_plan"]
