"""Measuring what the grouped matmul should expect, on the device, in the shapes of a model (`npuq doctor --tune`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import BackendError
from ...formats.checkpoint import Checkpoint
from ...formats.sources.model_config import read_model_config
from ..attention.kinds import attention_of
from ..ops import Ops, Quantized
from ..ops.ascend.operators import AscendOps
from ..ops.ascend.products import AscendProducts
from ..ops.ascend.routing import AscendRouting
from ..ops.ascend.support import import_torch_npu
from ..ops.ascend.tuning.file import tuned_device, tuning_path, write_tuning
from ..ops.ascend.tuning.grouped_matmul import Expectation, MatmulShape, Tuning
from ..ops.ascend.weights import QuantizedExperts
from ..store import open_store
from ..weights import load_layer
from .bench.timing import seconds_of

TOKENS = tuple(1 << power for power in range(11))
"""Tokens of the steps to tune for: 1, 2, 4 … 1024, the most of a step by default."""
MEASURED_SECONDS, MOST_CALLS = 0.02, 50
LEAST_GAIN = 0.03
"""An expectation is chosen if the operator then takes so much less time than when told nothing."""


@dataclass(frozen=True)
class Tried:
    """One shape: seconds of a call for each expectation, and the choice."""

    shape: MatmulShape
    seconds: dict[Expectation, float]

    @property
    def choice(self) -> Expectation:
        best = min(self.seconds, key=lambda each: self.seconds[each])
        gains = self.seconds[best] < (1 - LEAST_GAIN) * self.seconds[Expectation.NONE]
        return best if gains else Expectation.NONE

    def as_json(self) -> dict[str, Any]:
        seconds = {each.value: value for each, value in self.seconds.items()}
        return {**vars(self.shape), "seconds": seconds, "expect": self.choice.value}


def untuned_ops(device: str) -> Ops:
    """Operators of an NPU that know no choices: a file that is refused is what measuring again replaces."""
    return AscendOps(device, tuning=Tuning())


def tune(directory: Path, ops: Ops) -> Iterator[Tried]:
    """Try all expectations on the experts of a model's first MoE layer, for each number of rows.

    Gate and up are left out where a step runs them in the fused operator, which is told nothing.

    Raises BackendError for another backend's operators, and for a model without quantized experts.
    """
    products = ops.products
    if not isinstance(products, AscendProducts):
        raise BackendError("only the ascend backend has something to tune")
    layer = _moe_layer(directory, ops)
    fused = isinstance(ops.routing, AscendRouting) and ops.routing.fused.takes(layer.gate_up)
    earlier = products.tuning
    try:
        done: set[MatmulShape] = set()
        for tokens in TOKENS:
            for weights in (layer.down,) if fused else (layer.gate_up, layer.down):
                shape = MatmulShape.of(weights, tokens * layer.k)
                if shape not in done:
                    done.add(shape)
                    yield _tried(ops, products, weights, shape)
    finally:
        products.tuning = earlier


def store_tuning(tried: Iterable[Tried], device: str) -> Path:
    """Add the choices to the user's file, which is returned. Raises BackendError where it cannot be written."""
    path = tuning_path()
    choices = Tuning({each.shape: each.choice for each in tried})
    write_tuning(path, tuned_device(import_torch_npu(), torch.device(device)), choices)
    return path


@dataclass(frozen=True)
class _MoeLayer:
    gate_up: QuantizedExperts
    down: QuantizedExperts
    k: int


def _moe_layer(directory: Path, ops: Ops) -> _MoeLayer:
    with Checkpoint.open(directory) as checkpoint:
        config = read_model_config(checkpoint)
        layers = [layer for layer in range(config.num_hidden_layers) if config.moe_at(layer) is not None]
        if not layers:
            raise BackendError(f"{directory}: the model has no experts to tune for")
        store = open_store(checkpoint, ops.dtype)
        moe = load_layer(store, config, ops, attention_of(config, 1.0), layers[0]).moe
    assert moe is not None
    if not isinstance(moe.gate_up, QuantizedExperts) or not isinstance(moe.down, QuantizedExperts):
        raise BackendError(f"{directory}: the model's experts are not quantized; there is nothing to tune for")
    return _MoeLayer(moe.gate_up, moe.down, moe.gating.k)


def _tried(ops: Ops, products: AscendProducts, weights: QuantizedExperts, shape: MatmulShape) -> Tried:
    generator = torch.Generator().manual_seed(shape.rows)
    codes = torch.randint(-127, 128, (shape.rows, shape.inputs), dtype=torch.int8, generator=generator)
    chosen = torch.randint(shape.experts, (shape.rows,), generator=generator)
    groups = torch.bincount(chosen, minlength=shape.experts).to(ops.device)
    rows = Quantized(codes.to(ops.device), torch.full((shape.rows,), 0.01).to(ops.device))
    seconds = {}
    for expectation in shape.candidates:
        products.tuning = Tuning({shape: expectation})
        seconds[expectation] = seconds_of(
            lambda: products.grouped_matmul(rows, weights, groups), ops.device, MEASURED_SECONDS, MOST_CALLS
        )
    return Tried(shape, seconds)
