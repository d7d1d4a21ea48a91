"""What a file of GPUs or clusters says: every number with its own source, `{value: 3350, source: "datasheet, 2023"}`.

Units at this edge are in the names (GB/s, GiB, us, W, USD); `dse.catalog.hardware` converts to SI. Errors are collected
by pydantic with their paths and leave here as one `InputError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from dse.errors import InputError
from dse.files import load_yaml, yaml_text

File = TypeVar("File", bound=BaseModel)
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_finite = {"strict": True, "allow_inf_nan": False}


class Spec(BaseModel):
    """Unknown keys are errors; entries are values, never changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Positive(Spec):
    """A number > 0 and where it is from."""

    value: Annotated[float, Field(gt=0, **_finite)]
    source: Text


class NonNegative(Spec):
    """A number >= 0 (0: the hardware has none) and where it is from."""

    value: Annotated[float, Field(ge=0, **_finite)]
    source: Text


class AtLeastOne(Spec):
    """A ratio >= 1 and where it is from."""

    value: Annotated[float, Field(ge=1, **_finite)]
    source: Text


class Count(Spec):
    """A whole number >= 1 and where it is from."""

    value: Annotated[int, Field(ge=1, strict=True)]
    source: Text


class Flag(Spec):
    """Yes or no and where it is from."""

    value: Annotated[bool, Field(strict=True)]
    source: Text


class NamedEntry(Spec):
    """Something a person asks for by name."""

    name: Text
    aliases: tuple[Text, ...] = ()


class GpuEntry(NamedEntry):
    """One accelerator: one package where a package has several dies. Peaks are dense; 0 where there is no such unit."""

    vendor: Text
    generation: Text
    status: Literal["shipping", "announced"] = "shipping"
    peak_bf16_tflops: Positive
    peak_fp8_tflops: NonNegative
    peak_fp4_tflops: NonNegative
    peak_int8_tops: NonNegative
    hbm_gb_s: Positive
    sms: Positive | None = None  # SMs, compute units or MXUs; the catalogue has the three of every GPU, a person's
    clock_ghz: Positive | None = None  # own entry may leave them out: single kernels are then priced as on an H100
    l2_mib: Positive | None = None  # last-level cache
    capacity_gb: Positive  # as marketed
    capacity_gib: Positive  # as software sees it
    tdp_w: Positive
    price_usd_hour: NonNegative
    default_cluster: Text


class LevelEntry(Spec):
    """One level of a network, innermost first; see `dse.cost.types.Level`."""

    name: Text
    size: Count
    bandwidth_gb_s: Positive  # what one GPU can send, one direction
    latency_us: NonNegative  # one point-to-point hop, low-latency protocol
    oversubscription: AtLeastOne
    rails: Flag | None = None  # false: a ring leaves a unit through one flow, not one a GPU


class ClusterEntry(NamedEntry):
    """A network hierarchy, and the GPUs it is built for (the usual one first)."""

    default_gpus: tuple[Text, ...] = ()
    multicast: Flag
    levels: Annotated[tuple[LevelEntry, ...], Field(min_length=1)]


def _named(entries: Any) -> Any:
    """The key of an entry is its name."""
    if not isinstance(entries, Mapping):
        return entries
    for key, entry in entries.items():
        if isinstance(entry, Mapping) and "name" in entry:
            raise ValueError(f"entry {key!r} also says name: {entry['name']!r}; its key is its name, remove the line")
    return {key: {**entry, "name": key} if isinstance(entry, Mapping) else entry for key, entry in entries.items()}


class GpuFile(Spec):
    """A file of GPUs."""

    gpus: Annotated[dict[Text, GpuEntry], Field(min_length=1)]
    _name = field_validator("gpus", mode="before")(_named)


class ClusterFile(Spec):
    """A file of clusters."""

    clusters: Annotated[dict[Text, ClusterEntry], Field(min_length=1)]
    _name = field_validator("clusters", mode="before")(_named)


# ------------------------------------------------------------------------------------------------ reading


def read(path: Path, model: type[File]) -> File:
    """A YAML file as `model`; whatever is wrong with it is one `InputError`."""
    return parse(yaml_text(path, "give a YAML file in UTF-8"), model, str(path))


def parse(text: str, model: type[File], where: str) -> File:
    """YAML text as `model`; `where` starts the message of every error."""
    try:
        return model.model_validate(load_yaml(text, where))
    except ValidationError as error:
        raise InputError(_message(error, model, where)) from None


def _message(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """All problems as one text: `file: gpus.mine.hbm_gb_s.value: -3.0: should be greater than 0`."""
    problems = []
    for item in error.errors(include_url=False):
        path = ".".join(str(part) for part in item["loc"]) or "the file"
        problems.append(f"{where}: {path}: {_explain(item['type'], item['loc'], item['input'], item['msg'], model)}")
    return "\n".join(problems)


def _explain(kind: str, loc: tuple[int | str, ...], value: Any, text: str, model: type[BaseModel]) -> str:
    """Value, what is allowed and the remedy, of one problem."""
    parent = _model_at(model, loc[:-1])
    fields = sorted(parent.model_fields) if parent else []
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(loc[-1]), fields, n=1, cutoff=0.5)
        return f"unknown key {str(loc[-1])!r} ({f'nearest: {near[0]}; ' if near else ''}allowed: {', '.join(fields)})"
    here = _model_at(model, loc)
    keys = sorted(here.model_fields) if here else []
    if kind == "missing":
        if loc[-1] == "source":
            return "missing; say where the number is from"
        return "missing" + (
            f'; write {loc[-1]}: {{value: ..., source: "..."}}' if "source" in keys else "; it is needed"
        )
    if kind in ("model_type", "dict_type"):
        if "source" in keys:
            return f'{value!r} has no source; write {{value: {value}, source: "..."}}'
        return f"{value!r}: must be a mapping" + (f" with the keys {', '.join(keys)}" if keys else "")
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return f"{value!r} is text; write a number without quotes, its exponent as in 1.0e+3"
    if kind == "value_error":
        return text.removeprefix("Value error, ")
    return f"{value!r}: {text[0].lower()}{text[1:]}"


def _model_at(model: Any, loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The schema class that stands at a path, if it is one."""
    at = model
    for part in loc:
        if isinstance(at, type) and issubclass(at, BaseModel):
            field = at.model_fields.get(str(part))
            at = _required(field.annotation) if field else None
        else:  # dict[str, Entry] or tuple[Entry, ...]
            at = next((a for a in get_args(at) if isinstance(a, type) and issubclass(a, BaseModel)), None)
    return at if isinstance(at, type) and issubclass(at, BaseModel) else None


def _required(annotation: Any) -> Any:
    """`Positive` of `Positive | None`."""
    kinds = get_args(annotation)
    return next(kind for kind in kinds if kind is not type(None)) if type(None) in kinds else annotation
