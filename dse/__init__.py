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
    from dse.calibrate.diagnose import Diagnosis
    from dse.calibrate.diagnose import diagnose as diagnose_calibration
    from dse.calibrate.experiment_files import files_of as experiment_files
    from dse.calibrate.experiment_files import profiles as experiment_profiles
    from dse.calibrate.experiments import Experiments, next_experiments
    from dse.calibrate.fewshot import few_shot as calibrate_few_shot
    from dse.calibrate.kernels import estimate_kernels, fit_kernels, kernel_accuracy
    from dse.calibrate.read import read_files as read_measurements
    from dse.calibrate.roofline import beside_accuracy
    from dse.calibrate.run import accuracy as measure_accuracy
    from dse.calibrate.run import calibrate as calibrate_measurements
    from dse.catalog.coefficients import CoefficientSet, coefficient_set
    from dse.catalog.hardware import cluster, clusters, gpu, gpus
    from dse.catalog.models import load_model_file, model, models
    from dse.cost.afd import AttentionFfn, estimate_attention_ffn
    from dse.cost.coefficients import Coefficients
    from dse.cost.evaluate import Estimate, Scenario
    from dse.cost.evaluate import estimate as estimate_batch
    from dse.cost.pools import Split, estimate_split
    from dse.errors import DseError, InputError
    from dse.published.tables import published as published_table
    from dse.report.accuracy_page import write_accuracy
    from dse.report.files import write_outputs
    from dse.report.replay import write_replay
    from dse.report.summary import Summary, summarise
    from dse.search.result import SearchResult
    from dse.search.run import search as search_space
    from dse.space.cases import estimate_cases
    from dse.space.compile import CompiledSpace, compile_space
    from dse.space.goodput import Asked as GoodputAsked
    from dse.space.goodput import goodput_cases
    from dse.space.load import load_any, load_space, parse_pipeline, parse_space
    from dse.space.pipeline import PipelineSpec
    from dse.space.placement import PlacementAsked, placement_table
    from dse.space.replay import Replay, replay
    from dse.space.schema import SpaceSpec
    from dse.space.steps import estimate_steps
    from dse.space.traces import Trace, read_trace
    from dse.space.traffic import traffic, traffic_cases

