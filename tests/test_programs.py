"""Kept programs: the same answers, found only where everything that they follow from is the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np
import pytest

from dse import program_store, programs
from dse.numerics import safe_divide
from dse.program_store import Store, open_store
from dse.programs import QUICK, Program, by_size, plain, program
from dse.search.kernel import Questions

A, B = np.array([1.0, 2.0, 3.0]), np.array([3.0, 0.0, 7.0])


class Spy:
    """A jitted function that counts how often it was traced ahead of time, and called as it is."""

    def __init__(self, jitted: Any) -> None:
        self.jitted, self.lowered, self.called = jitted, 0, 0

    def lower(self, *args: Any) -> Any:
        self.lowered += 1
        return self.jitted.lower(*args)

    def __call__(self, *args: Any) -> Any:
        self.called += 1
        return self.jitted(*args)


def spied(make: Callable[[], Program]) -> tuple[Program, Spy]:
    """A program as a new process has it: nothing in memory."""
    made = make()
    made.jitted = Spy(made.jitted)
    return made, made.jitted


def divide() -> Program:
    return program(safe_divide)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "model.py").write_text("x = 1\n")
    return folder


@pytest.fixture
def opened(tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Store | None]]:
    """Opens a store of `package` for this process, which is taken to be younger than the test's files."""
    monkeypatch.delenv(program_store.SWITCH, raising=False)
    monkeypatch.setattr(program_store, "_process_start", lambda: time.time() + 60.0)
    xla = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)

    def open_one() -> Store | None:
        store = open_store(tmp_path / "kept", package)
        monkeypatch.setattr(programs._kept, "store", store)
        return store

    yield open_one
    jax.config.update("jax_compilation_cache_dir", xla)


@pytest.fixture
def store(opened: Callable[[], Store | None]) -> Store:
    found = opened()
    assert found is not None
    return found


def files(store: Store) -> list[Path]:
    """The kept programs, once all are written."""
    store.writer.submit(int).result()
    return sorted(store.folder.iterdir())


def test_a_kept_program_is_not_traced_again_and_says_the_same(store: Store) -> None:
    first, spy = spied(divide)
    told = [np.asarray(first(A, B)) for _ in range(3)]
    assert (spy.lowered, spy.called) == (1, 0)
    assert len(files(store)) == 1
    second, spy = spied(divide)
    again = np.asarray(second(A, B))
    assert (spy.lowered, spy.called) == (0, 0)
    assert {x.tobytes() for x in (*told, again)} == {np.asarray(safe_divide(A, B)).tobytes()}
    assert len(files(store)) == 1


def test_what_shapes_a_program_tells_it(store: Store) -> None:
    calls: list[tuple[Callable[[], Program], Any, bool]] = [
        (divide, (A, B), False),
        (divide, (A, B), True),
        (divide, (A[:2], B[:2]), False),
        (divide, (A.astype(np.float32), B), False),
        (divide, tuple(x.astype(jax.numpy.float8_e4m3fn) for x in (A, B)), False),
        (divide, tuple(x.astype(jax.numpy.float8_e5m2) for x in (A, B)), False),
        (divide, (A, 2.0), False),  # a Python number is weakly typed
        (divide, (A, np.float64(2.0)), False),
        (lambda: program(safe_divide, options=QUICK), (A, B), False),
        (lambda: program(safe_divide, in_axes=0), (A, B), False),
        (lambda: program(safe_divide, in_axes=(0, None)), (A, 2.0), False),
        (lambda: program(safe_divide, 1.0), (B,), False),
        (lambda: program(safe_divide, 2.0), (B,), False),
    ]
    for n, (make, args, double) in enumerate(calls, 1):
        with jax.enable_x64(double):
            made, spy = spied(make)
            assert np.array_equal(made(*args), made.jitted.jitted(*args))
        assert spy.lowered == 1
        assert len(files(store)) == n


