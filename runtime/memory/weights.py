"""Bytes of a rank's weights, as each backend lays them out (`runtime/ops/*/weights.py`, `mla.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import torch

from ...formats.schemes import Scheme
from ...models.family import Block, Entry
from ..ranks.layout import Owned
from .stored import Part, StoredModel


class Bytes(NamedTuple):
    """mapped: pages of files, which the machine's processes share, and which leave memory when it is short. copied:
    memory of this rank alone."""

    mapped: int = 0
    copied: int = 0

    @property
    def total(self) -> int:
        return self.mapped + self.copied

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.mapped + other.mapped, self.copied + other.copied)

    def times(self, count: int) -> Bytes:
        return Bytes(self.mapped * count, self.copied * count)


class Backend(Protocol):
    """The memory of one backend's weights.

    dtype: the compute dtype. usable: the share of memory that weights, workspace and cache may take. held: bytes that
    allocators hold for a byte of a step's tensors. on_device: weights are copied to a device, and not mapped.
    spare_blocks: blocks of a cache beyond those of sequences.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def usable(self) -> float: ...

    @property
    def held(self) -> float: ...

    @property
    def on_device(self) -> bool: ...

    @property
    def spare_blocks(self) -> int: ...

    def weight(self, part: Part, outputs: int, inputs: int, by_columns: bool) -> Bytes:
        """Bytes of one tensor `[outputs, inputs]`, which may be a slice: `by_columns` of its inputs. A vector has one
        input."""


EXPERTS, ATTENTION, MLP, VOCABULARY, OTHER = "routed experts", "attention", "MLPs", "vocabulary", "other"
KINDS: Final = (EXPERTS, ATTENTION, MLP, VOCABULARY, OTHER)
"""Weights by kind. MLPs: dense blocks and shared experts. vocabulary: embedding and head. other: norms, routers, rotary
tables."""
_KIND: Final[Mapping[Block, str]] = {
    Block.EXPERT: EXPERTS,
    Block.ATTENTION: ATTENTION,
    Block.DENSE: MLP,
    Block.SHARED: MLP,
}

_FLOAT32, _INT32, _WORD = 4, 4, 8
_STATIC_HANDLES: Final[Mapping[str, int]] = {"q": 2, "q_b": 2, "up": 0}
"""Handles on an NPU of a static linear, if not one: queries of latent attention are split into their unrotated and
their rotary rows, and `up` runs in the handle of `gate`."""


@dataclass(frozen=True)
class NpuMemory:
    """Memory of weights on an NPU: everything is copied to the device.

    FRACTAL_NZ adds nothing: a matrix that does not fill its tiles stays as it is.
    """

    dtype: torch.dtype = torch.bfloat16
    # The rest is for CANN's own workspace, HCCL's buffers and fragmentation; vLLM-Ascend's default is the same.
    usable: float = 0.9
    held: float = 1.0
    on_device: bool = True
    spare_blocks: int = 1  # for padding and tokens that are not cached: ops/ascend/attention/cache.py

    def weight(self, part: Part, outputs: int, inputs: int, by_columns: bool) -> Bytes:
        return Bytes(copied=self._copied(part, outputs, inputs))

    def _copied(self, part: Part, outputs: int, inputs: int) -> int:
        values, scheme, itemsize = outputs * inputs, part.stored.scheme, self.dtype.itemsize
        if part.block is Block.EXPERT:
            return _device_expert(scheme, outputs, values, self.dtype)
        if part.block is Block.ROUTER or part.entry.kind == "layer_norm":
            return _FLOAT32 * values
        if part.entry.kind == "norm":
            return itemsize * values
        if part.entry.kind == "lookup":
            return (part.stored.itemsize or itemsize) * values
        if part.entry.part == "kv_b":  # decompression, and the two halves that absorb
            return 2 * itemsize * values
        if scheme is Scheme.W8A8_STATIC:
            # deq_scale, for float16 in words of 64 bits, and quant_bias; for each handle the inputs' scale and offset.
            columns = (_WORD if self.dtype is torch.float16 else _FLOAT32) + _INT32
            return values + columns * outputs + _static_handles(part.entry) * 2 * itemsize
        return _code_bytes(scheme, values, itemsize) + (_FLOAT32 * outputs if scheme is Scheme.W8A8 else 0)


