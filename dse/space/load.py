"""From a file (or plain data) to a `SpaceSpec`, or a `PipelineSpec`; all that is wrong with it in one `InputError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from dse.errors import InputError
from dse.space import values as v
from dse.space.pipeline import PipelineSpec
from dse.space.schema import ALIASES, Axes, SpaceSpec
from dse.space.yaml_file import parse_yaml, read_text

MOST_SHOWN = 10
Loc = tuple[Any, ...]  # keys and indices, as pydantic has them


def load_any(path: str | Path) -> SpaceSpec | PipelineSpec:
    """The search space in a YAML file: of one model, or (with the key `pipeline`) of a pipeline."""
    path = Path(path)
    data = parse_yaml(read_text(path), str(path))
    return parse_pipeline(data, str(path)) if "pipeline" in data else parse_space(data, str(path))


def load_space(path: str | Path) -> SpaceSpec:
    """The search space of one model in a YAML file."""
    spec = load_any(path)
    if isinstance(spec, PipelineSpec):
        raise InputError(f"{path}: is a pipeline of several models, which only `dse search` reads")
    return spec


def parse_space(mapping: Mapping[str, Any], where: str = "space") -> SpaceSpec:
    """The search space in plain data; `where` begins every message."""
    if not isinstance(mapping, Mapping):
        raise InputError(
            f"{where}: expected keys with values (models: ..., clusters: ..., ...), got {v.shown(mapping)}"
        )
    try:
        spec = SpaceSpec.model_validate(dict(mapping))
    except ValidationError as error:
        raise together(where, [_line(item, SpaceSpec) for item in error.errors(include_url=False)]) from None
    spec._where = where
    return spec


def parse_pipeline(mapping: Mapping[str, Any], where: str = "pipeline") -> PipelineSpec:
    """The pipeline in plain data; `where` begins every message."""
    try:
        spec = PipelineSpec.model_validate(dict(mapping))
    except ValidationError as error:
        raise together(where, [_line(item, PipelineSpec) for item in error.errors(include_url=False)]) from None
    spec._where = where
    return spec


def together(where: str, problems: list[str]) -> InputError:
    """One error of one or several problems, each `place: what (allowed); remedy`."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return InputError(f"{where}: {problems[0]}")
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return InputError("\n  ".join([f"{where}: {len(problems)} problems", *problems[:MOST_SHOWN], *more]))


def problem(
    item: Any, loc: Loc, place: Callable[[Loc], str], known: Callable[[Loc], list[str]], remedy: Callable[[Loc], str]
) -> str:
    """One of pydantic's errors, at `loc`, as a line. `place` writes a location, `known` lists its keys."""
    here = place(loc)
    if item["type"] == "extra_forbidden":
        return f"{place(loc[:-1]) or 'top level'}: {v.nearest(loc[-1], known(loc[:-1]), 'key')}"
    if item["type"] == "missing":
        return f"{here}: is required; {remedy(loc)}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] in ("model_type", "model_attributes_type", "dict_type", "list_type"):
        message = f"{v.shown(item['input'])} is not {'a list' if item['type'] == 'list_type' else 'keys with values'}"
    elif item["type"] != "value_error":
        message = f"{message} (got {v.shown(item['input'])})"
    return f"{here}{message}" if message.startswith((".", "[")) else f"{here or 'top level'}: {message}"


def _line(item: Any, root: type[BaseModel]) -> str:
    def remedy(loc: Loc) -> str:
        return _REMEDIES.get(_place(loc).split("[")[0], "add it")

    return problem(item, item["loc"], _place, lambda loc: _known(loc, root), remedy)


_REMEDIES = {
    "models": "write models: [Llama-3.1-70B] (`dse models` lists them)",
    "clusters": "write clusters: [h100-dgx] (`dse gpus` lists them)",
    "gpus": "write gpus: [8, 16], the GPUs of the whole deployment",
    "workloads": "write workloads: [{isl: 2048, osl: 512}]",
}


def _place(loc: Loc) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def _known(loc: Loc, root: type[BaseModel]) -> list[str]:
    """The keys allowed at a place, by walking the spec's classes from `root`."""
    cls = root
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = cls.model_fields[str(part)].annotation
        nested = [annotation, *get_args(annotation), *(x for arg in get_args(annotation) for x in get_args(arg))]
        cls = next(t for t in nested if isinstance(t, type) and issubclass(t, BaseModel))
    return [*cls.model_fields, *(ALIASES if cls is Axes else ())]


__all__ = ["load_any", "load_space", "parse_pipeline", "parse_space", "problem", "together"]
