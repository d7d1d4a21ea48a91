"""Measured times as amounts of the corrected roofline's parameters: times = amounts @ (beta, alpha).

A step is linear in beta, and so are TTFT and TPOT of a closed loop once it is said which steps they are made of; alpha
adds what happens around the steps.

Which steps, for a closed loop of N requests (ours: the method publishes none): the mean step carries the tokens of N
requests; each prompt is brought in `chunks` steps, so a share of the steps is mixed. TTFT: a request's own mixed steps,
or, one wave in ten, the first wave's (N+1)/2 prefills. No queueing, no admission. Experts over EP count as TP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache

import jax
import numpy as np
import pandas as pd

from dse.calibrate.observations import read_serving
from dse.calibrate.sources import Refusal
from dse.calibrate.steps import read_steps
from dse.catalog.hardware import to_device
from dse.catalog.models import model, to_architecture
from dse.cost.types import Load, stack
from dse.errors import InputError, UnsupportedModel
from dse.published import corrected_roofline as cr
from dse.space.cases import Case, parse_cases
from dse.space.steps import StepCase, parse_steps

Array = np.ndarray
NAMES = tuple(f"beta_{f.name}" for f in fields(cr.Beta)) + tuple(f"alpha_{f.name}" for f in fields(cr.Alpha))
COUNT = len(NAMES)
FIRST_WAVE = 1.0 / Load.waves


@dataclass(frozen=True)
class Observed:
    """n rows of k measured times. `amounts` (n, k, COUNT): seconds that each parameter adds at 1; `measured` (n, k) log
    seconds; `scale` (k,) log residuals a good model leaves."""

    metrics: tuple[str, ...]
    frame: pd.DataFrame
    amounts: Array
    measured: Array
    scale: Array
    refused: tuple[Refusal, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.measured)


def serving_rows(table: pd.DataFrame) -> Observed:
    """Closed-loop runs (rows as `read_serving` takes them) as amounts of TTFT and TPOT."""
    source = read_serving(table)
    cases = [case for case in parse_cases(source.frame) if isinstance(case, Case)]
    known, refused = _known(cases, "serving")
    some = [cases[i] for i in known]
    load = stack([c.load for c in some])
    n, isl, osl = load.concurrency, load.isl, load.osl
    chunks = np.maximum(isl / load.chunk, 1.0)
    steps = np.maximum(osl - 1.0, 1.0)
    arriving = (n - 1.0) * isl / (steps + chunks)  # prompt tokens a step
    piece = isl / chunks
    mix = np.clip(arriving, piece, load.chunk)
    busy = np.minimum(arriving / mix, 1.0)[:, None]
    deep = isl + 0.5 * osl
    none = np.zeros_like(n)
    decode = _terms(some, cr.step_of(none, none, none, n, deep))
    mixed = _terms(some, cr.step_of(mix / piece, piece, 0.5 * (isl - piece), n - 1.0, deep))
    wave = _terms(some, cr.step_of(np.ones_like(n), isl, none, none, none))
    tpot = (1.0 - busy) * decode + busy * mixed
    ttft = (1.0 - FIRST_WAVE) * chunks[:, None] * mixed + FIRST_WAVE * 0.5 * (n + 1.0)[:, None] * wave
    return Observed(
        metrics=("ttft", "tpot"),
        frame=source.frame.iloc[known].reset_index(drop=True),
        amounts=np.stack([_with_alpha(ttft, arrival=1.0, request=1.0), _with_alpha(tpot, output_token=1.0)], axis=1),
        measured=source.measured[known],
        scale=source.scale,
        refused=(*source.refused, *refused),
    )


def step_rows(table: pd.DataFrame) -> Observed:
    """Engine steps (rows as `read_steps` takes them) as amounts of the cycle."""
    source = read_steps(table)
    cases = [case for case in parse_steps(source.frame) if isinstance(case, StepCase)]
    known, refused = _known([c.case for c in cases], "steps")
    some = [cases[i] for i in known]
    prefills, tokens, decodes, context = (
        np.array([getattr(c, name) for c in some], float)
        for name in ("prefill_requests", "prefill_tokens", "decode_requests", "context")
    )
    each = tokens / np.maximum(prefills, 1.0)
    batch = cr.step_of(prefills, each, np.maximum(context - each, 0.0), decodes, context)
    return Observed(
        metrics=("cycle",),
        frame=source.frame.iloc[known].reset_index(drop=True),
        amounts=_with_alpha(_terms([c.case for c in some], batch))[:, None, :],
        measured=source.measured[known],
        scale=source.scale,
        refused=(*source.refused, *refused),
    )


def _known(cases: Sequence[Case], source: str) -> tuple[list[int], list[Refusal]]:
    """Rows of models and plans that the method knows, and the others with the reason."""
    known, refused = [], []
    for i, case in enumerate(cases):
        try:
            _shape(case)
            known.append(i)
        except UnsupportedModel as error:
            refused.append(Refusal(i, f"{case.entry.name}: {error}", source))
    if not known:
        raise InputError(
            f"corrected roofline: knows no row of {source}; " + (refused[0].reason if refused else "empty")
        )
    return known, refused


def _shape(case: Case) -> cr.Shape:
    beyond = [name for name in ("pp", "attention_dp", "cp") if case.plan[name] > 1]
    if beyond or case.load.draft_tokens:
        raise UnsupportedModel(f"corrected roofline: knows TP alone, not {', '.join(beyond) or 'speculation'}")
    p = case.precision
    return _shape_of(case.entry.name, float(max(p.expert_bytes, p.ffn_bytes)), float(p.kv_bytes))


@lru_cache(maxsize=256)
def _shape_of(name: str, weight_bytes: float, kv_bytes: float) -> cr.Shape:
    shape = cr.shape_of(to_architecture(model(name)), weight_bytes, kv_bytes)
    return cr.Shape(**{key: float(value) for key, value in vars(shape).items()})


def _terms(cases: Sequence[Case], step: cr.Step) -> Array:
    """(n, 7): what the betas multiply, at the peak of the format that the FFNs compute in."""
    devices = [to_device(c.gpu) for c in cases]
    rates = [
        (d.peak_bf16, d.peak_fp8, d.peak_fp4, d.peak_int8)[int(c.precision.ffn_rate)] for d, c in zip(devices, cases)
    ]
    with jax.enable_x64(True):
        features, _ = cr.evaluate(
            stack([_shape(c) for c in cases]),
            np.array([c.plan["tp"] for c in cases]),
            cr.Peak(flops=np.array(rates, float), bandwidth=np.array([d.bandwidth for d in devices], float)),
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), step),
            jax.tree.map(lambda leaf: np.full(len(cases), leaf, np.float64), cr.Beta()),
        )
        return np.stack([np.asarray(term, np.float64) for term in cr.terms(features)], axis=1)


def _with_alpha(terms: Array, **alphas: float) -> Array:
    """(n, COUNT): the betas' amounts, then the alphas' (0 where not named)."""
    extra = [np.full(len(terms), alphas.get(f.name, 0.0)) for f in fields(cr.Alpha)]
    return np.concatenate([terms, np.stack(extra, axis=1)], axis=1)


__all__ = ["COUNT", "NAMES", "Observed", "serving_rows", "step_rows"]
