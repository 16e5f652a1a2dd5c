"""The scales of an int8 cache, folded into the weights around it: then a latent is a code, and no step scales it.

A channel's code is norm · gain / scale, rounded. The gain over the scale becomes the norm's gain, and the scale
multiplies the channel's column in every weight that reads latents. The operators take gains in the compute dtype, so
each channel's grid moves to the scale that its rounded gain stands for: by 2⁻⁹ of it in bfloat16, at most.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .mla import AscendMla


def fold_scale(mla: AscendMla, scale: Tensor) -> AscendMla:
    """Weights of a layer whose cached latents are codes. scale: float `[L]`, a code's step in each channel."""
    gain = mla.kv_a_norm.float()
    folded = (gain / scale.to(gain.device, torch.float32)).to(mla.kv_a_norm.dtype)
    # A channel without gain is 0 in every token, whatever its step.
    step = torch.where(folded == 0, torch.zeros_like(gain), gain / folded.float())
    return replace(
        mla,
        kv_a_norm=folded,
        w_uk=_times(mla.w_uk, step),
        w_uv=_times(mla.w_uv, step.unsqueeze(1)),
        k_b=replace(mla.k_b, weight=_times(mla.k_b.weight, step)),
        v_b=replace(mla.v_b, weight=_times(mla.v_b.weight, step)),
        caches_codes=True,
    )


def _times(weight: Tensor, step: Tensor) -> Tensor:
    return (weight.float() * step).to(weight.dtype)
