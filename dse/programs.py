"""How programs are compiled, and kept: what runs for milliseconds is not worth seconds of optimisation.

A command keeps its programs in files (`keep_in`, `dse.program_store`), so that the next one starts with them. A program
is told by its kernel's name and static arguments, so kernels are functions of a module, which close over nothing, and
all else that they depend on is an argument: static ones come first, plain values or other such functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

if TYPE_CHECKING:
    from dse.program_store import Store

Options = Mapping[str, bool | str]
Axes = int | None | tuple[int | None, ...]
Effort = Literal["quick", "fair", "full"]
FULL: dict[str, bool | str] = {}  # XLA's defaults
# XLA's fusion emitters take minutes over a program as large as a Jacobian of the whole model, ten seconds without them;
# and they more than double the time to compile those half as large, which then run in half the time.
LARGE: dict[str, bool | str] = {"xla_cpu_use_fusion_emitters": False}
# A quarter of the compile time for programs that run 2 to 20 times longer; the same numbers but for rounding.
QUICK: dict[str, bool | str] = {"xla_backend_optimization_level": "0", **LARGE}
EFFORTS: Mapping[Effort, Options] = {"quick": QUICK, "fair": LARGE, "full": FULL}
FEW = 100_000  # rows that a quickly compiled program prices before an optimised one would be compiled

# Of JAX's configuration, what a caller can change for some calls; files are told by all of it.
CONTEXT = (
    *("jax_disable_jit", "jax_debug_nans"),
    *("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_numpy_rank_promotion"),
    *("jax_default_device", "jax_default_prng_impl", "jax_threefry_partitionable"),
)


class Program:
    """A jitted kernel. In a process that keeps its programs, calls by value run the kept one, if there is one."""

    def __init__(self, kernel: Callable[..., Any], static: tuple[Any, ...], in_axes: Axes, options: Options) -> None:
        given = partial(kernel, *static) if static else kernel
        self.jitted = jax.jit(
            given if in_axes is None else jax.vmap(given, in_axes), compiler_options=dict(options) or None
        )
        self._said = (kernel, static, in_axes, tuple(sorted(options.items())))
        self._ready: dict[Any, Callable[..., Any]] = {}
        self._locks: dict[Any, Lock] = {}
        self._lock = Lock()

    def __call__(self, *args: Any) -> Any:
        store = _kept.store
        if store is None:
            return self.jitted(*args)
        leaves, tree = jax.tree.flatten((args, {}))
        kinds = tuple(map(_kind, leaves))
        context = tuple([getattr(jax.config, name) for name in CONTEXT])
        if None in kinds or any(context[:2]):  # the caller traces, has placed an array on purpose, or looks for a fault
            return self.jitted(*args)
        key = (tree, kinds, context)
        run = self._ready.get(key)
        return (run or self._find(store, key, args))(*args)

    def _find(self, store: Store, key: Any, args: Any) -> Callable[..., Any]:
        """The program for such arguments: kept, or compiled now; of threads that ask for one, the others wait."""
        with self._lock:
            lock = self._locks.setdefault(key, Lock())
        with lock:
            if key not in self._ready:
                self._ready[key] = self._load(store, key, args)
            return self._ready[key]

    def _load(self, store: Store, key: Any, args: Any) -> Callable[..., Any]:
        tree, kinds, *_ = key
        try:
            said = plain(self._said)
        except TypeError:
            return self.jitted
        name = store.name(said, str(tree), repr(kinds))
        program = store.read(name, tree)
        if program is None:
            program = self.jitted.lower(*args).compile()
            store.write(name, program)
        return program


def program(kernel: Callable[..., Any], *static: Any, in_axes: Axes = None, options: Options = FULL) -> Program:
    """A kernel compiled with some options; `in_axes`: of one row, over rows, as `jax.vmap` has it."""
    return Program(kernel, static, in_axes, options)


def quick(kernel: Callable[..., Any], *static: Any, in_axes: Axes = None) -> Program:
    """A kernel compiled quickly. Not to be called inside another `jit`, `vmap` or derivative: see `by_size`."""
    return Program(kernel, static, in_axes, QUICK)


def by_size(kernel: Callable[..., Any]) -> Callable[[Any], Any]:
    """A kernel of one row over those of one tree: compiled quickly for few, optimised for many or within a trace."""
    few, many = quick(kernel, in_axes=0), program(kernel, in_axes=0)

    def call(batch: Any) -> Any:
        leaves = jax.tree.leaves(batch)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
        return (many if traced or len(leaves[0]) > FEW else few)(batch)

    return call


def derivative(kernel: Callable[..., Any], *args: Any) -> Any:
    """The Jacobian of a kernel by its first argument: itself a kernel, of which the other is a static argument."""
    return jax.jacfwd(kernel)(*args)


# --------------------------------------------------------------------------------------- keeping programs


@dataclass
class _Kept:
    """Where this process keeps its programs."""

    store: Store | None = None


_kept = _Kept()


def keep_in(folder: Path | None) -> bool:
    """From now on this process keeps its programs in a folder (None: nowhere); whether it can.

    For commands, whose functions and constants are what the source files say: not where a caller may replace them.
    """
    from dse.program_store import open_store

    _kept.store = None if folder is None else open_store(folder)
    return _kept.store is not None


def _kind(leaf: Any) -> Any:
    """What a program is compiled for of one argument; None where it should be left to `jit`."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return (leaf.dtype, leaf.shape)
    if type(leaf) in (bool, int, float):
        return type(leaf).__name__
    if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.committed:
        return (leaf.dtype, leaf.shape, *(("weak",) if leaf.weak_type else ()))
    return None


def plain(value: Any) -> str:
    """A static argument in words that say all of it. Raises TypeError where nothing that short can."""
    if value is None or type(value) in (bool, int, float, str):
        return repr(value)
    if type(value) is tuple:
        return f"({' '.join(plain(x) + ',' for x in value)})"
    if isinstance(value, FunctionType):
        if value.__closure__ is None and _found(value) is value:
            return f"{value.__module__}.{value.__qualname__}"
    elif is_dataclass(value) and not isinstance(value, type) and _found(type(value)) is type(value):
        own = (f"{f.name}={plain(getattr(value, f.name))}" for f in fields(value))
        return f"{type(value).__module__}.{type(value).__qualname__}({', '.join(own)})"
    raise TypeError(f"{value!r} does not say all that a program depends on")


def _found(value: Any) -> Any:
    """What this package's source has by the value's name."""
    own = value.__module__.partition(".")[0] == __name__.partition(".")[0]
    return getattr(sys.modules.get(value.__module__), value.__qualname__, None) if own else None


__all__ = ["EFFORTS", "LARGE", "QUICK", "Effort", "by_size", "derivative", "keep_in", "plain", "program", "quick"]
