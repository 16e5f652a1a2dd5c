"""Grouped-query attention in the runtime against transformers' Qwen3Moe and Glm4Moe: same weights, float32."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npuq.runtime
from npuq import convert_checkpoint
from npuq.errors import ArtifactError
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.runtime.attention.gqa import GqaAttention
from npuq.runtime.step import Chunk

sys.path.insert(0, str(Path(__file__).parent))

from grouped_models import MODELS, VOCABULARY, make_grouped

TOLERANCE = 1e-4
BACKENDS = ["reference", "cpu"]
TOKENS = torch.randint(2, VOCABULARY, (75,), generator=torch.Generator().manual_seed(3)).tolist()
OTHERS = [TOKENS[40:70], TOKENS[:5], TOKENS[20:29]]
SMALL = EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=24)

Pair = tuple[Any, Path]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """`pairs(name)`: transformers' model and the directory of its checkpoint, made once."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            directory = tmp_path_factory.mktemp("grouped") / "source"
            made[name] = make_grouped(directory, name), directory
        return made[name]

    return get


def golden_logits(golden: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = golden(torch.tensor([tokens])).logits[0]
        return logits


def relative_error(ours: Tensor, golden: Tensor) -> float:
    return float((ours.float() - golden).norm() / golden.norm())


def by_chunks(model: LanguageModel, tokens: list[int], starts: list[int]) -> Tensor:
    """Logits of all tokens, from chunks that begin at `starts`, through the cache."""
    engine = model.engine
    blocks = engine.blocks.allocate(engine.blocks.blocks_for(len(tokens)))
    assert blocks is not None
    rows = [
        engine._run([Chunk(tokens[start:end], start, blocks, all_rows=True)])[0]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]
    engine.blocks.release(blocks)
    return torch.cat(rows)


def greedy(model: LanguageModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """The tokens that follow each prompt, all prompts at once."""
    params = SamplingParams(temperature=0, max_new_tokens=new, ignore_eos=True)
    sequences = [model.engine.add(prompt, params) for prompt in prompts]
    while any(sequence.finish_reason is None for sequence in sequences):
        model.engine.step()
    return [sequence.tokens[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_whole_sequences(pairs: Callable[[str], Pair], name: str, backend: str) -> None:
    golden, directory = pairs(name)
    model = npuq.runtime.load(directory, backend)
    sequences = [TOKENS, *OTHERS]
    for tokens, ours in zip(sequences, model.logits(sequences), strict=True):
        assert relative_error(ours, golden_logits(golden, tokens)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    "starts",
    [[0, 24, 48, 72], [0, 5, 7, 8, 9, 17, 60], [0, 30, *range(31, 75)]],
    ids=["chunks", "uneven chunks", "a prompt, then one by one"],
)
def test_through_the_cache(pairs: Callable[[str], Pair], name: str, backend: str, starts: list[int]) -> None:
    golden, directory = pairs(name)
    model = npuq.runtime.load(directory, backend, engine=SMALL)
    assert relative_error(by_chunks(model, TOKENS, starts), golden_logits(golden, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen3", "glm"])
def test_batches_prefix_cache_and_preemption(pairs: Callable[[str], Pair], name: str, backend: str) -> None:
    golden, directory = pairs(name)
    prompts = [TOKENS[:30], *OTHERS]
    load = npuq.runtime.load
    alone = [greedy(load(directory, backend), [prompt], 20)[0] for prompt in prompts]
    for prompt, tokens in zip(prompts, alone, strict=True):
        rows = golden_logits(golden, prompt + tokens)
        assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    model = load(directory, backend, engine=SMALL)
    assert greedy(model, prompts, 20) == alone
    assert greedy(model, prompts, 20) == alone  # the second time from shared blocks
    assert model.engine.blocks.num_known > 0
    attention, layers = model.engine.model.attention, range(model.engine.model.config.num_hidden_layers)
    stored = [model.engine.model.ops.caches.stored(attention.pools(layer)) for layer in layers]
    block = 16 * sum(pool.row_bytes for pools in stored for pool in pools)
    model = load(directory, backend, engine=replace(SMALL, kv_cache_bytes=8 * block))
    assert greedy(model, prompts, 20) == alone
    assert model.engine.scheduler.num_preempted > 0


def test_a_wrong_rotary_width_shows(pairs: Callable[[str], Pair]) -> None:
    golden, directory = pairs("glm")
    model = npuq.runtime.load(directory, "reference")
    for layer in model.engine.model.weights.layers:
        gqa = layer.attention
        width = gqa.config.rope_dim // 2
        object.__setattr__(gqa, "config", replace(gqa.config, rope_dim=width))
    rope = model.engine._builder._rope
    for name in ("cos", "sin"):
        object.__setattr__(rope, name, getattr(rope, name)[:, :width])
    assert relative_error(next(model.logits([TOKENS])), golden_logits(golden, TOKENS)) > 0.01


def test_keys_and_values_lie_in_nd_pages(pairs: Callable[[str], Pair]) -> None:
    model = npuq.runtime.load(pairs("glm")[1], "reference", engine=SMALL)
    assert isinstance(model.engine.model.attention, GqaAttention)
    by_chunks(model, TOKENS[:20], [0])
    for cache in model.engine._cache:
        assert list(cache.pages) == ["key", "value"]
        for pages in cache.pages.values():
            assert pages.tensor.shape[1:] == (16, 1, 2 * 32)
            assert pages.tensor.flatten(0, 2)[:20].any(-1).all()


def test_an_int8_cache_is_refused(pairs: Callable[[str], Pair]) -> None:
    with pytest.raises(ArtifactError, match="qwen3_moe has no int8 KV cache: its attention"):
        npuq.runtime.load(pairs("qwen3")[1], "reference", kv_cache_dtype="int8")


@pytest.mark.parametrize("name", ["qwen3", "glm"])
def test_quantized_linears(pairs: Callable[[str], Pair], tmp_path: Path, name: str) -> None:
    """W4A8 experts, W8A8 attention: the same integers, until a float that rounds otherwise reaches all later tokens."""
    golden, directory = pairs(name)
    convert_checkpoint(directory, tmp_path / "out", method="minmax")
    reference, native = (npuq.runtime.load(tmp_path / "out", backend, engine=SMALL) for backend in BACKENDS)
    ours = next(reference.logits([TOKENS]))
    for theirs in (next(native.logits([TOKENS])), by_chunks(native, TOKENS, [0, 24, 48, *range(60, 75)])):
        rows = (theirs - ours).norm(dim=-1) / ours.norm(dim=-1)
        assert float(rows[:8].max()) < TOLERANCE
        assert float(rows.max()) < 0.06
    assert relative_error(ours, golden_logits(golden, TOKENS)) < 0.3
