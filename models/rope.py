"""Precomputed rotary tables: cos and sin for every position, in float64, stored as float32, so that no runtime ever
does trigonometry and every backend gathers the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from ..formats.safetensors import load_tensors, write_tensors
from .config import ModelConfig
from .rope_frequencies import attention_factor, inverse_frequencies, softmax_factor

# Positions whose angles are computed at a time: in float64, and not all at once.
_CHUNK = 1 << 14
# A table's softmax_scale may be another than this npuq computes from the config, but not by such a factor.
_PLAUSIBLE = 8.0


@dataclass(frozen=True)
class RopeTables:
    """`cos` and `sin` float32 [max_position, rope_dim / 2], one column a frequency pair, mscale already applied.

    `softmax_scale` is the attention temperature, YaRN's part included; it is not in the tables.
    """

    cos: Tensor
    sin: Tensor
    softmax_scale: float
    metadata: Mapping[str, str]


def rope_tables(config: ModelConfig) -> RopeTables:
    """The tables of a model, for its whole context, in little more memory than they take themselves.

    The context is max_position_embeddings, but for dynamic NTK, whose frequencies depend on the sequence length: a
    table has to fix it, and npuq fixes `factor × max_position_embeddings`, the longest the scaling is meant for (as
    vLLM does).
    """
    rope, positions = config.rope, config.rope.positions
    mscale, frequencies = attention_factor(rope), inverse_frequencies(rope, positions)
    cos, sin = torch.empty(2, positions, rope.dim // 2)
    for start in range(0, positions, _CHUNK):
        part = slice(start, min(start + _CHUNK, positions))
        angles = torch.arange(part.start, part.stop, dtype=torch.float64)[:, None] * frequencies
        cos[part], sin[part] = angles.cos().mul_(mscale), angles.sin().mul_(mscale)
    softmax_scale = attention_scale(config)
    metadata = {
        "rope_type": rope.rope_type,
        "rope_theta": repr(rope.theta),
        "rope_dim": str(rope.dim),
        "max_position": str(positions),
        "mscale": repr(mscale),
        "softmax_scale": repr(softmax_scale),
        "layout": "half",
        "convention": "interleaved-input",
    }
    return RopeTables(cos, sin, softmax_scale, metadata)


def attention_scale(config: ModelConfig) -> float:
    """The factor of q·k before the softmax: (nope + rope)^-0.5, times `softmax_factor`."""
    return 1 / math.sqrt(config.attention.qk_head_dim) * softmax_factor(config.rope)


def save_rope(tables: RopeTables, path: Path) -> None:
    """Write the tables as safetensors, their parameters as its metadata: the same tables always give the same bytes."""
    write_tensors(path, {"cos": tables.cos, "sin": tables.sin}, tables.metadata)


def load_rope(path: Path, config: ModelConfig) -> RopeTables:
    """Read the tables that `save_rope` wrote for such a model.

    Raises ArtifactError, naming file and tensor, when the file is missing or is something else, when a table has not
    the dtype and the shape that the config promises or holds a value that is not finite, and when the attention's scale
    is no positive number near the one that the config gives.
    """
    form = ("F32", (config.rope.positions, config.attention.qk_rope_head_dim // 2))
    tensors, metadata = load_tensors(path, {"cos": form, "sin": form}, ArtifactError)
    for name, table in tensors.items():
        if not bool(table.isfinite().all()):
            raise ArtifactError(f"{path}: tensor {name!r} holds values that are not finite; convert again")
    return RopeTables(tensors["cos"], tensors["sin"], _softmax_scale(path, config, metadata), metadata)


def _softmax_scale(path: Path, config: ModelConfig, metadata: Mapping[str, str]) -> float:
    stored, expected = metadata.get("softmax_scale", ""), attention_scale(config)
    try:
        scale = float(stored)
    except ValueError:
        scale = math.nan
    # Written so that NaN counts as wrong.
    if not expected / _PLAUSIBLE <= scale <= expected * _PLAUSIBLE:
        raise ArtifactError(
            f"{path}: softmax_scale {stored[:40]!r} is not near the {expected:.4g} of config.json; convert again"
        )
    return scale
