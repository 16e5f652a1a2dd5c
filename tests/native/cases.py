"""What the tests of the kernels share: levels of this CPU, random operands at any address, and exact products."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.native.library import levels
from npuq.runtime.ops import LinearPart, Quantized

LEVELS = levels()


def codes(generator: np.random.Generator, rows: int, columns: int, offset: int = 0) -> Tensor:
    """int8 [rows, columns] over the whole range of a byte, beginning `offset` bytes into its memory."""
    memory = torch.from_numpy(generator.integers(-128, 128, rows * columns + offset, dtype=np.int8))
    return memory[offset:].view(rows, columns)


def attention_tolerance(dtype: torch.dtype, values: Tensor, level: str) -> dict[str, float]:
    """Tolerances of attention's outputs in a compute dtype.

    bf16 rounds them. Levels that multiply in bf16 round weights too, each by 2^-9 of itself at most: outputs move by
    twice that of the largest value.
    """
    if dtype is torch.float32:
        return {"rtol": 1e-5, "atol": 1e-5}
    return {"rtol": 2**-8, "atol": 2**-8 * float(values.abs().max()) if "bf16" in level else 1e-3}


def part(generator: np.random.Generator, scheme: Scheme, rows: int, columns: int, offset: int = 0) -> LinearPart:
    """A stored linear of `rows` outputs whose weight lies at any address."""
    stored = rows // 2 if scheme is Scheme.W4A8 else rows
    scale = torch.from_numpy(generator.random((rows, 1), dtype=np.float32))
    return LinearPart(f"{rows}x{columns}", scheme, codes(generator, stored, columns, offset), scale)


def quantized(generator: np.random.Generator, rows: int, columns: int, offset: int = 0) -> Quantized:
    return Quantized(
        codes(generator, rows, columns, offset), torch.from_numpy(generator.random(rows, dtype=np.float32))
    )


def integers(stored: LinearPart) -> np.ndarray:
    """int64 [rows, columns] of a part: nibbles taken apart by arithmetic on whole numbers."""
    weight = stored.weight.numpy().astype(np.int64)
    if stored.scheme is not Scheme.W4A8:
        return weight
    nibbles = np.stack([weight % 16, weight // 16 % 16], axis=1)  # [N / 2, 2, K]
    return np.where(nibbles < 8, nibbles, nibbles - 16).reshape(-1, weight.shape[1])


def product(x: Quantized, parts: list[LinearPart]) -> np.ndarray:
    """float32 [rows, ΣN]: int64 sums, then the two scales in the order of npu_quant_matmul."""
    outputs = []
    for stored in parts:
        assert stored.scale is not None
        exact = x.codes.numpy().astype(np.int64) @ integers(stored).T
        outputs.append(exact.astype(np.float32) * stored.scale.numpy().T * x.scale.numpy()[:, None])
    return np.concatenate(outputs, axis=1)
