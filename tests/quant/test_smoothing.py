"""Smoothing scales balance what they claim to, and leave silent channels alone."""

from __future__ import annotations

import torch

from npuq.quant.smoothing import power_of_two, smoothing_scale


def test_strength_one_levels_the_activations_and_zero_the_columns() -> None:
    activation, weight = torch.tensor([1.0, 10.0, 0.1]), torch.tensor([2.0, 0.5, 4.0])
    levelled = activation / smoothing_scale(activation, weight, 1.0)
    torch.testing.assert_close(levelled, levelled[:1].expand(3))
    levelled = weight * smoothing_scale(activation, weight, 0.0)
    torch.testing.assert_close(levelled, levelled[:1].expand(3))


def test_half_meets_in_the_middle() -> None:
    """SmoothQuant's balance: at ½ both sides end with the same profile."""
    activation, weight = torch.tensor([1.0, 9.0]), torch.tensor([4.0, 1.0])
    scale = smoothing_scale(activation, weight, 0.5)
    assert float(scale.log().mean().abs()) < 1e-12
    ratio = (activation / scale) / (weight * scale)
    torch.testing.assert_close(ratio, ratio[:1].expand(2))


def test_silent_channels_keep_their_scale() -> None:
    scale = smoothing_scale(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    assert scale[0] == 1 and scale[2] == 1
    assert torch.equal(smoothing_scale(torch.zeros(2), torch.zeros(2), 0.5), torch.ones(2, dtype=torch.float64))


def test_powers_of_two() -> None:
    assert power_of_two(torch.tensor([0.3, 1.0, 1.6, 22.0])).tolist() == [0.25, 1.0, 2.0, 16.0]
