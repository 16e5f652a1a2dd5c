"""Smoothing: channels of an activation are divided by s and the weight's columns multiplied by s.

Large activation channels waste the int8 grid of the whole token, large weight columns that of the whole row. Moving a
factor s_k from one to the other changes nothing in exact arithmetic (Xiao et al., "SmoothQuant", 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

# The limit of silent channels (never active, or with a column of zeros), which keep their scale.
_SILENT = 1e-12


def smoothing_scale(activation: Tensor, weight: Tensor, strength: float) -> Tensor:
    """s = activation^strength / weight^(1 − strength), float64 [K], normalised to a geometric mean of 1.

    `activation` and `weight` [K] are the largest magnitudes of each channel and of each column. A strength of 1
    balances the activations alone, 0 the columns alone. Silent channels get 1.
    """
    activation, weight = activation.to(torch.float64), weight.to(torch.float64)
    live = (activation > _SILENT) & (weight > _SILENT)
    logs = strength * activation.where(live, 1.0).log() - (1 - strength) * weight.where(live, 1.0).log()
    if bool(live.any()):
        logs = logs - logs[live].mean()
    return logs.where(live, 0.0).exp()


def power_of_two(scale: Tensor) -> Tensor:
    """The nearest powers of two: a float weight times these keeps its precision."""
    return torch.exp2(scale.to(torch.float64).log2().round())