@dataclass(frozen=True)
class CpuMemory:
    """Memory of weights on the CPU: mapped from their files, but for decoded floats and slices by columns."""

    dtype: torch.dtype = torch.float32
    usable: float = 1.0
    held: float = 1.5  # as measured with glibc's malloc: benchmarks/rank_memory.py
    on_device: bool = False
    spare_blocks: int = 0

    def weight(self, part: Part, outputs: int, inputs: int, by_columns: bool) -> Bytes:
        values, stored, compute = outputs * inputs, part.stored, self.dtype.itemsize
        if part.entry.kind in ("norm", "layer_norm", "vector"):
            itemsize = compute if part.entry.kind == "norm" else _FLOAT32
            return Bytes(itemsize * values) if stored.itemsize == itemsize else Bytes(copied=itemsize * values)
        if not stored.mapped or part.entry.kind == "bias":  # biases of q, k and v are joined
            return Bytes(copied=compute * values)
        codes = _code_bytes(stored.scheme, values, stored.itemsize)
        columns = {Scheme.FLOAT: 0, Scheme.W8A8_STATIC: 2 * _FLOAT32}.get(stored.scheme, _FLOAT32)
        scales = columns * outputs
        return Bytes(scales, codes) if by_columns else Bytes(codes + scales)


def weight_bytes(model: StoredModel, owned: Owned, backend: Backend) -> dict[str, Bytes]:
    """Bytes of a rank's weights, by kind."""
    return bytes_by_kind(model, backend, lambda part: _rank_part(part, owned, backend))


def bytes_by_kind(model: StoredModel, backend: Backend, of_part: Callable[[Part], Bytes]) -> dict[str, Bytes]:
    """Add up the bytes of all parts, and of the rotary tables, by kind."""
    found = dict.fromkeys(KINDS, Bytes())
    for part in model.parts:
        kind = _kind(part)
        found[kind] = found[kind].plus(of_part(part))
    found[OTHER] = found[OTHER].plus(Bytes(copied=_rope_bytes(model, backend)))
    return found


def sliced_bytes(part: Part, ranges: Sequence[range], backend: Backend) -> Bytes:
    """Bytes of one tensor of a part, of which a rank has these ranges of each dimension."""
    outputs, inputs = len(ranges[0]), len(ranges[1]) if len(ranges) > 1 else 1
    return backend.weight(part, outputs, inputs, len(ranges) > 1 and inputs < part.shape[1])


def _rank_part(part: Part, owned: Owned, backend: Backend) -> Bytes:
    exact_sum = part.stored.scheme is not Scheme.FLOAT
    ranges = owned.ranges(part.block, part.entry, exact_sum=exact_sum, shape=part.shape)
    experts = owned.config.n_routed_experts
    count = part.count * len(owned.experts) // experts if part.block is Block.EXPERT else part.count
    return sliced_bytes(part, ranges, backend).times(count)


def _rope_bytes(model: StoredModel, backend: Backend) -> int:
    """Rotary tables in the compute dtype, cos and sin, each with its halves twice (`runtime/step.py`)."""
    config = model.config
    return 2 * config.rope.positions * 2 * config.rope_pairs * backend.dtype.itemsize


def _kind(part: Part) -> str:
    if part.block is Block.TOP:
        return OTHER if part.entry.kind == "norm" else VOCABULARY
    return _KIND.get(part.block, OTHER)


def _static_handles(entry: Entry) -> int:
    if entry.fused == "q":  # in grouped-query attention k and v run in the handle of q
        return int(entry.part == "q")
    return _STATIC_HANDLES.get(entry.part, 1)


def _code_bytes(scheme: Scheme, values: int, itemsize: int) -> int:
    return values * itemsize if scheme is Scheme.FLOAT else values * scheme.weight_bits // 8


def _device_expert(scheme: Scheme, outputs: int, values: int, dtype: torch.dtype) -> int:
    """Bytes of one expert's linear: W4A8 has scales in words of 64 bits, and scale_bias in float32; the scales of W8A8
    are bfloat16 for bfloat16 products, else float32."""
    scale = dtype.itemsize if dtype is torch.bfloat16 else _FLOAT32
    columns = {Scheme.W4A8: _WORD + _FLOAT32, Scheme.W8A8: scale}.get(scheme, 0)
    return _code_bytes(scheme, values, dtype.itemsize) + columns * outputs
