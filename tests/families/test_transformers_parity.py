"""The float path computes what transformers' DeepseekV2 and DeepseekV3 do: same weights, float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npuq.runtime
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.runtime import EngineConfig, LanguageModel

TOLERANCE = 1e-4
SMALL = EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=24, prefix_segment_tokens=32)


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours.float() - golden).norm() / golden.norm())


def golden_logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
        return logits


def decoded_logits(model: LanguageModel, tokens: list[int], prompt: int) -> Tensor:
    """Logits from the last prompt token on: the prompt in chunks, the rest one token a step, through the cache."""
    from npuq.runtime.step import Chunk

    engine = model.engine
    blocks = engine.blocks.allocate(engine.blocks.blocks_for(len(tokens)))
    assert blocks is not None
    size = engine.config.max_num_batched_tokens
    starts = [*range(0, prompt, size), *range(prompt, len(tokens))]
    rows = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        step, _ = engine._builder.build([Chunk(tokens[start:end], start, blocks)])
        rows.append(engine.model.forward(step, engine._cache))
    engine.blocks.release(blocks)
    return torch.cat(rows)[-(len(tokens) - prompt) - 1 :]


TOKENS = torch.randint(2, 320, (75,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_prefill(family_pair: tuple[Any, Path], backend: str) -> None:
    golden, directory = family_pair
    model = npuq.runtime.load(directory, backend)
    ours = next(model.logits([TOKENS]))
    assert relative_error(ours, golden_logits(golden, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_chunked_prefill_and_decode_across_blocks(family_pair: tuple[Any, Path], backend: str) -> None:
    golden, directory = family_pair
    model = npuq.runtime.load(directory, backend, engine=SMALL)
    expected = golden_logits(golden, TOKENS)
    # 75 tokens in chunks of 24 on blocks of 16, with the prefix decompressed 32 tokens at a time.
    assert relative_error(next(model.logits([TOKENS])), expected) < TOLERANCE
    # 50 of them in chunks, then step by step over the block boundary at 64.
    assert relative_error(decoded_logits(model, TOKENS, 50), expected[49:]) < TOLERANCE


def test_several_sequences_in_one_step(family_pair: tuple[Any, Path]) -> None:
    golden, directory = family_pair
    model = npuq.runtime.load(directory, "cpu")
    sequences = [TOKENS[:7], TOKENS[7:8], TOKENS[8:60]]
    for tokens, ours in zip(sequences, model.logits(sequences), strict=True):
        assert relative_error(ours, golden_logits(golden, tokens)) < TOLERANCE


def test_decode_beside_prefill_in_one_step(family_pair: tuple[Any, Path]) -> None:
    """A step that holds a decode, a first chunk and a continuing chunk, in an order that is not its own."""
    from npuq.runtime.step import Chunk

    golden, directory = family_pair
    engine = npuq.runtime.load(directory, "cpu", engine=SMALL).engine
    first, second, third = TOKENS[:20], TOKENS[20:45], TOKENS[45:]
    blocks = [engine.blocks.allocate(2) for _ in range(3)]
    engine._run([Chunk(second[:17], 0, blocks[1], last_row=False), Chunk(third[:29], 0, blocks[2], last_row=False)])
    logits, order = engine._run(
        [Chunk(first, 0, blocks[0]), Chunk(second[17:], 17, blocks[1]), Chunk(third[29:], 29, blocks[2])]
    )
    # The first chunk comes last; grouped-query attention takes the decode and the continuing chunk as they come.
    assert order in ([2, 1, 0], [1, 2, 0])
    for row, index in zip(logits, order, strict=True):
        expected = golden_logits(golden, [first, second, third][index])[-1]
        assert relative_error(row, expected) < TOLERANCE


def test_trained_checkpoint(example_fp8: Path, tmp_path: Path, eval_text: Path) -> None:
    """The shipped FP8 checkpoint against transformers on the same weights dequantized, YaRN and groups and all."""
    golden = _dequantized(example_fp8)
    model = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(block_size=32, max_num_batched_tokens=100))
    assert model.tokenizer.bos_id == 0
    text = eval_text.read_text(encoding="utf-8")[4000:6000]
    tokens = [0, *model.tokenizer.encode(text, special=False)][:300]
    assert len(tokens) == 300
    expected = golden_logits(golden, tokens)
    assert relative_error(next(model.logits([tokens])), expected) < TOLERANCE
    assert relative_error(decoded_logits(model, tokens, 270), expected[269:]) < TOLERANCE


def _dequantized(directory: Path) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = json.loads((directory / "config.json").read_text())
    config.pop("quantization_config")
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config)).float().eval()
    with Checkpoint.open(directory) as checkpoint:
        source = open_weights(checkpoint)
        state = {name: source.rows_float32(name) for name in source.weights if "layers.4." not in name}
    for layer in range(1, 4):
        experts = f"model.layers.{layer}.mlp.experts"
        parts = [
            {name: state.pop(f"{experts}.{expert}.{name}.weight") for name in ("gate_proj", "up_proj", "down_proj")}
            for expert in range(16)
        ]
        state[f"{experts}.gate_up_proj"] = torch.stack([torch.cat([p["gate_proj"], p["up_proj"]]) for p in parts])
        state[f"{experts}.down_proj"] = torch.stack([p["down_proj"] for p in parts])
    model.load_state_dict(state, strict=True)
    return model