def test_the_environment_and_the_configuration_tell_a_program(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.name("kernel")
    assert store.name("kernel") == before != store.name("other")
    with jax.default_matmul_precision("highest"):
        assert store.name("kernel") != before
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true")
    assert store.name("kernel") != before


@pytest.mark.parametrize("edit", [lambda p: p.write_text("x = 2\n"), lambda p: p.with_name("gpus.yaml").write_text("")])
def test_a_changed_source_compiles_again(opened: Any, package: Path, edit: Callable[[Path], Any]) -> None:
    for lowered in (1, 0):
        store = opened()
        made, spy = spied(divide)
        made(A, B)
        assert spy.lowered == lowered
        files(store)
    edit(package / "model.py")
    store = opened()
    made, spy = spied(divide)
    made(A, B)
    assert spy.lowered == 1
    assert len(files(store)) == 2


def test_a_source_changed_since_the_process_began_keeps_nothing(opened: Any, package: Path, monkeypatch: Any) -> None:
    store = opened()
    monkeypatch.setattr(program_store, "_process_start", lambda: time.time() - 60.0)
    assert opened() is None
    made, spy = spied(divide)
    made(A, B)
    assert (spy.lowered, spy.called) == (0, 1)
    late = Store(store.folder, store.origin, time.time() - 60.0, package, store.writer)  # changed after it was opened
    late.write(late.name("kernel"), jax.jit(safe_divide).lower(A, B).compile())
    assert files(store) == []


def spoil_half(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_byte(path: Path, _: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_half,
        spoil_byte,
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(b"not a program"),
        lambda path, _: path.write_bytes(b"dse program 0\n" + path.read_bytes()[len(program_store.FORMAT) :]),
        lambda path, other: path.write_bytes(other.read_bytes()),
    ],
    ids=["cut short", "altered", "empty", "foreign", "another version's", "another program's"],
)
def test_a_damaged_file_is_compiled_again_and_replaced(store: Store, spoil: Callable[[Path, Path], Any]) -> None:
    program(safe_divide, 1.0)(B)
    (other,) = files(store)
    divide()(A, B)
    (path,) = set(files(store)) - {other}
    whole = path.read_bytes()
    spoil(path, other)
    for lowered in (1, 0):
        made, spy = spied(divide)
        assert np.array_equal(made(A, B), safe_divide(A, B))
        assert spy.lowered == lowered
        assert set(files(store)) == {path, other}
    assert len(path.read_bytes()) == pytest.approx(len(whole), rel=0.05)


def test_arguments_of_another_tree_are_refused(store: Store) -> None:
    name = store.name("kernel")
    store.write(name, jax.jit(safe_divide).lower(A, B).compile())
    files(store)
    trees = [jax.tree.structure((args, {})) for args in ((A, B), (A,), ((A, B),), (A, [B]))]
    assert [store.read(name, tree) is not None for tree in trees] == [True, False, False, False]
    assert store.read(store.name("another kernel"), trees[0]) is None


def test_a_program_is_taken_down_before_it_runs(store: Store) -> None:
    """XLA gives a sort a function of the process when it first runs, which cannot be written."""
    gate = Event()
    store.writer.submit(gate.wait)
    name, tree = store.name("sort"), jax.tree.structure(((B,), {}))
    made = jax.jit(jax.numpy.sort).lower(B).compile()
    store.write(name, made)
    told = np.asarray(made(B))
    gate.set()
    assert len(files(store)) == 1
    kept = store.read(name, tree)
    assert kept is not None
    assert np.asarray(kept(B)).tolist() == told.tolist() == sorted(B)


SOLVER = """
import sys
from pathlib import Path
import jax, numpy as np
from dse.program_store import open_store
store, args = open_store(Path(sys.argv[1])), (np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([1.0, 2.0]))
name = store.name("solve")
made = store.read(name, jax.tree.structure((args, {})))
print("read" if made else "compiled")
if not made:
    made = jax.jit(jax.numpy.linalg.solve).lower(*args).compile()
    store.write(name, made)
print(np.asarray(made(*args)).tobytes().hex())
"""


def test_a_program_that_calls_lapack_finds_it_in_another_process(tmp_path: Path) -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    command = [sys.executable, "-c", SOLVER, str(tmp_path / "kept")]
    told = [
        subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)
    ]
    assert [how for how, _ in told] == ["compiled", "read"]
    assert told[0][1] == told[1][1]


def test_a_program_that_calls_a_function_of_the_process_is_not_kept(store: Store) -> None:
    def called(a: Any) -> Any:
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((3,), np.float32), a)

    store.write(store.name("callback"), jax.jit(called).lower(A.astype(np.float32)).compile())
    assert files(store) == []


def test_where_programs_cannot_be_kept_safely_none_are(opened: Any, tmp_path: Path, monkeypatch: Any) -> None:
    kept = tmp_path / "kept"
    assert opened() is not None
    assert kept.stat().st_mode & 0o077 == 0
    kept.chmod(0o770)
    assert opened() is None
    kept.chmod(0o700)
    monkeypatch.setenv(program_store.SWITCH, "off")
    assert opened() is None
    monkeypatch.delenv(program_store.SWITCH)
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert opened() is None
    monkeypatch.undo()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert open_store(kept) is None