# public name -> (module, name there)
_FACE = {
    "AttentionFfn": ("dse.cost.afd", "AttentionFfn"),
    "CoefficientSet": ("dse.catalog.coefficients", "CoefficientSet"),
    "Coefficients": ("dse.cost.coefficients", "Coefficients"),
    "CompiledSpace": ("dse.space.compile", "CompiledSpace"),
    "Diagnosis": ("dse.calibrate.diagnose", "Diagnosis"),
    "DseError": ("dse.errors", "DseError"),
    "Estimate": ("dse.cost.evaluate", "Estimate"),
    "Experiments": ("dse.calibrate.experiments", "Experiments"),
    "InputError": ("dse.errors", "InputError"),
    "PlacementAsked": ("dse.space.placement", "PlacementAsked"),
    "PipelineSpec": ("dse.space.pipeline", "PipelineSpec"),
    "Replay": ("dse.space.replay", "Replay"),
    "Scenario": ("dse.cost.evaluate", "Scenario"),
    "SearchResult": ("dse.search.result", "SearchResult"),
    "Split": ("dse.cost.pools", "Split"),
    "SpaceSpec": ("dse.space.schema", "SpaceSpec"),
    "Summary": ("dse.report.summary", "Summary"),
    "Trace": ("dse.space.traces", "Trace"),
    "audit_plan": ("dse.audit.run", "audit"),
    "beside_accuracy": ("dse.calibrate.roofline", "beside_accuracy"),
    "calibrate_few_shot": ("dse.calibrate.fewshot", "few_shot"),
    "calibrate_measurements": ("dse.calibrate.run", "calibrate"),
    "cluster": ("dse.catalog.hardware", "cluster"),
    "clusters": ("dse.catalog.hardware", "clusters"),
    "coefficient_set": ("dse.catalog.coefficients", "coefficient_set"),
    "compare_methods": ("dse.audit.compare", "compare"),
    "compile_space": ("dse.space.compile", "compile_space"),
    "diagnose_calibration": ("dse.calibrate.diagnose", "diagnose"),
    "estimate_attention_ffn": ("dse.cost.afd", "estimate_attention_ffn"),
    "estimate_batch": ("dse.cost.evaluate", "estimate"),
    "estimate_split": ("dse.cost.pools", "estimate_split"),
    "estimate_cases": ("dse.space.cases", "estimate_cases"),
    "estimate_kernels": ("dse.calibrate.kernels", "estimate_kernels"),
    "estimate_steps": ("dse.space.steps", "estimate_steps"),
    "experiment_files": ("dse.calibrate.experiment_files", "files_of"),
    "experiment_profiles": ("dse.calibrate.experiment_files", "profiles"),
    "fit_kernels": ("dse.calibrate.kernels", "fit_kernels"),
    "GoodputAsked": ("dse.space.goodput", "Asked"),
    "goodput_cases": ("dse.space.goodput", "goodput_cases"),
    "gpu": ("dse.catalog.hardware", "gpu"),
    "gpus": ("dse.catalog.hardware", "gpus"),
    "kernel_accuracy": ("dse.calibrate.kernels", "kernel_accuracy"),
    "load_any": ("dse.space.load", "load_any"),
    "load_model_file": ("dse.catalog.models", "load_model_file"),
    "load_plan": ("dse.audit.load", "load_plan"),
    "load_space": ("dse.space.load", "load_space"),
    "measure_accuracy": ("dse.calibrate.run", "accuracy"),
    "model": ("dse.catalog.models", "model"),
    "models": ("dse.catalog.models", "models"),
    "parse_pipeline": ("dse.space.load", "parse_pipeline"),
    "parse_plan": ("dse.audit.load", "parse_plan"),
    "parse_space": ("dse.space.load", "parse_space"),
    "next_experiments": ("dse.calibrate.experiments", "next_experiments"),
    "placement_table": ("dse.space.placement", "placement_table"),
    "published_table": ("dse.published.tables", "published"),
    "read_measurements": ("dse.calibrate.read", "read_files"),
    "read_trace": ("dse.space.traces", "read_trace"),
    "replay": ("dse.space.replay", "replay"),
    "search_space": ("dse.search.run", "search"),
    "summarise": ("dse.report.summary", "summarise"),
    "traffic": ("dse.space.traffic", "traffic"),
    "traffic_cases": ("dse.space.traffic", "traffic_cases"),
    "write_accuracy": ("dse.report.accuracy_page", "write_accuracy"),
    "write_outputs": ("dse.report.files", "write_outputs"),
    "write_replay": ("dse.report.replay", "write_replay"),
}

__all__ = [
    "AttentionFfn",
    "CoefficientSet",
    "Coefficients",
    "CompiledSpace",
    "Diagnosis",
    "DseError",
    "Estimate",
    "Experiments",
    "GoodputAsked",
    "InputError",
    "PipelineSpec",
    "PlacementAsked",
    "Replay",
    "Scenario",
    "SearchResult",
    "SpaceSpec",
    "Split",
    "Summary",
    "Trace",
    "audit_plan",
    "beside_accuracy",
    "calibrate_few_shot",
    "calibrate_measurements",
    "cluster",
    "clusters",
    "coefficient_set",
    "compare_methods",
    "compile_space",
    "diagnose_calibration",
    "estimate_attention_ffn",
    "estimate_batch",
    "estimate_cases",
    "estimate_kernels",
    "estimate_split",
    "estimate_steps",
    "experiment_files",
    "experiment_profiles",
    "fit_kernels",
    "goodput_cases",
    "gpu",
    "gpus",
    "kernel_accuracy",
    "load_any",
    "load_model_file",
    "load_plan",
    "load_space",
    "measure_accuracy",
    "model",
    "models",
    "next_experiments",
    "parse_pipeline",
    "parse_plan",
    "parse_space",
    "placement_table",
    "published_table",
    "read_measurements",
    "read_trace",
    "replay",
    "search_space",
    "summarise",
    "traffic",
    "traffic_cases",
    "write_accuracy",
    "write_outputs",
    "write_replay",
]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'dse' has no attribute {name!r}")
    module, attribute = _FACE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
