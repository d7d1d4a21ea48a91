"""The runs that train and validate the corrected roofline, as inference-perf configurations.

W1 prefill sweep, W2 decode sweep, W3 batch at rising rates, W4 mixes, W5 the same at TP 1, 2, 4, V1 validation. 6 pairs
of model and TP x 15 runs + 3 validation models x 3 runs = 99 runs of 120 s. Configurations follow inference-perf
(kubernetes-sigs, docs/config.md): `load`, `data`, `api`, `server`, `tokenizer`. TP is a property of the server that a
run is sent to, so it stands beside the configuration. Not published, hence ours and arguments here: which six pairs,
the rate of W1 and W2 (1 request/s: no queueing), and the rates of the three validation runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SECONDS = 120
PROMPTS = (128, 1024, 4096, 8192)
BATCH_RATES = (1, 8, 32, 64, 128)
VALIDATION_RATES = (1, 8, 32)


@dataclass(frozen=True)
class Workload:
    """`isl` prompt tokens and `osl` output tokens, all alike, at `rate` requests/s."""

    name: str
    isl: int
    osl: int
    rate: float

    @property
    def label(self) -> str:
        return f"{self.name}-{self.isl}-{self.osl}-r{self.rate:g}"


TRAINING = (
    *(Workload("W1", isl, 1, 1) for isl in PROMPTS),
    *(Workload("W2", isl, 512, 1) for isl in PROMPTS),
    *(Workload("W3", 256, 256, rate) for rate in BATCH_RATES),
    Workload("W4", 1024, 4, 128),
    Workload("W4", 64, 1024, 32),
)
VALIDATION = tuple(Workload("V1", 1024, 512, rate) for rate in VALIDATION_RATES)


@dataclass(frozen=True)
class Server:
    """A model as Hugging Face names it, and the TP degree of the server (W5)."""

    model: str
    tp: int


TRAINING_SERVERS = (
    Server("meta-llama/Llama-3.1-8B-Instruct", 1),
    Server("meta-llama/Llama-3.1-8B-Instruct", 2),
    Server("meta-llama/Llama-3.1-8B-Instruct", 4),
    Server("meta-llama/Llama-3.1-70B-Instruct", 4),
    Server("Qwen/Qwen3-30B-A3B", 1),
    Server("Qwen/Qwen3-30B-A3B", 2),
)
VALIDATION_SERVERS = (
    Server("codellama/CodeLlama-34b-Instruct-hf", 2),
    Server("meta-llama/Llama-2-7b-hf", 1),
    Server("mistralai/Mixtral-8x7B-Instruct-v0.1", 2),
)


@dataclass(frozen=True)
class Run:
    """One configuration file of the plan."""

    name: str
    role: str  # "training" or "validation"
    server: Server
    workload: Workload
    configuration: dict[str, Any]


def configuration(server: Server, workload: Workload, base_url: str = "http://localhost:8000") -> dict[str, Any]:
    """An inference-perf configuration: fixed lengths, end-of-sequence ignored, 120 s."""

    def fixed(tokens: int) -> dict[str, int]:
        count = max(1, round(workload.rate * SECONDS))
        return {"min": tokens, "max": tokens, "mean": tokens, "std_dev": 0, "total_count": count}

    return {
        "load": {"type": "constant", "stages": [{"rate": workload.rate, "duration": SECONDS}]},
        "data": {
            "type": "random",
            "input_distribution": fixed(workload.isl),
            "output_distribution": fixed(workload.osl),
        },
        "api": {"type": "completion", "streaming": True},
        "server": {"type": "vllm", "model_name": server.model, "base_url": base_url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": server.model},
        "report": {"request_lifecycle": {"summary": True, "per_stage": True, "per_request": True}},
    }


def plan(
    training: Sequence[Server] = TRAINING_SERVERS,
    validation: Sequence[Server] = VALIDATION_SERVERS,
    base_url: str = "http://localhost:8000",
) -> list[Run]:
    """Every run, training first; the defaults are the 99."""
    groups = (("training", training, TRAINING), ("validation", validation, VALIDATION))
    return [
        Run(
            name=f"{server.model.split('/')[-1].lower()}-tp{server.tp}-{workload.label.lower()}",
            role=role,
            server=server,
            workload=workload,
            configuration=configuration(server, workload, base_url),
        )
        for role, servers, workloads in groups
        for server in servers
        for workload in workloads
    ]


def as_yaml(run: Run) -> str:
    """The text of a run's configuration file."""
    import yaml

    return yaml.safe_dump(run.configuration, sort_keys=False)
