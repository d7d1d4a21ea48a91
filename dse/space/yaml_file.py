"""Reading a YAML file that a person wrote: every way it can be unusable ends in one `InputError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dse.errors import InputError
from dse.files import refuse_deep_yaml

LARGEST_FILE = 16 * 2**20
MOST_NODES = 4_000_000
SPACE = "a search space names at least models, clusters, gpus and workloads"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe YAML in which a key written twice is an error, not the last one wins."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key_node.value!r} is written twice (also on line {seen[key_node.value]}); keep one",
                    key_node.start_mark,
                )
            seen[key_node.value] = line
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """The text of a file, or an `InputError` that says why there is none."""
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a directory; give the YAML file{_candidates(path)}")
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes are too many for a search space (allowed: {LARGEST_FILE})"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path{_candidates(path.parent)}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if b"\0" in data:
        raise InputError(f"{path}: is a binary file, not YAML; give a text file such as search_spaces/quickstart.yaml")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _candidates(folder: Path) -> str:
    try:
        names = sorted(p.name for p in folder.glob("*.yaml"))[:8]
    except OSError:
        names = []
    return f" (there: {', '.join(names)})" if names else ""


def parse_yaml(text: str, where: str, least: str = SPACE) -> dict[str, Any]:
    """The mapping that a YAML text holds; `least`: what such a file is, and the keys that it needs."""
    try:
        refuse_deep_yaml(text, where)
        data = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark is not None else ""
        what = " ".join(str(error.problem or error.context or "cannot be read").split())
        raise InputError(
            f"{where}:{line}: not valid YAML: {what}; is the file whole, and indented with spaces?"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        raise InputError(f"{where}: is empty; {least}")
    if not isinstance(data, dict):
        raise InputError(f"{where}: holds a {type(data).__name__}, not keys with values; {least}")
    _bounded(data, where)
    return data


def _bounded(data: Any, where: str) -> None:
    """Refuse what aliases blow up (or tie into a ring) before anything walks it."""
    stack, count = [data], 0
    while stack:
        item = stack.pop()
        count += 1
        if count > MOST_NODES:
            raise InputError(f"{where}: more than {MOST_NODES} values once aliases are followed; write ranges instead")
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


__all__ = ["parse_yaml", "read_text"]
