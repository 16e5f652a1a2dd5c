"""An int8 KV cache: static scales for the normalised latent, one a channel, and the codes that they give.

The latent is what absorbed attention reads as key and as value. Its norm's gain makes some channels larger than others,
for every token alike, and a scale for each costs nothing at run time: queries are multiplied by it before attention,
outputs after. The rope channels stay in the compute dtype, as the NPU's int8 attention wants them.

Every scale is a bfloat16 and a float16 number: operators that take it in the compute dtype lose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ArtifactError
from .safetensors import load_tensors, write_tensors

INT8_CHANNELS = 32
"""Channels of an NZ tile of int8: 32 bytes, as 16 channels of a 16-bit type are."""

# The smallest normal float16, and the largest bfloat16 that float16 holds.
_LEAST, _MOST = 2.0**-14, 65280.0


def scale_name(layer: int) -> str:
    """The name under which a layer's scales are stored."""
    return f"model.layers.{layer}.self_attn.kv_cache_scale"


def latent_codes(latent: Tensor, scale: Tensor) -> Tensor:
    """Float `[T, L]` → int8 `[T, L]`: round-half-even(latent / scale), saturated; NaN gives 0. scale: float `[L]`.

    What `npu_quantize` with `div_mode` computes of rows (torch_npu's documentation of the operator).
    """
    return _whole_codes(latent, scale).to(torch.int8)


def cached_latent(latent: Tensor, scale: Tensor) -> Tensor:
    """Float `[T, L]` as an int8 cache gives it back: the values that its codes stand for, in the same dtype."""
    return _whole_codes(latent, scale).mul_(scale.float()).to(latent.dtype)


def _whole_codes(latent: Tensor, scale: Tensor) -> Tensor:
    return (latent.float() / scale.float()).round_().clamp_(-128, 127).nan_to_num_(0.0)


def storable_scale(scale: Tensor) -> Tensor:
    """The next bfloat16 upwards of each positive float32 scale, in the range that float16 shares; float32 still."""
    bits = scale.float().contiguous().view(torch.int32)
    rounded = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    return rounded.clamp(_LEAST, _MOST)


def save_scales(scales: Sequence[Tensor], path: Path) -> None:
    """Write the float32 `[L]` scales of every layer as safetensors; the same scales always give the same bytes."""
    write_tensors(path, {scale_name(layer): scale.float() for layer, scale in enumerate(scales)}, {})


def load_scales(path: Path, layers: int, channels: int) -> tuple[Tensor, ...]:
    """What `save_scales` wrote, float32 `[channels]` for each of `layers` layers.

    Raises ArtifactError when the file is missing, is something else, or does not fit the model.
    """
    form = ("F32", (channels,))
    names = [scale_name(layer) for layer in range(layers)]
    tensors, _ = load_tensors(path, dict.fromkeys(names, form), ArtifactError)
    for name in names:
        if not bool(((tensors[name] >= _LEAST) & (tensors[name] <= _MOST)).all()):
            raise ArtifactError(
                f"{path}: tensor {name!r} holds scales outside {_LEAST:.3g} to {_MOST:.3g}; convert again"
            )
    return tuple(tensors[name] for name in names)
