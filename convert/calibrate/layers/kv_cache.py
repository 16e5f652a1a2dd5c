"""Scales for an int8 KV cache: for each channel of the latent, the scale of least squared error on the calibration
text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....deferred import torch
from ....formats.kv_cache import latent_codes, storable_scale
from ....parallel.pool import Pool

if TYPE_CHECKING:
    from torch import Tensor

# Fractions of the largest value: a scale may clip a few values for the precision of the others.
FRACTIONS = tuple(step / 20 for step in range(20, 9, -1))


@dataclass(frozen=True)
class LatentScale:
    """Scales of an int8 cache of the latent.

    scale: float32 `[L]`, one a channel. error: ‖codes · scale − latent‖ / ‖latent‖ over all calibration tokens.
    """

    scale: Tensor
    error: float


def search_scale(latents: Callable[[slice], Tensor], batches: Sequence[slice], pool: Pool) -> LatentScale:
    """Search the scales of the latents that `latents` returns batch by batch, float32 `[T, L]`, twice for each.

    A channel that is zero throughout gets the largest scale of the others.
    """
    largest = torch.stack(list(pool.map(lambda batch: latents(batch).abs().amax(0), batches))).amax(0)
    largest = torch.where(largest > 0, largest, largest.amax())
    largest = torch.where(largest > 0, largest, torch.ones(()))
    scales = storable_scale(torch.tensor(FRACTIONS)[:, None] * largest / 127)  # [candidates, L]

    def lost(batch: slice) -> tuple[Tensor, Tensor]:
        latent = latents(batch)
        errors = [(latent_codes(latent, scale).float() * scale - latent).double().square().sum(0) for scale in scales]
        return torch.stack(errors), latent.double().square().sum()

    found = list(pool.map(lost, batches))
    errors, norm = sum(errors for errors, _ in found), sum(norm for _, norm in found)
    assert isinstance(errors, torch.Tensor)
    least = errors.min(dim=0)
    return LatentScale(
        scales.gather(0, least.indices[None])[0], math.sqrt(float(least.values.sum()) / float(norm)) if norm else 0.0
    )
