"""The models catalogue: names -> entries -> the cost model's `Architecture`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dse.catalog.model_schema import MixerSpec, ModelEntry, parse
from dse.cost.types import Architecture, Core, FeedForward, Gemm, Indexer, Mixer, Routed, State
from dse.errors import InputError, unknown
from dse.files import load_yaml

FOLDER = Path(__file__).parent / "models"
# Words of a checkpoint's name that say how it was trained or stored, not what shape it has.
_CHECKPOINT_WORDS = frozenset(
    re.split(
        r"\s+",
        "fp8 fp4 nvfp4 mxfp4 mxfp8 bf16 fp16 int4 int8 w4a16 w8a8 w8a16 w4a8 w4afp8 awq gptq gguf kv dynamic block "
        "quantized hf instruct chat it base thinking reasoning exp meta nvidia amd text",
    )
)
_DATE = re.compile(r"\d{4}|\d{6}|\d{8}")  # 0528, 2507, 250615, 20250615
_TRAINING_VERSION = re.compile(r"v0\.\d+")  # Mixtral-8x7B-v0.1


# --------------------------------------------------------------------------------------------- names


def _words(name: str) -> list[str]:
    """The words of a name's last part: `meta-llama/LLaMA v3.1 8B (meta)` -> llama 3.1 8b."""
    last = re.sub(r"\([^)]*\)", " ", name).strip().rstrip("/").split("/")[-1].lower()
    return [word for word in re.split(r"[\s_\-]+", last) if word]


def _join(words: list[str]) -> str:
    """`llama 2 70b`, `llama2 70b` and `llama v2 70b` are one name."""
    return "".join(re.sub(r"^v(?=\d)", "", word) for word in words)


def _spellings(name: str) -> list[str]:
    """Keys to look a name up by, most exact first."""
    words = _words(name)
    stored = [w for w in words if w not in _CHECKPOINT_WORDS] or words
    dated = [w for w in stored if not _DATE.fullmatch(w)] or stored
    trained = [w for w in dated if not _TRAINING_VERSION.fullmatch(w)] or dated
    return list(dict.fromkeys(_join(w) for w in (words, stored, dated, trained)))


@cache
def models() -> dict[str, ModelEntry]:
    """Every model of the catalogue by its name."""
    entries = [load_model_file(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return {entry.name: entry for entry in sorted(entries, key=lambda e: e.name.lower())}


@cache
def _index() -> dict[str, str]:
    """Lookup key -> name. Exact spellings win over those that drop words, and those of earlier names over later."""
    index: dict[str, str] = {}
    names = [(spelling, entry.name) for entry in models().values() for spelling in (entry.name, *entry.aliases)]
    for exact in (True, False):
        for spelling, name in names:
            keys = _spellings(spelling)
            for key in keys[:1] if exact else keys[1:]:
                index.setdefault(key, name)
    return index


def model(name: str) -> ModelEntry:
    """The entry of a model, whichever way its name is spelled; `UnknownName` with the nearest ones otherwise."""
    for key in _spellings(str(name)):
        if key in _index():
            return models()[_index()[key]]
    raise unknown("model", name, models(), remedy="`dse import-model config.json` makes an entry of a model's config")


# --------------------------------------------------------------------------------------------- files


def load_model_file(path: str | Path) -> ModelEntry:
    """A model from a file of one's own: catalogue YAML, or a Hugging Face config.json as it is."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"{path}: cannot be read: {reason}; give a YAML or config.json file") from None
    data = _load(text, path)
    if path.suffix == ".json" or (isinstance(data, dict) and "model_type" in data):
        from dse.catalog.hf import from_config

        return from_config(data, path.stem if path.stem != "config" else path.resolve().parent.name)
    return parse(data, str(path))


def _load(text: str, path: Path) -> Any:
    if path.suffix != ".json":
        return load_yaml(text, str(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None


# --------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. `total` and `active` (a token's share) include the embeddings, not MTP or vision."""

    total: int
    active: int
    embedding: int
    mtp: int
    vision: int


def parameter_count(entry: ModelEntry) -> ParameterCount:
    """Counts from the shapes: sum over kinds of count * parameters a layer, embeddings and the final norm."""
    embedding = entry.embeddings * entry.vocab * entry.hidden
    shared = embedding + entry.other_params + sum(m.count * m.params for m in entry.mixers)
    total = shared + sum(f.count * f.params(entry.hidden) for f in entry.ffns)
    active = shared + sum(f.count * f.params(entry.hidden, f.routed.top_k if f.routed else None) for f in entry.ffns)
    return ParameterCount(total, active, embedding, entry.mtp_params, entry.vision_params)


def to_architecture(entry: ModelEntry) -> Architecture:
    """The entry as the cost model's pytree of floats."""
    return Architecture(
        hidden=float(entry.hidden),
        vocab=float(entry.vocab),
        embeddings=float(entry.embeddings),
        mixers=tuple(_mixer(spec) for spec in entry.mixers),
        ffns=tuple(
            FeedForward(
                count=float(spec.count),
                width=float(spec.width),
                matrices=float(spec.matrices),
                extra_params=float(spec.extra_params),
                routed=None if spec.routed is None else Routed(**_floats(spec.routed)),
            )
            for spec in entry.ffns
        ),
        other_params=float(entry.other_params + entry.vision_params),
        mtp_params=float(entry.mtp_params),
    )


def _mixer(spec: MixerSpec) -> Mixer:
    return Mixer(
        count=float(spec.count),
        gemms=tuple(
            Gemm(
                k=float(g.k),
                n=float(g.n),
                n_kv=float(g.n_kv),
                split_k=float(g.split == "k"),
                split_n=float(g.split == "n"),
            )
            for g in spec.gemms
        ),
        extra_params=float(spec.extra_params),
        core=None if spec.core is None else Core(**_floats(spec.core)),
        indexer=None if spec.indexer is None else Indexer(**_floats(spec.indexer)),
        state=None if spec.state is None else State(**_floats(spec.state)),
    )


def _floats(spec: Any) -> dict[str, float]:
    return {name: float(value) for name, value in spec.model_dump().items()}


__all__ = ["ParameterCount", "load_model_file", "model", "models", "parameter_count", "to_architecture"]
