"""Parameters of vision towers, which are held in memory and counted apart: the cost model does not run them.

Each formula is that of the published module; what has no formula of its own is counted as a plain ViT, with a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dse.catalog.hf_config import Config
from dse.errors import InputError


def vision_params(data: Any, hidden: int, where: str) -> tuple[int, tuple[str, ...]]:
    """Parameters of the tower and its projector, and notes on what was assumed."""
    if not data:
        return 0, ()
    if not isinstance(data, Mapping):
        raise InputError(f"{where}: vision_config is {type(data).__name__}; expected an object of keys")
    c = Config(data, f"{where}: vision_config")
    kind = str(c.get("model_type", ""))
    if c.has("vt_hidden_size"):
        return _moonvit(c), ()
    if c.has("spatial_merge_size") and c.has("depth"):
        return _qwen_vit(c), ()
    if kind == "gemma4_vision":
        return _gemma4_vit(c, hidden), ()
    if kind == "llama4_vision_model" or c.has("pixel_shuffle_ratio"):
        return _llama4_vit(c, hidden), ()
    note = f"vision tower ({kind or 'no model_type'}) counted as a plain ViT with one projection"
    return _plain_vit(c, hidden), (note,)


def _block(d: int, f: int, matrices: int = 2) -> int:
    """Attention and MLP with biases, two LayerNorms."""
    return 4 * d * d + 4 * d + matrices * d * f + f + d + 4 * d


def _qwen_vit(c: Config) -> int:
    """Qwen3-VL: blocks, patch and position embeddings, one merger after the last block and one a deepstack layer."""
    d, f, depth = c.size("hidden_size"), c.size("intermediate_size"), c.size("depth")
    out, merge = c.size("out_hidden_size"), c.size("spatial_merge_size")
    patch = c.size("in_channels", 3) * c.size("temporal_patch_size", 2) * c.size("patch_size") ** 2
    wide = d * merge**2
    mergers = 1 + len(c.numbers("deepstack_visual_indexes"))
    merger = wide * wide + wide + wide * out + out + 2 * d
    return depth * _block(d, f) + patch * d + d + c.size("num_position_embeddings", 0, low=0) * d + mergers * merger


def _moonvit(c: Config) -> int:
    """Kimi-K2.5: MoonViT with a fixed-size position table, and a two-layer projector over merged patches."""
    d, f, depth = c.size("vt_hidden_size"), c.size("vt_intermediate_size"), c.size("vt_num_hidden_layers")
    table = c.size("init_pos_emb_height") * c.size("init_pos_emb_width") * d
    wide = d * math.prod(c.numbers("merge_kernel_size"))
    projector = 2 * d + wide * wide + wide + wide * c.size("text_hidden_size") + c.size("text_hidden_size")
    return depth * _block(d, f) + 3 * c.size("patch_size") ** 2 * d + d + table + 2 * d + projector


def _gemma4_vit(c: Config, hidden: int) -> int:
    """Gemma 4: gated MLPs, four norms a layer, two tables of learned positions."""
    d, f, layers = c.size("hidden_size"), c.size("intermediate_size"), c.size("num_hidden_layers")
    layer = 4 * d * c.size("num_attention_heads") * c.size("head_dim") + 3 * d * f + 4 * d + 2 * c.size("head_dim")
    return layers * layer + 3 * c.size("patch_size") ** 2 * d + 2 * c.size("position_embedding_size") * d + d * hidden


def _llama4_vit(c: Config, hidden: int) -> int:
    """Llama 4: a class token, norms before and after, a pixel-shuffle MLP and a projector without biases."""
    d, f, layers = c.size("hidden_size"), c.size("intermediate_size"), c.size("num_hidden_layers")
    patch, mid = c.size("patch_size"), c.size("projector_output_dim")
    positions = (c.size("image_size") // patch) ** 2 + 1
    if c.get("pixel_shuffle_ratio", 0.5) != 0.5:
        raise c.unsupported(f"pixel_shuffle_ratio={c.get('pixel_shuffle_ratio')!r} (allowed: 0.5)")
    merged = 4 * d
    adapter = merged * c.size("projector_input_dim") + c.size("projector_input_dim") * mid + mid * hidden
    return layers * _block(d, f) + 3 * patch**2 * d + d + positions * d + 4 * d + adapter


def _plain_vit(c: Config, hidden: int) -> int:
    d = c.size("hidden_size")
    f, layers = c.size("intermediate_size", 4 * d), c.size("num_hidden_layers")
    return layers * _block(d, f) + 3 * c.size("patch_size", 14) ** 2 * d + d * hidden
