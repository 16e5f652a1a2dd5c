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
from .model_config import ModelConfig, RopeConfig
from .safetensors import load_tensors, write_tensors

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
    """The tables of a model, for its whole context.

    The context is max_position_embeddings, but for dynamic NTK, whose frequencies depend on the sequence length: a
    table has to fix it, and npuq fixes `factor × max_position_embeddings`, the longest the scaling is meant for (as
    vLLM does).
    """
    rope = config.rope
    max_position = table_positions(rope)
    mscale = attention_factor(rope)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * inverse_frequencies(rope, max_position)
    softmax_scale = attention_scale(config)
    metadata = {
        "rope_type": rope.rope_type,
        "rope_theta": repr(rope.theta),
        "rope_dim": str(rope.dim),
        "max_position": str(max_position),
        "mscale": repr(mscale),
        "softmax_scale": repr(softmax_scale),
        "layout": "half",
        "convention": "interleaved-input",
    }
    cos, sin = angles.cos().mul_(mscale).float(), angles.sin().mul_(mscale).float()
    return RopeTables(cos, sin, softmax_scale, metadata)


def table_positions(rope: RopeConfig) -> int:
    """The rows of a model's tables."""
    return int(rope.max_position * rope.factor) if rope.rope_type == "dynamic" else rope.max_position


def inverse_frequencies(rope: RopeConfig, length: int) -> Tensor:
    """float64 [rope_dim / 2]: the angle that one position turns each pair by. `length` matters to dynamic NTK only."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
    if rope.rope_type == "dynamic":
        # bloc97's NTK-aware base: https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5
        growth = rope.factor * max(length, rope.max_position) / rope.max_position - (rope.factor - 1)
        return torch.pow(rope.theta * growth ** (rope.dim / (rope.dim - 2)), -exponents)
    frequencies = torch.pow(rope.theta, -exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies)
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, but for YaRN.

    DeepSeek's rule: mscale(factor, mscale) / mscale(factor, mscale_all_dim), with mscale 1 and mscale_all_dim 0 where
    the config has neither, which is then the YaRN paper's own 0.1 ln(factor) + 1.
    """
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)


def attention_scale(config: ModelConfig) -> float:
    """The factor of q·k before the softmax: (nope + rope)^-0.5, times mscale(factor, mscale_all_dim)² under YaRN."""
    scale = 1 / math.sqrt(config.qk_head_dim)
    if config.rope.rope_type == "yarn":
        scale *= yarn_mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Interpolated low frequencies, kept high ones and a linear ramp between (arXiv:2309.00071, section 3.2)."""
    assert rope.original_max_position is not None

    def dimension(rotations: float) -> float:
        wavelengths = rope.original_max_position / (rotations * 2 * math.pi)  # type: ignore[operator]
        return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a smooth step between."""
    assert rope.original_max_position is not None
    rotations = rope.original_max_position * frequencies / (2 * math.pi)
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return frequencies * ((1 - smooth) / rope.factor + smooth)


def save_rope(tables: RopeTables, path: Path) -> None:
    """Write the tables as safetensors, their parameters as its metadata: the same tables always give the same bytes."""
    write_tensors(path, {"cos": tables.cos, "sin": tables.sin}, tables.metadata)


def load_rope(path: Path, config: ModelConfig) -> RopeTables:
    """Read the tables that `save_rope` wrote for such a model.

    Raises ArtifactError, naming file and tensor, when the file is missing or is something else, when a table has not
    the dtype and the shape that the config promises or holds a value that is not finite, and when the attention's scale
    is no positive number near the one that the config gives.
    """
    form = ("F32", (table_positions(config.rope), config.qk_rope_head_dim // 2))
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
