"""The one family of errors a user can meet; the command line catches only these."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DseError(Exception):
    """Base of every error dse raises on purpose: one message with the place, the value, what is allowed, a remedy."""


class InputError(DseError):
    """What a person or a file gave cannot be used (exit code 2)."""


class UnknownName(InputError):
    """A model, GPU, cluster, axis or key that is not known; the message names the nearest known ones."""


class UnsupportedModel(InputError):
    """A config.json describes something the cost model cannot represent."""


class NothingFeasible(DseError):
    """Every plan breaks a constraint (exit code 3)."""


def unknown(kind: str, name: object, known: Iterable[str], where: str = "", remedy: str = "") -> UnknownName:
    """An `UnknownName` that names the nearest known spelling: `where: unknown gpu 'h10' (nearest: h100, h20)`."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name).lower(), [n.lower() for n in names], n=3, cutoff=0.4)
    by_lower = {n.lower(): n for n in names}
    shown = (
        ", ".join(by_lower[n] for n in near) if near else ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    )
    label = "nearest" if near else "known"
    text = f"unknown {kind} {name!r} ({label}: {shown})"
    return UnknownName((f"{where}: " if where else "") + text + (f"; {remedy}" if remedy else ""))
