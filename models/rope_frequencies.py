"""Rotary frequencies in float64: the angle of every pair of channels, YaRN's factors, and the check that all are
finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CheckpointError
from .rope_config import RopeConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


def inverse_frequencies(rope: RopeConfig, length: int) -> NDArray[np.float64]:
    """Angles a position of each pair of channels, in radians, float64 [rope_dim / 2]. Only dynamic NTK uses
    `length`."""
    if rope.rope_type == "dynamic":
        # bloc97's NTK-aware base: https://www.reddit.com/r/LocalLLaMA/comments/14lz7j5
        growth = rope.factor * max(length, rope.max_position) / rope.max_position - (rope.factor - 1)
        return _powers(rope.theta * growth ** (rope.dim / (rope.dim - 2)), rope.dim)
    frequencies = _powers(rope.theta, rope.dim)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(rope, frequencies)
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies)
    return frequencies


def attention_factor(rope: RopeConfig) -> float:
    """The factor of cos and sin: 1, but for YaRN.

    DeepSeek's formula: mscale(factor, mscale) / mscale(factor, mscale_all_dim). A config with neither gets mscale 1 and
    mscale_all_dim 0, which gives the YaRN paper's own 0.1 ln(factor) + 1.
    """
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    mscale = 1.0 if rope.mscale is None else rope.mscale
    return yarn_mscale(rope.factor, mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0)


def softmax_factor(rope: RopeConfig) -> float:
    """The factor of the softmax's scale: mscale(factor, mscale_all_dim)² under every type but the default.

    It is not limited to YaRN, neither in DeepSeek's own code nor in transformers.
    """
    return 1.0 if rope.rope_type == "default" else yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 · mscale · ln(factor) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def check_computable(rope: RopeConfig) -> None:
    """Raise CheckpointError for parameters whose tables are not finite, or differ between loaders."""
    if rope.rope_type == "yarn" and rope.attention_factor is None and not (rope.mscale and rope.mscale_all_dim):
        # transformers reads both or neither; DeepSeek's own code and the engines read each by itself.
        apart, together = attention_factor(rope), yarn_mscale(rope.factor, 1.0)
        if not math.isclose(apart, together, rel_tol=1e-9):
            raise CheckpointError(
                f"config.json: YaRN with mscale {rope.mscale} and mscale_all_dim {rope.mscale_all_dim} is {apart:.4g} "
                f"in DeepSeek's code and the engines and {together:.4g} in transformers; give both, neither, or "
                "attention_factor"
            )
    frequencies = inverse_frequencies(rope, rope.positions)
    # The cosine of any angle fits float32: it is computed in float64 and then rounded.
    sound = np.isfinite(frequencies) & (frequencies > 0)
    factors = (attention_factor(rope), softmax_factor(rope))
    if not sound.all() or not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise CheckpointError(
            f"config.json: the rope parameters ({rope.rope_type}, theta {rope.theta:g}, factor {rope.factor:g}) give "
            "no rotary tables: frequencies and factors must be positive numbers"
        )


def _powers(base: float, dim: int) -> NDArray[np.float64]:
    """base^(−2i / dim) of each pair i. By the C library: numpy's and torch's own depend on the processor in the last
    bit, of which a late position makes 100,000."""
    return np.array([_power(base, -pair / dim) for pair in range(0, dim, 2)])


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except (OverflowError, ValueError):  # refused by `check_computable`
        return math.nan


def _yarn(rope: RopeConfig, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interpolated low frequencies, kept high ones and a linear ramp between (arXiv:2309.00071, section 3.2)."""
    assert rope.original_max_position is not None

    def dimension(rotations: float) -> float:
        wavelengths = rope.original_max_position / (rotations * 2 * math.pi)  # type: ignore[operator]
        return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(float(low), 0.0), min(float(high), rope.dim - 1.0)
    width = high - low if high != low else 0.001
    ramp = ((np.arange(rope.dim // 2, dtype=np.float64) - low) / width).clip(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _llama3(rope: RopeConfig, frequencies: NDArray[np.float64]) -> NDArray[np.float64]:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a smooth step between."""
    assert rope.original_max_position is not None
    rotations = rope.original_max_position * frequencies / (2 * math.pi)
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clip(0, 1)
    return frequencies * ((1 - smooth) / rope.factor + smooth)
