"""The attention of one layer: calibrated linear by linear, each on what the ones before it really give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...formats.schemes import Scheme
from ...models.family import Block
from ...models.mla import Mla
from ...quant.smoothing import power_of_two
from .context import BATCH_TOKENS, Layer, Rotary
from .kv_cache import LatentScale, search_scale
from .linears import Deployed, Inputs
from .smooth import choose, norm_quotient, rounded
from .states import StreamPair

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attention:
    """MLA with decompressed keys and values: float weights, or deployed ones, in the same places.

    `q` is None where q_a and q_b are there; q_a, q_norm and q_b are None otherwise.
    """

    norm: Tensor
    q: Linear | None
    q_a: Linear | None
    q_norm: Tensor | None
    q_b: Linear | None
    kv_a: Linear
    kv_norm: Tensor
    kv_b: Tensor  # float32 [N · (nope + v), L]
    o: Linear


class AttentionBlock:
    """Computes attention on batches of whole windows."""

    def __init__(self, layer: Layer, rotary: Rotary):
        self._layer = layer
        self._config = layer.walk.config
        self._ops = layer.walk.ops
        self._rotary = rotary

    def normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return self._ops.norms.rms_norm(x, gain, self._config.rms_norm_eps)

    def queries(self, weights: Attention, hidden: Tensor) -> Tensor:
        """hidden [T, H], normed → [T, N · (nope + rope)]."""
        if weights.q is not None:
            return weights.q(hidden)
        assert weights.q_b is not None
        return weights.q_b(self.q_latent(weights, hidden))

    def q_latent(self, weights: Attention, hidden: Tensor) -> Tensor:
        """What q_b is given: [T, q_lora]."""
        assert weights.q_a is not None and weights.q_norm is not None
        return self.normed(weights.q_a(hidden), weights.q_norm)

    def kv_latent(self, weights: Attention, x: Tensor) -> Tensor:
        """What the KV cache holds for the residual stream x [T, H], beside the rope channels: [T, L]."""
        latent = weights.kv_a(self.normed(x, weights.norm))[:, : self._config.attention.kv_lora_rank]
        return self.normed(latent, weights.kv_norm)

    def attended(self, weights: Attention, x: Tensor) -> Tensor:
        """What o is given, of the residual stream x [T, H]: [T, N · v]."""
        config, ops = self._config, self._ops
        hidden = self.normed(x, weights.norm)
        heads, nope, rope = config.attention.heads, config.attention.qk_nope_head_dim, config.attention.qk_rope_head_dim
        q_nope, q_rope = self.queries(weights, hidden).view(-1, heads, nope + rope).split([nope, rope], dim=-1)
        latent, k_rope = weights.kv_a(hidden).split([config.attention.kv_lora_rank, rope], dim=-1)
        k_nope, value = (
            (self.normed(latent, weights.kv_norm) @ weights.kv_b.T)
            .view(-1, heads, nope + config.attention.v_head_dim)
            .split([nope, config.attention.v_head_dim], dim=-1)
        )
        length = self._layer.walk.sequence_length
        windows = x.shape[0] // length
        cos, sin = self._rotary.cos.repeat(windows, 1), self._rotary.sin.repeat(windows, 1)
        ends = [length * (window + 1) for window in range(windows)]
        out, _ = ops.attention.fused_infer_attention(
            q_nope,
            ops.attention.interleave_rope(q_rope, cos, sin),
            k_nope,
            ops.attention.interleave_rope(k_rope[:, None], cos, sin)[:, 0],
            value,
            ends,
            ends,
            self._rotary.softmax_scale,
            causal=True,
        )
        return out.reshape(x.shape[0], -1)

    def output(self, weights: Attention, x: Tensor) -> Tensor:
        """The block's output, to be added to x [T, H]."""
        return weights.o(self.attended(weights, x))


def window_bytes(mla: Mla, sequence_length: int) -> int:
    """One batch of windows in attention, in float32: queries three times, keys and values, outputs; the scores of one
    window as four steps of its softmax hold them."""
    tokens = max(BATCH_TOKENS, sequence_length)
    token = 4 * mla.qk_head_dim + mla.qk_nope_head_dim + 4 * mla.v_head_dim
    return 4 * mla.heads * (tokens * token + 4 * sequence_length**2)


def run_attention(
    layer: Layer, rotary: Rotary, streams: StreamPair, out: StreamPair
) -> tuple[dict[str, float], LatentScale]:
    """Quantize a layer's attention and write both streams after it into `out`.

    Returns smoothing strengths, if any, and the scales for an int8 KV cache.
    """
    walk = layer.walk
    block = AttentionBlock(layer, rotary)
    parts = ["input_norm", *(entry.part for entry in layer.tensors.family.blocks[Block.ATTENTION])]
    tensors = {part: layer.weight(*_place(part)) for part in parts if layer.has(*_place(part))}
    strengths = _smooth(layer, block, tensors, streams) if walk.smooth else {}
    floats = _floats(tensors)
    deployed = _quantize(layer, block, tensors, floats, streams)

    def step(batch: slice) -> None:
        for stream, result, weights in (
            (streams.floats, out.floats, floats),
            (streams.quantized, out.quantized, deployed),
        ):
            result[batch] = stream[batch] + block.output(weights, stream[batch])

    for _ in walk.pool.map(step, walk.batches):
        pass
    scale = search_scale(lambda batch: block.kv_latent(deployed, streams.quantized[batch]), walk.batches, walk.pool)
    return strengths, scale


def _place(part: str) -> tuple[Block, str]:
    """Where a part stands in the family's table: the norm before attention is the layer's."""
    return Block.LAYER if part == "input_norm" else Block.ATTENTION, part


