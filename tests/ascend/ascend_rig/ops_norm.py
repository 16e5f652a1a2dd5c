"""Norms, activations and quantization: semantics of the operators, with the roundings that are documented for bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from .emulate import RefusedError, dtype_of, require, rules, semantics

MOST_SWIGLU_OUTPUTS = 8192
QINT8 = 12  # ScalarType number of torch.qint8


def rms(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x²) + epsilon) over the last dimension, float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)


def quantize_rows(x: Tensor, scale: Tensor, quotient: Tensor, ties: str = "even") -> tuple[Tensor, Tensor]:
    """int8 codes of `quotient` and the row `scale`; rows of zeros give zeros for both."""
    zero = x.abs().amax(-1) == 0
    rounded = quotient.round() if ties == "even" else quotient.sign() * (quotient.abs() + 0.5).floor()
    codes = torch.where(zero.unsqueeze(-1), 0.0, rounded).clamp(-128, 127).to(torch.int8)
    return codes, torch.where(zero, 0.0, scale)


def check_gamma(name: str, x: Tensor, gamma: Tensor) -> None:
    require(x.dtype in (*rules.floats, torch.float32), f"{name}: x is {x.dtype}")
    require(gamma.dtype == x.dtype, f"{name}: gamma is {gamma.dtype}, x {x.dtype}")
    require(gamma.shape == x.shape[-1:], f"{name}: gamma {tuple(gamma.shape)} for x {tuple(x.shape)}")
    require(x.numel() > 0, f"{name}: x is empty")


@semantics
def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    check_gamma("npu_rms_norm", input, gamma)
    rstd = rms(input, epsilon)
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@semantics
def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    check_gamma("npu_add_rms_norm", x1, gamma)
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, "npu_add_rms_norm: x1 and x2 differ in shape or dtype")
    total = x1.float() + x2.float()
    rstd = rms(total, epsilon)
    # The normalised sum is rounded once before gamma and once after.
    normed = (total * rstd).to(x1.dtype).float() * gamma.float()
    return normed.to(x1.dtype), rstd, total.to(x1.dtype)


@semantics
def npu_add_rms_norm_dynamic_quant(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6, output_mask: list[bool] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = "npu_add_rms_norm_dynamic_quant"
    check_gamma(name, x1, gamma)
    require(x1.dtype in rules.floats, f"{name}: x1 is {x1.dtype}")
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, f"{name}: x1 and x2 differ in shape or dtype")
    require(output_mask is None or list(output_mask) == [True, False], f"{name}: only the first output is emulated")
    total = x1.float() + x2.float()
    normed = total * rms(total, epsilon) * gamma.float()
    scale = normed.abs().amax(-1) / 127
    codes, scale = quantize_rows(normed, scale, normed / scale.unsqueeze(-1))
    # The second output is left out where there is no second smooth scale.
    return codes, torch.empty(0, dtype=torch.int8), total.to(x1.dtype), scale, torch.empty(0)


@semantics
def npu_dynamic_quant(
    input: Tensor, smooth_scales: Tensor | None = None, dst_type: int | None = None
) -> tuple[Tensor, Tensor]:
    require(input.dtype in rules.floats, f"npu_dynamic_quant: input is {input.dtype}")
    require(input.dim() > 1, "npu_dynamic_quant: input needs two dimensions or more")
    require(dtype_of(dst_type, torch.int8) == torch.int8, "npu_dynamic_quant: only int8 is emulated")
    x = input.float()
    if smooth_scales is not None:
        require(
            smooth_scales.shape == input.shape[-1:], f"npu_dynamic_quant: smooth_scales {tuple(smooth_scales.shape)}"
        )
        require(smooth_scales.dtype == input.dtype, f"npu_dynamic_quant: smooth_scales are {smooth_scales.dtype}")
        x = x * smooth_scales.float()
    factor = 127.0 / x.abs().amax(-1)
    return quantize_rows(x, 1.0 / factor, x * factor.unsqueeze(-1))


@semantics
def npu_quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    name = "npu_quantize"
    require(input.dtype in (*rules.floats, torch.float32), f"{name}: input is {input.dtype}")
    require(dtype == QINT8, f"{name}: only qint8 is emulated")
    if div_mode:
        require(-input.dim() <= axis < input.dim(), f"{name}: axis {axis} of {input.dim()} dimensions")
        require(scales.shape in ((1,), (input.shape[axis],)), f"{name}: scales {tuple(scales.shape)}")
        require(scales.dtype in (torch.bfloat16, torch.float32), f"{name}: scales are {scales.dtype}")
        require(zero_points is None, f"{name}: zero_points of a quotient are not emulated")
        divisor = scales.float().view([-1 if place == axis % input.dim() else 1 for place in range(input.dim())])
        return (input.float() / divisor).round().clamp(-128, 127).to(torch.int8)
    require(axis in (-1, input.dim() - 1), f"{name}: axis {axis} is not the last")
    require(scales.shape in ((1,), input.shape[-1:]), f"{name}: scales {tuple(scales.shape)}")
    require(scales.dtype == input.dtype, f"{name}: scales are {scales.dtype}, input {input.dtype}")
    shift = torch.zeros_like(scales) if zero_points is None else zero_points
    require(shift.dtype == scales.dtype and shift.shape == scales.shape, f"{name}: zero_points are not like scales")
    return (input.float() * scales.float() + shift.float()).round().clamp(-128, 127).to(torch.int8)


def swiglu(x: Tensor, activate_left: bool = True) -> Tensor:
    """float32 silu(one half) · the other half, over the last dimension."""
    left, right = x.float().chunk(2, dim=-1)
    gate, up = (left, right) if activate_left else (right, left)
    # Not torch's silu: its last bit depends on a number's place in the tensor, which differs where ranks divide rows.
    return gate / (1 + torch.exp(-gate)) * up


@semantics
def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    require(dim in (-1, input.dim() - 1), "npu_swiglu: only the last dimension is emulated")
    require(input.shape[-1] % 2 == 0, f"npu_swiglu: last dimension {input.shape[-1]} is odd")
    return swiglu(input).to(input.dtype)


@semantics
def npu_dequant_swiglu_quant(
    x: Tensor, activate_left: bool = False, quant_mode: int = 0, dst_type: int | None = None
) -> tuple[Tensor, Tensor]:
    name = "npu_dequant_swiglu_quant"
    if quant_mode != 1:
        raise RefusedError(
            f"{name}: quant_mode {quant_mode} (0, the default, is static quantization) needs a quant_scale"
        )
    require(x.dim() == 2 and x.shape[1] % 2 == 0, f"{name}: x {tuple(x.shape)} is not [tokens, 2 · H]")
    require(x.shape[1] <= 2 * MOST_SWIGLU_OUTPUTS, f"{name}: H {x.shape[1] // 2}, more than {MOST_SWIGLU_OUTPUTS}")
    require(x.dtype in rules.floats, f"{name}: x is {x.dtype}")
    require(dtype_of(dst_type, torch.int8) == torch.int8, f"{name}: only int8 is emulated")
    y = swiglu(x, activate_left)
    scale = y.abs().amax(-1) / 127
    return quantize_rows(y, scale, y / scale.unsqueeze(-1))
