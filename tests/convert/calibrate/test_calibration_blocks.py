"""Calibration's attention and feed-forward blocks against the runtime's reference, and what its linears record."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from npuq.convert.calibrate.context import Layer
from npuq.convert.calibrate.layers.attention import AttentionBlock, Weights
from npuq.convert.calibrate.layers.operators import CalibrationOps, Deployed, float_mlp
from npuq.formats.schemes import Scheme
from npuq.models.config import ModelConfig
from npuq.quant.arithmetic import TorchArithmetic
from npuq.runtime.attention.kinds import attention_of
from npuq.runtime.ops import LinearPart, MlpWeights
from npuq.runtime.ops.reference import ReferenceOps
from npuq.runtime.step import Chunk, RopeRows, StepBuilder

LENGTH, WINDOWS, EPS = 7, 3, 1e-6
CONFIG = {
    "model_type": "deepseek_v3",
    "hidden_size": 40,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": EPS,
}


def _layer(q_lora_rank: int | None) -> Any:
    config = ModelConfig.from_dict({**CONFIG, "q_lora_rank": q_lora_rank})
    angles = torch.rand(LENGTH, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
    rope = RopeRows(angles.cos(), angles.sin())
    attention = attention_of(config, 0.2)
    return Layer(
        SimpleNamespace(
            config=config,
            ops=CalibrationOps(TorchArithmetic()),
            attention=attention,
            dense=attention,
            selections=None,
            rope=rope,
            sequence_length=LENGTH,
        ),  # type: ignore[arg-type]
        0,
    )


def _tensors(layer: Layer, block: AttentionBlock) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    entries = [block.norm, *block.entries]
    shapes = {entry.part: layer.spec(block.place(entry), entry.part).shape for entry in entries}
    return {part: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for part, shape in shapes.items()}


class _Stored:
    """The same tensors as the runtime's reference takes them."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def linear(self, part: str) -> LinearPart:
        return LinearPart(part, Scheme.FLOAT, self._tensors[part])

    def tensor(self, part: str) -> Tensor:
        return self._tensors[part]


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_the_block_is_the_runtimes(q_lora_rank: int | None) -> None:
    layer = _layer(q_lora_rank)
    block, kind, ops = AttentionBlock(layer), layer.walk.attention, ReferenceOps()
    tensors = _tensors(layer, block)
    x = torch.randn(LENGTH * WINDOWS, 40, generator=torch.Generator().manual_seed(3))
    # The reference on blocks of its own cache, window by window.
    loaded = kind.load(0, _Stored(tensors), ops)
    steps = StepBuilder(ops, layer.walk.rope, 16, 16)
    cache = ops.caches.new(kind.pools(0), WINDOWS, 16)
    expected, latents = [], []
    for window, rows in enumerate(x.split(LENGTH)):
        step, _ = steps.build([Chunk([0] * LENGTH, 0, [window], all_rows=True)])
        hidden, _ = kind.norm(None, rows, tensors["input_norm"], loaded, ops)
        expected.append(kind.attend(hidden, loaded, cache, step, ops).output)
        latents.append(cache["latent"].read(torch.tensor([window]), LENGTH))
    torch.testing.assert_close(block.output(Weights(tensors), x, None), torch.cat(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block.cached(Weights(tensors), x)["latent"], torch.cat(latents), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_linears_record_what_they_are_given(q_lora_rank: int | None) -> None:
    layer = _layer(q_lora_rank)
    block = AttentionBlock(layer)
    tensors = _tensors(layer, block)
    x = torch.randn(LENGTH * WINDOWS, 40, generator=torch.Generator().manual_seed(3))
    weights, norms = Weights(tensors), layer.walk.ops.norms
    normed = norms.rms_norm(x, tensors["input_norm"], EPS)
    expected = {"attention_input": normed}
    if q_lora_rank is not None:
        expected["q_latent_normed"] = norms.rms_norm(normed @ tensors["q_a"].T, tensors["q_a_norm"], EPS)
    assert list(block.stages) == [*expected, "values"]
    for activation, inputs in expected.items():
        assert torch.equal(block.inputs(weights, activation, x, None), inputs)
    values = block.inputs(weights, "values", x, None)
    assert torch.equal(values @ tensors["o"].T, block.output(weights, x, None))


def test_a_pass_ends_at_the_linear_that_records(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(24)
    block = AttentionBlock(layer)
    weights, x = Weights(_tensors(layer, block)), torch.ones(LENGTH, 40)
    ran: list[str] = []
    monkeypatch.setattr(Deployed, "__call__", lambda self, x, arithmetic: ran.append(self.name) or x @ self.weight.T)
    block.inputs(weights, "q_latent_normed", x, None)
    assert ran == ["q_a", "kv_a"]


@pytest.mark.parametrize("rows", [0, 5, 4100])
def test_the_feed_forward_block_is_the_runtimes(rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    gate, up, down = (torch.randn(shape, generator=generator) for shape in ((24, 16), (24, 16), (16, 24)))
    x = torch.randn(rows, 16, generator=generator)
    ops, reference = CalibrationOps(TorchArithmetic()), ReferenceOps()
    handle = MlpWeights(
        reference.weights.float_linear([gate, up]), reference.weights.float_linear([down]), quantized=False
    )
    found = ops.routing.mlp(x, float_mlp([gate, up, down]))
    torch.testing.assert_close(found, reference.routing.mlp(x, handle), rtol=1e-5, atol=1e-4)
