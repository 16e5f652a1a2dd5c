"""The int8 KV cache: static scales of the normalised latent, one a channel, and its codes.

Absorbed attention reads the latent as key and as value. Its norm's gain makes some channels larger than others, for
every token alike. A scale for each channel costs nothing at run time: queries are multiplied by it before attention,
outputs after. The rope channels stay in the compute dtype, which the NPU's int8 attention requires.

Every scale is exact in bfloat16 and in float16, so that operators lose nothing in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..deferred import torch
from ..errors import ArtifactError
from .safetensors import load_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

INT8_CHANNELS = 32
"""Channels of an NZ tile of int8: 32 bytes, the size of 16 channels of a 16-bit type."""

# The smallest normal float16, and the largest bfloat16 that float16 holds.
_LEAST, _MOST = 2.0**-14, 65280.0


def scale_name(layer: int) -> str:
    """The tensor name of a layer's scales."""
    return f"model.layers.{layer}.self_attn.kv_cache_scale"


def latent_codes(latent: Tensor, scale: Tensor) -> Tensor:
    """Quantize float `[T, L]` to int8 `[T, L]`: round-half-even(latent / scale), saturated; NaN gives 0. scale: float
    `[L]`.

    The same numbers as `npu_quantize` with `div_mode` (torch_npu's documentation of the operator).
    """
    return _whole_codes(latent, scale).to(torch.int8)


def cached_latent(latent: Tensor, scale: Tensor) -> Tensor:
    """Round float `[T, L]` to the values of its int8 codes, in the same dtype: the latent that attention reads back."""
    return _whole_codes(latent, scale).mul_(scale.float()).to(latent.dtype)


def _whole_codes(latent: Tensor, scale: Tensor) -> Tensor:
    return (latent.float() / scale.float()).round_().clamp_(-128, 127).nan_to_num_(0.0)


def storable_scale(scale: Tensor) -> Tensor:
    """Round positive float32 scales up to bfloat16, within float16's range; the dtype stays float32."""
    bits = scale.float().contiguous().view(torch.int32)
    rounded = ((bits + 0xFFFF) & -0x10000).view(torch.float32)
    return rounded.clamp(_LEAST, _MOST)


def save_scales(scales: Sequence[Tensor], path: Path) -> None:
    """Write the float32 `[L]` scales of every layer as safetensors; the same scales always give the same bytes."""
    write_tensors(path, {scale_name(layer): scale.float().numpy() for layer, scale in enumerate(scales)}, {})


def load_scales(path: Path, layers: int, channels: int) -> tuple[Tensor, ...]:
    """Read the scales that `save_scales` wrote: float32 `[channels]` for each of `layers` layers.

    Raises ArtifactError when the file is missing, has another format, or does not fit the model.
    """
    form = ("F32", (channels,))
    names = [scale_name(layer) for layer in range(layers)]
    tensors, _ = load_tensors(path, dict.fromkeys(names, form), ArtifactError)
    for name in names:
        if not ((tensors[name] >= _LEAST) & (tensors[name] <= _MOST)).all():
            raise ArtifactError(
                f"{path}: tensor {name!r} holds scales outside {_LEAST:.3g} to {_MOST:.3g}; convert again"
            )
    return tuple(torch.from_numpy(tensors[name]) for name in names)
