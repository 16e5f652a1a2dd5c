"""How much a walk holds in memory at once: a layer's attention, its dense or shared block, and for each worker some
windows in attention, then one expert with its Hessian."""

from __future__ import annotations

from dataclasses import replace

from ...errors import ConversionError
from ...models.config import ModelConfig
from ..plan.memory import Budget
from .context import BATCH_TOKENS

# Square matrices of float64 that factoring a Hessian holds at its peak: itself, damped, permuted, and a factor.
_SQUARES = 4
# Copies of a linear's rows in float64 that GPTQ and its refinement hold, for as many rows as one call takes.
_COPIES, _ROWS = 6, 512


def calibrated_budget(
    config: ModelConfig, tokens: int, sequence_length: int, budget: Budget, max_memory: int | None
) -> Budget:
    """The budget with as many workers as `max_memory` bytes have room for experts, or windows in attention, beside the
    hidden states' pages, which are a file's and count for nothing. ConversionError where there is room for none."""
    shared = max(attention_bytes(config), dense_bytes(config))
    expert = max(expert_bytes(config, tokens), window_bytes(config, sequence_length))
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
    """One routed expert, 0 in a model without: its weights in float32 before and after, its Hessian, and its share of
    the tokens."""
    if config.moe is None:
        return 0
    hidden, width = config.hidden_size, config.moe.moe_intermediate_size
    routed = config.moe.tokens_of_expert(tokens)
    weights = 2 * 3 * 4 * hidden * width
    return weights + _calibration_bytes(max(hidden, width), width) + 6 * 4 * routed * hidden


def window_bytes(config: ModelConfig, sequence_length: int) -> int:
    """One batch of windows in attention, in float32: queries three times, keys and values, outputs; the scores of one
    window as four steps of its softmax hold them."""
    mla, tokens = config.attention, max(BATCH_TOKENS, sequence_length)
    token = 4 * mla.qk_head_dim + mla.qk_nope_head_dim + 4 * mla.v_head_dim
    return 4 * mla.heads * (tokens * token + 4 * sequence_length**2)


def attention_bytes(config: ModelConfig) -> int:
    """A layer's attention in float32, as it was and as it will be, and the largest Hessian of its linears."""
    hidden, mla = config.hidden_size, config.attention
    heads = mla.heads
    q_width, values = heads * mla.qk_head_dim, heads * mla.v_head_dim
    queries = hidden * q_width
    if mla.q_lora_rank is not None:
        queries = mla.q_lora_rank * (hidden + q_width)
    latent = mla.kv_lora_rank + mla.qk_rope_head_dim
    keys = hidden * latent + mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return 2 * 4 * (queries + keys + values * hidden) + _calibration_bytes(max(hidden, values), hidden)


def dense_bytes(config: ModelConfig) -> int:
    """The first layers' dense block, or the shared experts, in float32 twice, and the Hessian of down_proj."""
    widths = [] if config.moe is None else [config.moe.shared_intermediate_size]
    if any(config.moe_at(layer) is None for layer in range(config.num_hidden_layers)):
        widths.append(config.intermediate_size)
    hidden, width = config.hidden_size, max(widths)
    return 2 * 3 * 4 * hidden * width + _calibration_bytes(max(hidden, width), width)


def _calibration_bytes(inputs: int, outputs: int) -> int:
    return 8 * _SQUARES * inputs**2 + 8 * _COPIES * min(outputs, _ROWS) * inputs
