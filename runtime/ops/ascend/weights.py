"""Stored weights laid out for the NPU: `[K, N]`, in FRACTAL_NZ if it tiles them, scales as the kernels read them.

FRACTAL_NZ (ACL format 29) keeps a matrix in tiles of 16 rows by 32 bytes. A matrix that does not fill its tiles stays
ND, which every operator except `npu_mla_prolog_v3` takes as well. int4 weights are cast as int8 bytes of two nibbles,
then viewed as int32 of eight nibbles, the form of the grouped matmul: the tiles are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import BackendError
from ....formats.static_w8a8 import InputScale
from ...ranks.division import Division
from ..handles import Experts, Linear, LinearPart, Router
from ..weights import Weights

FRACTAL_NZ = 29
TILE_ROWS = 16
TILE_BYTES = 32

W4A8_K_MULTIPLE = 64
W4A8_MAX_K = 18432
INT4_PER_INT32 = 8
MAX_DIMENSION = 65535


@dataclass(frozen=True)
class FloatLinear(Linear):
    """Float linear. weight: `[N, K]` in the compute dtype, as torch's own linear takes it."""

    weight: Tensor


@dataclass(frozen=True)
class W8A8Linear(Linear):
    """W8A8 linear. weight: int8 `[K, N]`, NZ if it tiles. scale: float32 `[N]`."""

    weight: Tensor
    scale: Tensor


@dataclass(frozen=True)
class StaticLinear(Linear):
    """Static W8A8 linear. weight: int8 `[K, N]`, NZ if it tiles. inputs: the scale of its input; factor, offset: the
    same in the compute dtype `[1]`, as `npu_quantize` takes them. deq_scale: float32 `[N]`, or for float16 output int64
    with those bits in the low words. quant_bias: int32 `[N]`.
    """

    weight: Tensor
    inputs: InputScale
    factor: Tensor
    offset: Tensor
    deq_scale: Tensor
    quant_bias: Tensor


@dataclass(frozen=True)
class FloatExperts(Experts):
    """Float experts. weight: `[E, K, N]` in the compute dtype."""

    weight: Tensor


@dataclass(frozen=True)
class QuantizedExperts(Experts):
    """Experts that take int8 activations."""

    weight: Tensor
    scale: Tensor


@dataclass(frozen=True)
class W8A8Experts(QuantizedExperts):
    """W8A8 experts. weight: int8 `[E, K, N]`. scale: `[E, N]`, bfloat16 for bfloat16 output (as the kernel pairs them),
    else float32."""


@dataclass(frozen=True)
class W4A8Experts(QuantizedExperts):
    """W4A8 experts. weight: int32 `[E, K, N/8]`. scale: int64 `[E, 1, N]` of float32 bits, high words 0. scale_bias:
    float32 `[E, N]`."""

    scale_bias: Tensor


@dataclass(frozen=True)
class DeviceRouter(Router):
    """Router. weight: float32 `[E, H]`."""

    weight: Tensor


