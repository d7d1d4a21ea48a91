"""One program a structure: batches that mix models, GPUs, clusters, loads and plans do not compile again."""

from __future__ import annotations

import jax
import numpy as np
from scenarios import random_scenarios

from dse.cost.evaluate import estimate, estimate_one
from dse.cost.types import replace, stack


def test_one_trace_serves_every_batch_of_a_structure() -> None:
    traces = 0

    def counted(x: object) -> object:
        nonlocal traces
        traces += 1
        return estimate_one(x).memory  # the cheap part of the program: what is traced is all of it

    program = jax.jit(jax.vmap(counted))
    for seed in (21, 22, 23):
        batch = random_scenarios(16, seed)
        assert len({x.architecture.hidden for x in batch}) > 1
        assert len({x.device.peak_bf16 for x in batch}) > 1
        assert len({x.topology.levels[0].size for x in batch}) > 1
        program(stack(batch))
    assert traces == 1
    longer = stack(random_scenarios(17, 24))
    program(longer)
    assert traces == 2  # a new length is a new program: sweeps pad to one


def test_estimate_itself_compiles_once_for_the_shared_batch(random_batch: list) -> None:
    """A second call of the same shape takes the program of the first: no compilation is logged."""
    estimate(stack(random_batch))
    with jax.log_compiles(), _Heard() as heard:
        estimate(stack(random_batch[::-1]))
    assert not heard.compiled, heard.compiled


class _Heard:
    """Compilations that JAX logs."""

    def __enter__(self) -> _Heard:
        import logging

        self.compiled: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.compiled.append(record.getMessage())  # type: ignore[method-assign]
        self.logger = logging.getLogger("jax")
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self.handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.propagate = self.propagate
        self.compiled = [message for message in self.compiled if "estimate" in message]


def test_leaves_of_any_float_type_are_one_structure() -> None:
    batch = random_scenarios(2, 25)
    trees = [jax.tree.structure(x) for x in batch]
    assert trees[0] == trees[1]
    assert all(np.asarray(leaf).dtype == np.float64 for leaf in jax.tree.leaves(stack(batch)))


def test_estimates_can_be_part_of_a_larger_program() -> None:
    """A program of few rows is compiled with options of its own, which no other program could hold."""
    batch = stack(random_scenarios(4, 25))

    def total(isl: jax.Array) -> jax.Array:
        return estimate(replace(batch, load=replace(batch.load, isl=isl))).ttft.sum()

    assert jax.eval_shape(jax.grad(total), np.asarray(batch.load.isl)).shape == (4,)
