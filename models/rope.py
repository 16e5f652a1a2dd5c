"""Precomputed rotary tables: cos and sin of every position, computed in float64 and kept as float32, so that every
backend gathers the same numbers and none computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .config import ModelConfig
from .rope_frequencies import attention_factor, inverse_frequencies, softmax_factor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Positions whose angles are computed at a time, to bound the float64 memory.
_CHUNK = 1 << 14


@dataclass(frozen=True)
class RopeTables:
    """`cos` and `sin` float32 [max_position, rope_dim / 2], one column a frequency pair, mscale applied.

    Without columns where layers differ in their rotation.
    softmax_scale: the factor of attention scores, YaRN's part included; the tables do not contain it.
    """

    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    softmax_scale: float
    metadata: Mapping[str, str]


def rope_tables(config: ModelConfig) -> RopeTables:
    """Compute the tables of a model's whole context, in little more memory than the result takes.

    The context is max_position_embeddings, except for dynamic NTK, whose frequencies depend on the sequence length. A
    table needs one length: `factor × max_position_embeddings`, the longest that the scaling supports, as in vLLM.
    """
    rope, positions = config.rope, config.rope.positions
    mscale, frequencies = attention_factor(rope), inverse_frequencies(rope, positions)
    cos, sin = np.empty((2, positions, config.rope_pairs), np.float32)
    for start in range(0, positions if config.rope_pairs else 0, _CHUNK):
        part = slice(start, min(start + _CHUNK, positions))
        angles = np.arange(part.start, part.stop, dtype=np.float64)[:, None] * frequencies
        cos[part], sin[part] = np.cos(angles) * mscale, np.sin(angles) * mscale
    softmax_scale = attention_scale(config)
    metadata = {
        "rope_type": rope.rope_type,
        "rope_theta": repr(rope.theta),
        "rope_dim": str(rope.dim),
        "max_position": str(positions),
        "mscale": repr(mscale),
        "softmax_scale": repr(softmax_scale),
        "layout": "half",
        "convention": "interleaved-input" if config.attention.rotary_interleaved else "half-input",
    }
    return RopeTables(cos, sin, softmax_scale, metadata)


def table_bytes(config: ModelConfig) -> int:
    """The bytes of both tables, 0 for a model without. Raises what `rope_tables` would, without their time."""
    rope = config.rope
    attention_factor(rope), inverse_frequencies(rope, rope.positions), attention_scale(config)
    return 2 * rope.positions * config.rope_pairs * np.dtype(np.float32).itemsize


def attention_scale(config: ModelConfig) -> float:
    """The factor of q·k before the softmax: qk_head_dim^-0.5, times `softmax_factor`."""
    return 1 / math.sqrt(config.attention.qk_head_dim) * softmax_factor(config.rope)
