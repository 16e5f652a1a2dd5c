"""The memory budget of a walk: a layer's attention, its dense or shared block, and for each worker some samples in
attention, then one expert with its Hessian."""

from __future__ import annotations

from dataclasses import replace

from ...errors import ConversionError
from ...models.config import ModelConfig
from ...models.family import Block
from ...models.tensors import ModelTensors
from ..plan.memory import Budget
from .context import BATCH_TOKENS

# Square matrices of float32 held at the peak of factoring a Hessian: itself, damped, and its factor, which takes two of
# float64 where float32 rounds too much.
_SQUARES = 6
# Copies of a linear's rows in float32 that GPTQ and its refinement hold, for as many rows as one call takes.
_COPIES, _ROWS = 8, 512


def calibrated_budget(
    config: ModelConfig, tokens: int, sequence_length: int, budget: Budget, max_memory: int | None
) -> Budget:
    """The budget with as many workers as `max_memory` bytes have room for experts, or samples in attention. The hidden
    states are pages of a file and do not count. Raises ConversionError where there is no room for one worker."""
    shared = max(attention_bytes(config), dense_bytes(config))
    expert = max(expert_bytes(config, tokens), sample_bytes(config, sequence_length))
    workers = budget.workers
    if max_memory is not None:
        if max_memory < max(shared, expert):
            raise ConversionError(
                f"--max-memory {max_memory} is too small: calibrating a layer of this model needs about "
                f"{max(shared, expert)} bytes; give at least that"
            )
        workers = min(workers, max_memory // expert)
    return replace(budget, workers=workers, nbytes=max(budget.nbytes, shared, workers * expert))


def expert_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of one routed expert, 0 in a model without: its weights in float32 before and after, its Hessian, and its
    share of the tokens."""
    if config.moe is None:
        return 0
    return _block_bytes(config, Block.EXPERT) + 6 * 4 * config.moe.tokens_of_expert(tokens) * config.hidden_size


def sample_bytes(config: ModelConfig, sequence_length: int) -> int:
    """Bytes of one batch of whole samples in attention, in float32."""
    return 4 * config.attention.numbers_held(max(BATCH_TOKENS, sequence_length), sequence_length)


def attention_bytes(config: ModelConfig) -> int:
    """Bytes of a layer's attention in float32, before and after, and of the largest Hessian of its linears."""
    return _block_bytes(config, Block.ATTENTION)


def dense_bytes(config: ModelConfig) -> int:
    """Bytes of a layer's dense block, or of its shared experts, in float32 twice, and of the largest Hessian."""
    return max(_block_bytes(config, Block.DENSE), _block_bytes(config, Block.SHARED))


def _block_bytes(config: ModelConfig, block: Block) -> int:
    """Bytes of a block's linears in float32 twice, and of calibrating the largest of them; 0 where no decoder layer has
    the block."""
    tensors = ModelTensors(config)
    shapes = {
        entry.part: tensors.spec(block, entry.part).shape
        for layer in range(config.num_hidden_layers)
        for entry in tensors.family.entries(block)
        if entry.kind == "linear" and tensors.has(block, entry.part, layer)
    }.values()
    weights = 2 * 4 * sum(outputs * inputs for outputs, inputs in shapes)
    return weights + max((_calibration_bytes(inputs, outputs) for outputs, inputs in shapes), default=0)


def _calibration_bytes(inputs: int, outputs: int) -> int:
    return 4 * _SQUARES * inputs**2 + 4 * _COPIES * min(outputs, _ROWS) * inputs
