"""Limits of the machine, measured in the same run as the benchmark: reading memory, int8 products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Clock = Callable[[], float]  # seconds
Product = Callable[[Tensor, Tensor], Callable[[], object]]
"""From int8 rows [M, K] and a weight [N, K] to what multiplies them."""


def fastest_int8(clock: Clock) -> Product:
    """Torch's fastest int8 product on this processor. Without VNNI, _int_mm is a plain loop, and the quantized linear
    layers (FBGEMM's, oneDNN's) are faster."""
    products = [_int_mm, *(_quantized_linear(engine) for engine in torch.backends.quantized.supported_engines)]
    operands = random_int8(64, 1024, 1024)
    return min(products, key=lambda product: best(product(*operands), 3, clock))


def random_int8(rows: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    rows = max(rows, 17)  # _int_mm takes more than 16 rows
    return torch.randint(-127, 128, (rows, k), dtype=torch.int8), torch.randint(-127, 128, (n, k), dtype=torch.int8)


def _int_mm(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch._int_mm(x, weight.T)


def _quantized_linear(engine: str) -> Product:
    def product(x: Tensor, weight: Tensor) -> Callable[[], object]:
        torch.backends.quantized.engine = engine
        scales, zeros = torch.full((len(weight),), 0.01), torch.zeros(len(weight), dtype=torch.int64)
        packed = torch.ops.quantized.linear_prepack(
            torch._make_per_channel_quantized_tensor(weight, scales, zeros, 0), None
        )
        # These kernels take unsigned activations with zero point 128.
        rows = torch._make_per_tensor_quantized_tensor((x.short() + 128).to(torch.uint8), 0.01, 128)
        return lambda: torch.ops.quantized.linear(rows, packed, 1.0, 128)

    return product


def read_bandwidth(clock: Clock, passes: int = 7) -> float:
    """Bytes/s of summing a buffer far larger than any cache: the best of several passes."""
    buffer = torch.ones(256 << 20, dtype=torch.float32)
    return buffer.nbytes / best(buffer.sum, passes, clock)


def best(work: Callable[[], object], repeat: int, clock: Clock) -> float:
    """Seconds of the fastest of `repeat` runs."""
    seconds = []
    for _ in range(repeat):
        started = clock()
        work()
        seconds.append(clock() - started)
    return min(seconds)
