"""The command line: the only place that prints, exits and reads argv. Heavy imports happen inside commands."""

from __future__ import annotations

import atexit
import gc
import sys

import typer

from dse.cli import calibrate, catalogue, experiments, load, operators, plans, published
from dse.cli.console import app
from dse.errors import DseError, NothingFeasible

BAD_INPUT, NOTHING_FEASIBLE = 2, 3
# Importing them registered their commands.
COMMANDS = (plans, published, calibrate, catalogue, operators, load, experiments)


def main() -> None:
    """Run a command; a known error is one message on standard error and an exit code, never a traceback."""
    gc.set_threshold(100_000, 50, 50)  # imports and tracing make many objects and no garbage: a fifth of their time
    atexit.register(gc.freeze)  # nor is there any to look for at the end, for which Python would take .3 s
    try:
        app()
    except NothingFeasible as error:
        typer.echo(f"dse: {error}", err=True)
        sys.exit(NOTHING_FEASIBLE)
    except DseError as error:
        typer.echo(f"dse: {error}", err=True)
        sys.exit(BAD_INPUT)