def _floats(tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme] | None = None) -> Attention:
    """The block of some weights; the inputs of those that have a scheme are rounded as it asks."""

    def linear(part: str) -> Linear | None:
        weight = tensors.get(part)
        return None if weight is None else Deployed(weight, (schemes or {}).get(part, Scheme.FLOAT))

    kv_a, o = linear("kv_a"), linear("o")
    assert kv_a is not None and o is not None
    return Attention(
        norm=tensors["input_norm"],
        q=linear("q"),
        q_a=linear("q_a"),
        q_norm=tensors.get("q_a_norm"),
        q_b=linear("q_b"),
        kv_a=kv_a,
        kv_norm=tensors["kv_a_norm"],
        kv_b=tensors["kv_b"],
        o=o,
    )


def _quantize(
    layer: Layer, block: AttentionBlock, tensors: dict[str, Tensor], floats: Attention, streams: StreamPair
) -> Attention:
    batches, stream = layer.walk.batches, streams.quantized

    def kept(part: str) -> Tensor:
        return layer.keep(*_place(part), tensors[part])

    def quantized(parts: tuple[str, ...], inputs: Inputs) -> list[Deployed]:
        return layer.quantize([layer.job(*_place(part)) for part in parts], [tensors[part] for part in parts], inputs)

    norm = kept("input_norm")
    q, kv_a = quantized(
        _readers(tensors, layer, "attention_input"), lambda index: block.normed(stream[batches[index]], norm)
    )
    found = replace(floats, norm=norm, kv_a=kv_a, kv_norm=kept("kv_a_norm"), kv_b=kept("kv_b"))
    if floats.q is not None:
        found = replace(found, q=q)
    else:
        found = replace(found, q_a=q, q_norm=kept("q_a_norm"))
        (q_b,) = quantized(("q_b",), lambda index: block.q_latent(found, block.normed(stream[batches[index]], norm)))
        found = replace(found, q_b=q_b)
    (o,) = quantized(("o",), lambda index: block.attended(found, stream[batches[index]]))
    return replace(found, o=o)


def _readers(tensors: Mapping[str, Tensor], layer: Layer, activation: str) -> tuple[str, ...]:
    """The linears of this layer that read an activation."""
    entries = layer.tensors.family.readers(activation, Block.ATTENTION)
    return tuple(entry.part for entry in entries if entry.part in tensors)


def _smooth(layer: Layer, block: AttentionBlock, tensors: dict[str, Tensor], streams: StreamPair) -> dict[str, float]:
    """Rescale the channels between norm and q_a|kv_a, q_a's norm and q_b, values and o; `tensors` in place.

    Strengths are those of least error at the block's output on the first batch, each step after the one before.
    """
    x = streams.floats[layer.walk.batches[0]]
    truth = block.output(_floats(tensors), x)
    strengths = {}

    def error(changed: dict[str, Tensor], rounded_parts: tuple[str, ...]) -> float:
        trial = tensors | changed
        jobs = {part: layer.job(*_place(part)) for part in rounded_parts}
        trial |= {part: rounded(job, trial[part]) for part, job in jobs.items()}
        schemes = {part: job.scheme for part, job in jobs.items()}
        return float((block.output(_floats(trial, schemes), x) - truth).double().square().sum())

    def activations(step: Callable[[Attention, Tensor], Tensor]) -> Tensor:
        weights, largest = _floats(tensors), None
        for found in layer.walk.pool.map(
            lambda batch: step(weights, streams.floats[batch]).abs().amax(0), layer.walk.batches
        ):
            largest = found if largest is None else torch.maximum(largest, found)
        assert largest is not None
        return largest

    def between(norm: str, activation: str, step: Callable[[Attention, Tensor], Tensor]) -> None:
        """Smooth between a norm and the linears that read what it writes."""
        readers = _readers(tensors, layer, activation)
        strengths[layer.spec(*_place(norm)).module] = choose(
            activations(step),
            tensors,
            readers,
            lambda scale: _norm_change(layer, tensors, norm, readers, scale),
            error,
        )

    between("input_norm", "attention_input", lambda weights, part: block.normed(part, weights.norm))
    if "q_b" in tensors:
        between(
            "q_a_norm",
            "q_latent_normed",
            lambda weights, part: block.q_latent(weights, block.normed(part, weights.norm)),
        )
    strengths[layer.spec(Block.ATTENTION, "o").module] = choose(
        activations(block.attended),
        tensors,
        ("o",),
        lambda scale: _value_change(layer, tensors, power_of_two(scale)),
        error,
    )
    return strengths


def _norm_change(
    layer: Layer, tensors: dict[str, Tensor], norm: str, readers: tuple[str, ...], scale: Tensor
) -> dict[str, Tensor]:
    """A norm's gain divided by `scale`, its readers multiplied to match."""
    smaller, factor = norm_quotient(layer.walk.linears, layer.job(*_place(norm)), tensors[norm], scale)
    return {norm: smaller, **{name: tensors[name] * factor for name in readers}}


def _value_change(layer: Layer, tensors: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """Value channels divided by `scale` [N · v] in kv_b, o's columns multiplied by it."""
    mla = layer.walk.config.attention
    by_head = tensors["kv_b"].double().view(mla.heads, -1, mla.kv_lora_rank).clone()
    by_head[:, mla.qk_nope_head_dim :] /= scale.view(mla.heads, mla.v_head_dim, 1)
    return {
        "kv_b": by_head.view(-1, mla.kv_lora_rank).float(),
        "o": (tensors["o"].double() * scale).float(),
    }