@pytest.mark.parametrize("unknown", ["_machine", "_process_start"])
def test_a_system_that_does_not_say_what_it_is_keeps_nothing(opened: Any, monkeypatch: Any, unknown: str) -> None:
    monkeypatch.setattr(program_store, unknown, lambda: None)
    assert opened() is None


def test_a_kernel_that_closes_over_something_is_compiled_as_usual(store: Store) -> None:
    scale = 2.0
    made, spy = spied(lambda: program(lambda a: a * scale))
    assert np.array_equal(made(A), 2.0 * A)
    assert (spy.lowered, spy.called) == (0, 1)
    assert files(store) == []


def test_traces_go_the_ordinary_way(store: Store) -> None:
    made, spy = spied(divide)
    made(A, B)
    slope = jax.grad(lambda a: made(a, 4.0))(3.0)
    assert slope == 0.25
    assert np.array_equal(jax.vmap(lambda b: made(1.0, b))(B), safe_divide(1.0, B))
    assert np.allclose(jax.jit(lambda a: made(a, B))(A), safe_divide(A, B), rtol=1e-6)
    with jax.disable_jit():
        assert np.array_equal(made(A, B), safe_divide(A, B))
    assert spy.lowered == 1
    assert spy.called == 4
    assert float(jax.grad(lambda a: by_size(jax.numpy.sum)(a).sum())(A)[0]) == 1.0


def test_threads_that_ask_for_one_program_compile_it_once(store: Store) -> None:
    made, spy = spied(divide)
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: np.asarray(made(A, B)).tobytes(), range(16)))
    assert len(set(told)) == 1
    assert (spy.lowered, spy.called) == (1, 0)


def test_the_programs_not_read_for_longest_go_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (1.0, 2.0, 3.0):
        program(safe_divide, value)(B)
        newest = max(files(store), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (value, value))
    oldest, middle, _ = sorted(files(store), key=lambda path: path.stat().st_mtime)
    made, spy = spied(lambda: program(safe_divide, 1.0))
    made(B)  # read: no longer the oldest
    assert spy.lowered == 0
    monkeypatch.setattr(program_store, "MOST_BYTES", 1.1 * sum(path.stat().st_size for path in files(store)))
    program(safe_divide, 4.0)(B)
    left = files(store)
    assert len(left) == 3
    assert oldest in left
    assert middle not in left


def test_static_arguments_are_told_in_words_that_say_all_of_them() -> None:
    values = [1, 1.0, True, "1", None, (1,), ((1,),), (1, 1), ("1", "1"), "(1,)", 0.0, -0.0, float("nan"), safe_divide]
    asked = [Questions((("ttft_ms", "max"),), ()), Questions((), (("ttft_ms", "max"),))]
    assert len({plain(value) for value in (*values, *asked)}) == len(values) + len(asked)

    @dataclass(frozen=True)
    class Local:
        x: int = 1

    for value in (A, [1], {"a": 1}, np.float64(1.0), lambda x: x, Local(), Questions, np.sum, object()):
        with pytest.raises(TypeError, match="does not say all"):
            plain(value)
    with pytest.raises(TypeError):
        plain((1, (A,)))


COMMAND = """
import sys
from jax import monitoring
traced = []
monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **about: traced.append(seconds) if "trace_duration" in name else None)
from dse.cli import main
sys.argv[0] = "dse"
try:
    main()
finally:
    print("traced", len(traced))
"""


def test_a_second_command_traces_nothing_and_writes_the_same(tmp_path: Path) -> None:
    cases = tmp_path / "cases.csv"
    cases.write_text(
        "model,gpu,isl,osl,tp,concurrency\nLlama-3.1-8B,h100,1024,256,1,16\nDeepSeek-V3,h200,4096,9,8,32\n"
    )
    own = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    told = []
    for run in ("first", "second", "off"):
        switch = {program_store.SWITCH: "off"} if run == "off" else {}
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "estimate", str(cases), "-o", str(tmp_path / f"{run}.csv")],
            env=own | switch | {"DSE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        told.append(int(done.stdout.split()[-1]))
    assert told[0] > 0
    assert told[1] == 0
    assert told[2] > 0
    assert len({(tmp_path / f"{run}.csv").read_bytes() for run in ("first", "second", "off")}) == 1
