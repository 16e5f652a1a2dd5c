"""The attention of one layer: calibrated linear by linear, each on what the ones before it really give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...formats.schemes import Scheme
from ...quant.smoothing import power_of_two
from .context import Layer, Rotary
from .kv_cache import LatentScale, search_scale
from .linears import Deployed
from .smooth import choose, fake_quantize, norm_quotient
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
        """What o_proj is given, of the residual stream x [T, H]: [T, N · v]."""
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


def run_attention(
    layer: Layer, rotary: Rotary, streams: StreamPair, out: StreamPair
) -> tuple[dict[str, float], LatentScale]:
    """Quantize a layer's attention and write both streams after it into `out`.

    Returns smoothing strengths, if any, and the scales for an int8 KV cache.
    """
    walk = layer.walk
    block = AttentionBlock(layer, rotary)
    tensors = {name: layer.weight(name) for name in _NAMES if layer.has(name)}
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


_NAMES = (
    "input_layernorm",
    *(
        f"self_attn.{name}"
        for name in (
            "q_proj",
            "q_a_proj",
            "q_a_layernorm",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_a_layernorm",
            "kv_b_proj",
            "o_proj",
        )
    ),
)


def _floats(tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme] | None = None) -> Attention:
    """The block of some weights; the inputs of those that have a scheme are rounded as it asks."""

    def linear(name: str) -> Linear | None:
        weight = tensors.get(f"self_attn.{name}")
        return None if weight is None else Deployed(weight, (schemes or {}).get(f"self_attn.{name}", Scheme.FLOAT))

    kv_a, o = linear("kv_a_proj_with_mqa"), linear("o_proj")
    assert kv_a is not None and o is not None
    return Attention(
        norm=tensors["input_layernorm"],
        q=linear("q_proj"),
        q_a=linear("q_a_proj"),
        q_norm=tensors.get("self_attn.q_a_layernorm"),
        q_b=linear("q_b_proj"),
        kv_a=kv_a,
        kv_norm=tensors["self_attn.kv_a_layernorm"],
        kv_b=tensors["self_attn.kv_b_proj"],
        o=o,
    )


def _quantize(
    layer: Layer, block: AttentionBlock, tensors: dict[str, Tensor], floats: Attention, streams: StreamPair
) -> Attention:
    batches, stream = layer.walk.batches, streams.quantized

    def kept(name: str) -> Tensor:
        return layer.keep(name, tensors[name])

    norm = kept("input_layernorm")
    first = "self_attn.q_proj" if floats.q is not None else "self_attn.q_a_proj"
    shared = {name: tensors[name] for name in (first, "self_attn.kv_a_proj_with_mqa")}
    q, kv_a = layer.quantize(shared, lambda index: block.normed(stream[batches[index]], norm))
    found = replace(
        floats, norm=norm, kv_a=kv_a, kv_norm=kept("self_attn.kv_a_layernorm"), kv_b=kept("self_attn.kv_b_proj")
    )
    if floats.q is not None:
        found = replace(found, q=q)
    else:
        found = replace(found, q_a=q, q_norm=kept("self_attn.q_a_layernorm"))
        (q_b,) = layer.quantize(
            {"self_attn.q_b_proj": tensors["self_attn.q_b_proj"]},
            lambda index: block.q_latent(found, block.normed(stream[batches[index]], norm)),
        )
        found = replace(found, q_b=q_b)
    (o,) = layer.quantize(
        {"self_attn.o_proj": tensors["self_attn.o_proj"]}, lambda index: block.attended(found, stream[batches[index]])
    )
    return replace(found, o=o)


def _smooth(layer: Layer, block: AttentionBlock, tensors: dict[str, Tensor], streams: StreamPair) -> dict[str, float]:
    """Rescale the channels between norm and q_a|kv_a, q_a's norm and q_b, values and o_proj; `tensors` in place.

    Strengths are those of least error at the block's output on the first batch, each step after the one before.
    """
    x = streams.floats[layer.walk.batches[0]]
    truth = block.output(_floats(tensors), x)
    strengths = {}

    def error(changed: dict[str, Tensor], rounded: tuple[str, ...]) -> float:
        trial = tensors | changed
        trial |= {name: fake_quantize(layer, name, trial[name]) for name in rounded}
        schemes = {name: layer.walk.jobs[f"{layer.prefix}{name}.weight"].scheme for name in rounded}
        return float((block.output(_floats(trial, schemes), x) - truth).double().square().sum())

    def activations(step: Callable[[Attention, Tensor], Tensor]) -> Tensor:
        weights, largest = _floats(tensors), None
        for found in layer.walk.pool.map(
            lambda batch: step(weights, streams.floats[batch]).abs().amax(0), layer.walk.batches
        ):
            largest = found if largest is None else torch.maximum(largest, found)
        assert largest is not None
        return largest

    readers = tuple(
        name for name in ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa") if name in tensors
    )
    strengths["input_layernorm"] = choose(
        activations(lambda weights, part: block.normed(part, weights.norm)),
        tensors,
        readers,
        lambda scale: _norm_change(layer, tensors, "input_layernorm", readers, scale),
        error,
    )
    if "self_attn.q_b_proj" in tensors:
        names = ("self_attn.q_b_proj",)
        strengths["q_a_layernorm"] = choose(
            activations(lambda weights, part: block.q_latent(weights, block.normed(part, weights.norm))),
            tensors,
            names,
            lambda scale: _norm_change(layer, tensors, "self_attn.q_a_layernorm", names, scale),
            error,
        )
    strengths["o_proj"] = choose(
        activations(block.attended),
        tensors,
        ("self_attn.o_proj",),
        lambda scale: _value_change(layer, tensors, power_of_two(scale)),
        error,
    )
    return strengths


def _norm_change(
    layer: Layer, tensors: dict[str, Tensor], norm: str, readers: tuple[str, ...], scale: Tensor
) -> dict[str, Tensor]:
    """A norm's gain divided by `scale`, its readers multiplied to match."""
    smaller, factor = norm_quotient(layer, norm, tensors[norm], scale)
    return {norm: smaller, **{name: tensors[name] * factor for name in readers}}


def _value_change(layer: Layer, tensors: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """Value channels divided by `scale` [N · v] in kv_b, o_proj's columns multiplied by it."""
    mla = layer.walk.config.attention
    by_head = tensors["self_attn.kv_b_proj"].double().view(mla.heads, -1, mla.kv_lora_rank).clone()
    by_head[:, mla.qk_nope_head_dim :] /= scale.view(mla.heads, mla.v_head_dim, 1)
    return {
        "self_attn.kv_b_proj": by_head.view(-1, mla.kv_lora_rank).float(),
        "self_attn.o_proj": (tensors["self_attn.o_proj"].double() * scale).float(),
    }
