"""Shows that every parameter that an engine creates is loaded, and with what."""

from __future__ import annotations

import torch
from torch import nn

POISON = 111


def poison(model: nn.Module) -> None:
    """What an unloaded parameter holds: NaN, or 111 where there is no NaN."""
    for parameter in model.parameters():
        parameter.data.fill_(float("nan") if parameter.dtype.is_floating_point else POISON)


def check_filled(model: nn.Module, borrowed: tuple[str, ...] = ()) -> None:
    """Raise ValueError for a parameter that is not loaded; names in `borrowed` are another model's."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in borrowed):
            continue
        rows = parameter.data.reshape(-1, parameter.shape[-1]) if parameter.dim() > 1 else parameter.data[:, None]
        empty = rows.isnan() if parameter.dtype.is_floating_point else rows == POISON
        if bool(empty.all(dim=1).any()):
            raise ValueError(f"parameter {name!r} {list(parameter.shape)}: not loaded from the artifact")
        if parameter.dtype in (torch.float32, torch.bfloat16) and bool(empty.any()):
            raise ValueError(f"parameter {name!r} {list(parameter.shape)}: partly not loaded from the artifact")
