"""Outputs that appear whole: written beside their place under another name, then renamed. Tables and YAML as read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dse.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

DEEPEST = 50  # levels of a YAML file
MOST_NODES = 4_000_000  # values of a YAML file


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


def output_file(path: str | Path) -> None:
    """Raises InputError where no file can be written: worth asking before a long run."""
    path = Path(path)
    if _is_stream(path):
        return
    if path.is_dir():
        raise InputError(f"{path}: is a directory; name a file in it")
    try:
        probe = path.resolve().with_name(f".{secrets.token_hex(8)}.tmp")
        _write(probe, b"")
        probe.unlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unwritable(path, error) from None


def read_csv(path: str | Path, what: str = "a CSV file", **options: Any) -> pd.DataFrame:
    """`pandas.read_csv` of a table with a header; `what` is the remedy.

    Raises InputError where the file cannot be read, a column stands twice, or rows have more cells than the header
    (pandas would rename the one, and take the first cells of the other as an index).
    """
    import pandas as pd

    _readable(Path(path), what)
    try:
        table = pd.read_csv(path, **options)
        first = {**options, "header": None, "nrows": 1, "dtype": str, "keep_default_na": False}
        head = pd.read_csv(path, **first) if Path(path).is_file() else table.columns.to_frame().T  # a pipe is read once
    except pd.errors.EmptyDataError:
        raise InputError(f"{path}: is empty; give {what} with a line of column names") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as CSV ({reason}); give {what}, as UTF-8 text") from None
    names = [name.strip() for name in head.iloc[0]]
    twice = [name for name in names if name and names.count(name) > 1]
    if twice:
        raise InputError(f"{path}: column {twice[0]!r} stands twice; keep one")
    if not isinstance(table.index, pd.RangeIndex):
        raise InputError(
            f"{path}: rows have more cells than the header, which names {len(names)} columns; name every column, and "
            "quote cells that hold a comma"
        )
    return table


def read_parquet(path: str | Path) -> pd.DataFrame:
    """A parquet table, or one InputError."""
    import pandas as pd

    _readable(Path(path), "a CSV or parquet file")
    try:
        return pd.read_parquet(path)
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'dse[parquet]', or give CSV") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _readable(path: Path, what: str) -> None:
    if path.is_dir():
        raise InputError(f"{path}: cannot be read (it is a directory); give {what}")
    if not path.exists():
        raise InputError(f"{path}: does not exist; give {what}")


def read_yaml(path: str | Path, remedy: str = "give a YAML file") -> Any:
    """The plain data of a YAML file that a person gives; `load_yaml` has what is refused."""
    return load_yaml(yaml_text(path, remedy), str(path))


def yaml_text(path: str | Path, remedy: str = "give a YAML file") -> str:
    """The text of a file that a person gives; one InputError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # a NUL in a name, bytes that are no UTF-8
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from None


def load_yaml(text: str, where: str) -> Any:
    """A YAML text as plain data, by the C loader where there is one. `where` begins every message.

    Raises InputError with the line where it is not YAML, writes a key twice (YAML would take the last one), nests
    deeper than DEEPEST, or holds more than MOST_NODES values once aliases are followed.
    """
    import yaml

    try:
        _refuse_deep(text, where)
        data = yaml.load(text, Loader=_yaml_loader())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark is not None else ""
        what = " ".join(str(error.problem or error.context or "cannot be read").split())
        raise InputError(
            f"{where}:{line}: not valid YAML: {what}; is the file whole, and indented with spaces?"
        ) from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    _refuse_large(data, where)
    return data


@cache
def _yaml_loader() -> Any:
    """Safe YAML in which a key written twice is an error."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: dict[str, int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                if key.value in seen:
                    problem = f"key {key.value!r} is written twice (also on line {seen[key.value]}); keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.value] = key.start_mark.line + 1
            found: dict[Any, Any] = super().construct_mapping(node, deep)
            return found

    return Loader


def _refuse_deep(text: str, where: str) -> None:
    """Before it is loaded: the loader recurses, and the C one crashes."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_yaml_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise InputError(f"{where}: nested too deeply (allowed: {DEEPEST} levels); is it the right file?")


def _refuse_large(data: Any, where: str) -> None:
    """What aliases blow up (or tie into a ring), before anything walks it."""
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


__all__ = [
    "atomic_write",
    "atomic_write_all",
    "load_yaml",
    "output_directory",
    "output_file",
    "read_csv",
    "read_parquet",
    "read_yaml",
    "yaml_text",
]
