"""Reading a YAML file that a person wrote: every way it can be unusable ends in one `InputError`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dse.errors import InputError
from dse.files import load_yaml

LARGEST_FILE = 16 * 2**20
SPACE = "a search space names at least models, clusters, gpus and workloads"


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
    data = load_yaml(text, where)
    if data is None:
        raise InputError(f"{where}: is empty; {least}")
    if not isinstance(data, dict):
        raise InputError(f"{where}: holds a {type(data).__name__}, not keys with values; {least}")
    return data


__all__ = ["parse_yaml", "read_text"]
