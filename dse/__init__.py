"""dse: which parallel plan, batch, precision, GPUs and pools to serve a large language model on, and at what cost.

Every command of `dse` is a thin skin over one function here. Names are imported when first used, so that
`import dse` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dse.audit.compare import compare as compare_methods
    from dse.audit.load import load_plan, parse_plan
    from dse.audit.run import audit as audit_plan
    from dse.catalog.coefficients import CoefficientSet, coefficient_set
    from dse.catalog.hardware import cluster, clusters, gpu, gpus
    from dse.catalog.models import load_model_file, model, models
    from dse.cost.coefficients import Coefficients
    from dse.cost.evaluate import Estimate, Scenario
    from dse.cost.evaluate import estimate as estimate_batch
    from dse.errors import DseError, InputError
    from dse.published.tables import published as published_table
    from dse.report.files import write_outputs
    from dse.report.summary import Summary, summarise
    from dse.search.result import SearchResult
    from dse.search.run import search as search_space
    from dse.space.cases import estimate_cases
    from dse.space.compile import CompiledSpace, compile_space
    from dse.space.load import load_space, parse_space
    from dse.space.schema import SpaceSpec

# public name -> (module, name there)
_FACE = {
    "CoefficientSet": ("dse.catalog.coefficients", "CoefficientSet"),
    "Coefficients": ("dse.cost.coefficients", "Coefficients"),
    "CompiledSpace": ("dse.space.compile", "CompiledSpace"),
    "DseError": ("dse.errors", "DseError"),
    "Estimate": ("dse.cost.evaluate", "Estimate"),
    "InputError": ("dse.errors", "InputError"),
    "Scenario": ("dse.cost.evaluate", "Scenario"),
    "SearchResult": ("dse.search.result", "SearchResult"),
    "SpaceSpec": ("dse.space.schema", "SpaceSpec"),
    "Summary": ("dse.report.summary", "Summary"),
    "audit_plan": ("dse.audit.run", "audit"),
    "cluster": ("dse.catalog.hardware", "cluster"),
    "clusters": ("dse.catalog.hardware", "clusters"),
    "coefficient_set": ("dse.catalog.coefficients", "coefficient_set"),
    "compare_methods": ("dse.audit.compare", "compare"),
    "compile_space": ("dse.space.compile", "compile_space"),
    "estimate_batch": ("dse.cost.evaluate", "estimate"),
    "estimate_cases": ("dse.space.cases", "estimate_cases"),
    "gpu": ("dse.catalog.hardware", "gpu"),
    "gpus": ("dse.catalog.hardware", "gpus"),
    "load_model_file": ("dse.catalog.models", "load_model_file"),
    "load_plan": ("dse.audit.load", "load_plan"),
    "load_space": ("dse.space.load", "load_space"),
    "model": ("dse.catalog.models", "model"),
    "models": ("dse.catalog.models", "models"),
    "parse_plan": ("dse.audit.load", "parse_plan"),
    "parse_space": ("dse.space.load", "parse_space"),
    "published_table": ("dse.published.tables", "published"),
    "search_space": ("dse.search.run", "search"),
    "summarise": ("dse.report.summary", "summarise"),
    "write_outputs": ("dse.report.files", "write_outputs"),
}

__all__ = [
    "CoefficientSet",
    "Coefficients",
    "CompiledSpace",
    "DseError",
    "Estimate",
    "InputError",
    "Scenario",
    "SearchResult",
    "SpaceSpec",
    "Summary",
    "audit_plan",
    "cluster",
    "clusters",
    "coefficient_set",
    "compare_methods",
    "compile_space",
    "estimate_batch",
    "estimate_cases",
    "gpu",
    "gpus",
    "load_model_file",
    "load_plan",
    "load_space",
    "model",
    "models",
    "parse_plan",
    "parse_space",
    "published_table",
    "search_space",
    "summarise",
    "write_outputs",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'dse' has no attribute {name!r}")
    module, attribute = _FACE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
