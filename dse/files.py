"""Outputs that appear whole: written beside their place under another name, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from dse.errors import InputError


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write one file whole or not at all. A device or pipe (`/dev/stdout`) is written as it is."""
    atomic_write_all({Path(path): data})


def atomic_write_all(files: Mapping[Path, str | bytes]) -> None:
    """Write several files: all contents are on disk before the first one takes its place.

    Raises InputError (place, why, remedy); then, or when interrupted, old files are untouched and nothing is left over.
    """
    staged: list[tuple[Path, Path]] = []
    try:
        for asked, data in files.items():
            raw = data.encode() if isinstance(data, str) else data
            try:
                path = asked if _is_stream(asked) else asked.resolve()  # through a link, not over it
                if _is_stream(asked):
                    path.write_bytes(raw)
                    continue
                if path.is_dir():
                    raise InputError(f"{asked}: is a directory; name a file in it")
                temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
                staged.append((temporary, path))
                _write(temporary, raw)
            except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL in a name
                raise _unwritable(asked, error) from None
        for temporary, path in staged:
            try:
                os.replace(temporary, path)
            except OSError as error:
                raise _unwritable(path, error) from None
    finally:
        for temporary, _ in staged:
            with contextlib.suppress(OSError):
                temporary.unlink()


def output_directory(path: str | Path) -> Path:
    """An existing directory that can be written to, made if need be: worth asking before a long run."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{secrets.token_hex(8)}.tmp"
        _write(probe, b"")
        probe.unlink()
    except FileExistsError:
        raise InputError(f"{path}: is a file, not a directory; choose another place for the outputs") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path}: cannot be created or written: {reason}; choose another directory for the outputs"
        ) from None
    return path


def _write(path: Path, raw: bytes) -> None:
    """A new file with the usual permissions, on disk when this returns."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


def _is_stream(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _unwritable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: cannot be written: {reason}; choose another place, or free space and permissions")


__all__ = ["atomic_write", "atomic_write_all", "output_directory"]
