"""Compiled programs kept in files, so that a later process neither traces nor lowers nor compiles them.

A file's name is the hash of everything that its program follows from: the whole package's files, the versions of
Python, JAX and NumPy, the processor and the number of cores, what the environment and JAX's configuration (x64 too)
say, and what `dse.programs` adds: the kernel, its static arguments, the compiler's options, shapes and dtypes. What is
read is compared with the tree of the arguments once more. A file that is cut short, altered or another version's is
ignored and written again. Where one of these cannot be known (a system without /proc/cpuinfo, a GPU, several devices,
source files changed since the process began) nothing is kept and programs are compiled as usual. So they are where
XLA's own cache is on: an executable that it has read runs, but is not whole once it is written again.

Programs are machine code and read by `pickle`: whoever can write the folder can run code as you. So they are only read
from a folder that is the user's own and that nobody else can write. A digest guards against damage, not against malice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import platform
import re
import stat
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.experimental import serialize_executable

from dse.errors import DseError
from dse.files import atomic_write

SWITCH = "DSE_PROGRAMS"  # an environment variable; `off` keeps nothing
PACKAGE = Path(__file__).parent
MOST_BYTES = 256 * 2**20  # of all kept programs; those not read for longest go first
FORMAT = b"dse program 1\n"
SUFFIX = ".program"
SETTINGS = ("XLA_", "JAX_", "TF_")  # environment variables that the compiler reads


@dataclass(frozen=True)
class Store:
    """A folder of programs of this source on this machine. `began`: when this process did, seconds since 1970."""

    folder: Path
    origin: str
    began: float
    package: Path
    writer: ThreadPoolExecutor

    def name(self, *parts: str) -> str:
        """The name of a program; `parts` say all that differs between programs of one source and machine."""
        return _digest(repr((self.origin, configuration(), parts)).encode())

    def read(self, key: str, tree: Any) -> jax.stages.Compiled | None:
        """A program that takes arguments of this tree; None where none is kept that can be used."""
        path = self.folder / (key + SUFFIX)
        try:
            raw = path.read_bytes()
            head, digest, packed = raw[: len(FORMAT)], raw[len(FORMAT) : len(FORMAT) + 64], raw[len(FORMAT) + 64 :]
            if head != FORMAT or digest != _digest(key.encode() + packed).encode():
                return None
            lapack, payload, inputs, outputs = pickle.loads(zlib.decompress(packed))
            if inputs != tree:
                return None
            if lapack:
                _find_lapack()
            program = serialize_executable.deserialize_and_load(payload, inputs, outputs)
            with contextlib.suppress(OSError):
                os.utime(path)  # read lately: the last to go
        except Exception:  # whatever is wrong with a file, its program can be compiled again
            return None
        return program

    def write(self, key: str, program: jax.stages.Compiled) -> None:
        """Keep a program that has not run yet: one that sorts cannot be taken down once it has.

        One that calls functions of the process is not kept, but for LAPACK's, which `read` finds again. The file is
        written beside other work; the process ends when its files are written.
        """
        try:
            text = program.as_text()
            if text is None:
                return
            called = set(re.findall(r'custom_call_target="([^"]*)"', text))
            if not all(name.startswith("lapack_") for name in called):
                return
            raw = pickle.dumps((bool(called), *serialize_executable.serialize(program)))
        except Exception:  # what cannot be taken down is compiled again next time
            return
        self.writer.submit(self._write, key, raw)

    def _write(self, key: str, raw: bytes) -> None:
        if changed_since(self.package, self.began):
            return
        packed = zlib.compress(raw, 1)
        with contextlib.suppress(DseError, OSError):
            atomic_write(self.folder / (key + SUFFIX), FORMAT + _digest(key.encode() + packed).encode() + packed)
            self._prune()

    def _prune(self) -> None:
        """Remove the programs not read for longest, until the others fit."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process has just removed it
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= MOST_BYTES:
                break
            path.unlink(missing_ok=True)
            total -= size


def open_store(folder: Path, package: Path = PACKAGE) -> Store | None:
    """The store in a folder, made if need be; None where programs cannot be kept safely (see above)."""
    began, machine = _process_start(), _machine()
    if os.environ.get(SWITCH, "").lower() in ("off", "0") or began is None or machine is None:
        return None
    if jax.default_backend() != "cpu" or jax.device_count() != 1 or changed_since(package, began):
        return None
    if jax.config.values["jax_compilation_cache_dir"] is not None:  # what XLA's own cache hands out cannot be rewritten
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    versions = (sys.version, jax.__version__, jaxlib.__version__, np.__version__)
    backend = jax.devices()[0].client.platform_version
    return Store(
        folder=folder,
        origin=repr((source_digest(package), versions, backend, machine)),
        began=began,
        package=package,
        writer=ThreadPoolExecutor(1, "program-store"),
    )


def configuration() -> str:
    """JAX's configuration as this thread sees it, and the compiler's part of the environment."""
    names = sorted(jax.config.values)
    now = [(name, getattr(jax.config, name, jax.config.values[name])) for name in names]
    return repr((now, sorted((k, v) for k, v in os.environ.items() if k.startswith(SETTINGS))))


def source_digest(package: Path) -> str:
    """Of all files of the package, catalogue included."""
    return _digest(repr([(name, _digest((package / name).read_bytes())) for name in _names(package)]).encode())


def changed_since(package: Path, moment: float) -> bool:
    """Whether a file of the package changed since: what this process runs may then not be what the files say."""
    return any((package / name).stat().st_ctime >= moment for name in _names(package))


def _names(package: Path) -> list[str]:
    """Files of the package, but for what Python writes beside them."""
    found = (path for path in package.rglob("*") if "__pycache__" not in path.parts and path.is_file())
    return sorted(str(path.relative_to(package)) for path in found)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def _find_lapack() -> None:
    """JAX looks for LAPACK when it first lowers a call of it: a program that was not lowered here would jump to 0."""
    jax.jit(jnp.linalg.cholesky).lower(np.eye(1, dtype=np.float32))


def _process_start() -> float | None:
    """Seconds since 1970 at which this process began; None where the system does not say (other than Linux)."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    return time.time() - age


def _machine() -> str | None:
    """The processor, its features and the cores that may be used; None where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    telling = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features", "CPU")
    found = sorted({line for line in lines if line.startswith(telling)})
    return repr((platform.machine(), found, os.cpu_count(), len(os.sched_getaffinity(0)))) if found else None


__all__ = ["Store", "changed_since", "configuration", "open_store", "source_digest"]