class AscendWeights(Weights):
    """Layout of weights on the NPU, for products in its compute dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def float_linear(self, weights: Sequence[Tensor], outputs: Sequence[Division | None] = ()) -> FloatLinear:
        return FloatLinear(torch.cat([weight.to(self.dtype) for weight in weights]).to(self.device))

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> W8A8Linear:
        return W8A8Linear(self._int8_matrix(parts), self._scales(parts))

    def static_linear(self, parts: Sequence[LinearPart]) -> StaticLinear:
        statics = [part.static for part in parts if part.static is not None]
        if len(statics) != len(parts):
            raise BackendError(f"{parts[0].name}: static W8A8 without its input scale")
        deq_scale = torch.cat([static.deq_scale for static in statics])
        words = scale_words(deq_scale) if self.dtype == torch.float16 else deq_scale
        inputs = statics[0].inputs
        return StaticLinear(
            weight=self._int8_matrix(parts),
            inputs=inputs,
            factor=(1.0 / torch.tensor([inputs.scale]).to(self.dtype)).to(self.device),
            offset=torch.tensor([float(inputs.offset)]).to(self.device, self.dtype),
            deq_scale=words.to(self.device),
            quant_bias=torch.cat([static.quant_bias for static in statics]).to(self.device),
        )

    def _int8_matrix(self, parts: Sequence[LinearPart]) -> Tensor:
        weight = torch.cat([part.weight for part in parts]).t().contiguous()
        if max(weight.shape) > MAX_DIMENSION:
            raise BackendError(f"{parts[0].name}: {list(weight.shape)} exceeds the NPU's {MAX_DIMENSION} a dimension")
        return cast_nz(weight.to(self.device))

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> FloatExperts:
        return FloatExperts(self._stack(experts, self.dtype))

    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> W8A8Experts:
        scale = torch.stack([self._scales(parts) for parts in experts])
        wide = self.dtype if self.dtype == torch.bfloat16 else torch.float32
        return W8A8Experts(cast_nz(self._stack(experts, torch.int8)), scale.to(wide))

    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> W4A8Experts:
        name, inputs = experts[0][0].name, experts[0][0].weight.shape[1]
        check_w4a8_inputs(name, inputs)
        packed = self._stack(experts, torch.int8)  # [E, K, N/2], a byte holding two outputs
        if packed.shape[2] % (INT4_PER_INT32 // 2):
            raise BackendError(f"{name}: the NPU's W4A8 matmul needs outputs that are a multiple of {INT4_PER_INT32}")
        scales = torch.stack([self._scales(parts) for parts in experts])
        return W4A8Experts(
            weight=cast_nz(packed).view(torch.int32),
            scale=scale_words(scales).unsqueeze(1),
            scale_bias=torch.stack([self._scale_bias(parts) for parts in experts]),
        )

    def router(self, weight: Tensor) -> DeviceRouter:
        return DeviceRouter(weight.float().to(self.device))

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(self.device, dtype or tensor.dtype).contiguous()

    def _stack(self, experts: Sequence[Sequence[LinearPart]], dtype: torch.dtype) -> Tensor:
        """Stack experts on the device, `[E, K, N]`, one by one: host memory holds one expert at a time."""
        outputs = sum(part.weight.shape[0] for part in experts[0])
        shape = (len(experts), experts[0][0].weight.shape[1], outputs)
        stacked = torch.empty(shape, dtype=dtype, device=self.device)
        for place, parts in zip(stacked, experts, strict=True):
            place.copy_(torch.cat([part.weight.to(dtype) for part in parts]).t().contiguous())
        return stacked

    def _scales(self, parts: Sequence[LinearPart]) -> Tensor:
        scales = []
        for part in parts:
            if part.scale is None:
                raise BackendError(f"{part.name}: a quantized linear without weight_scale")
            scales.append(part.scale.flatten())
        return torch.cat(scales).to(self.device)

    def _scale_bias(self, parts: Sequence[LinearPart]) -> Tensor:
        """Sum of the partial sums over slices of K: 8 · Σ_k q · s of every output, as one device needs it."""
        biases = []
        for part in parts:
            if part.scale_bias is None:
                raise BackendError(f"{part.name}: W4A8 without scale_bias")
            biases.append(part.scale_bias.sum(dim=1))
        return torch.cat(biases).to(self.device)


def check_w4a8_inputs(name: str, inputs: int) -> None:
    """Raise BackendError for input features that the W4A8 matmul does not take."""
    if inputs % W4A8_K_MULTIPLE or inputs > W4A8_MAX_K:
        raise BackendError(
            f"{name}: the NPU's W4A8 matmul needs input features that are a multiple of {W4A8_K_MULTIPLE} "
            f"up to {W4A8_MAX_K}, not {inputs}"
        )


def fits_nz(matrix: Tensor) -> bool:
    """True if `[..., K, N]` fills the tiles of FRACTAL_NZ."""
    return matrix.shape[-2] % TILE_ROWS == 0 and matrix.shape[-1] % (TILE_BYTES // matrix.element_size()) == 0


def cast_nz(matrix: Tensor) -> Tensor:
    """Cast `[..., K, N]` to FRACTAL_NZ, of the same logical shape; one that does not fill the tiles stays ND."""
    cast: Tensor = torch.ops.npu.npu_format_cast(matrix, FRACTAL_NZ) if fits_nz(matrix) else matrix
    return cast


def scale_words(scales: Tensor) -> Tensor:
    """Pack float32 bits into the low words of int64, zeros into the high words."""
    return scales.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def float_scales(words: Tensor) -> Tensor:
    """The float32 scales of `scale_words`; float32 scales as they are."""
    return words.to(torch.int32).view(torch.float32) if words.dtype is torch.int64 else words
