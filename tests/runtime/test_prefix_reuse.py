"""Prefix reuse on a model: the contract of docs/generation.md, that reuse changes logits by rounding alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import npuq.runtime
from npuq.errors import GenerationError
from npuq.runtime import Completion, EngineConfig, LanguageModel
from npuq.runtime.engine import Engine
from npuq.runtime.ops.latent_attention import LatentAttention
from npuq.runtime.ops.native.latent_attention import NativeLatentAttention
from npuq.runtime.sampling.rows import HostRow, LogitRow
from npuq.runtime.sampling.sampler import Sampled, Sampler
from npuq.runtime.step import Chunk

sys.path.insert(0, str(Path(__file__).parent.parent / "convert" / "sparse"))
from sparse_models import make_sparse

SIZES: dict[str, Any] = {"kv_cache_bytes": 16 << 20, "block_size": 16, "max_num_seqs": 4}
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0, "ignore_eos": True}
CLOSE_LOGITS = 1e-3
"""Greedy texts may differ where the two best logits are nearer than this."""


@pytest.fixture(scope="module")
def prompts(example: LanguageModel) -> list[list[int]]:
    """20 prompts of 20 to 115 tokens, some of which begin alike."""
    texts = [
        "The President of the United States reported to the Congress that the revenue of the year was greater than ",
        "And God said, Let there be light: and there was light. And God saw the light, that it was good: and ",
        "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, ",
        "In the beginning was the Word, and the Word was with God, and the Word was God. The same was in the ",
    ]
    ends = ["whale", "sea and the ship", "of the nations", "a man", "one hundred and seventy years ago, when it was"]
    return [example.tokenizer.encode(text * (1 + n % 3) + end) for n, end in enumerate(ends) for text in texts]


@pytest.fixture
def model(example_fp8: Path) -> LanguageModel:
    return npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(**SIZES))


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Logits that tokens are chosen from, as they come."""
    seen: list[np.ndarray] = []
    choose = Sampler.next_token

    def spy(sampler: Sampler, row: LogitRow, context: Sequence[int]) -> Sampled:
        seen.append(row.whole().copy())
        return choose(sampler, row, context)

    monkeypatch.setattr(Sampler, "next_token", spy)
    return seen


def assert_same(found: Completion, expected: Completion, found_rows: list[np.ndarray]) -> None:
    """Equal tokens; or the first that differs had another nearly as likely."""
    for place, (ours, theirs) in enumerate(zip(found.token_ids, expected.token_ids, strict=True)):
        if ours != theirs:
            best, second = np.sort(found_rows[place])[-1:-3:-1]
            assert best - second < CLOSE_LOGITS
            return


def test_logits_after_a_hit(example_fp8: Path, prompts: list[list[int]], rows: list[np.ndarray]) -> None:
    """Of every token of 20 prompts' texts, cold and warm: within 1e-4 of the largest; and equal texts."""
    warm = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(**SIZES))
    cold = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(**SIZES, prefix_cache=False))
    found_some = 0
    for prompt in prompts:
        expected = cold.generate(prompt, **{**GREEDY, "max_new_tokens": 6})
        expected_rows = rows[:]
        rows.clear()
        assert expected.cached_tokens == 0
        warm.generate(prompt, max_new_tokens=1)
        rows.clear()
        found = warm.generate(prompt, **{**GREEDY, "max_new_tokens": 6})
        assert found.cached_tokens == (len(prompt) - 1) // 16 * 16
        found_some += found.cached_tokens > 0
        assert_same(found, expected, rows)
        for ours, theirs in zip(rows, expected_rows, strict=True):
            assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
        rows.clear()
    assert found_some >= 15


def test_logits_of_all_tokens_behind_a_found_prefix(model: LanguageModel, prompts: list[list[int]]) -> None:
    for prompt in prompts[:8]:
        (golden,) = model.logits([prompt])
        model.generate(prompt, max_new_tokens=1)
        engine = model.engine
        blocks, _ = engine.blocks.match([*prompt, 0])
        start = len(blocks) * 16
        assert start > 0
        own = engine.blocks.allocate(engine.blocks.blocks_for(len(prompt)) - len(blocks)) or []
        if start < len(prompt):
            logits, _ = engine._run([Chunk(prompt[start:], start, [*blocks, *own], all_rows=True)])
            assert (logits - golden[start:]).abs().max() < 1e-4 * golden.abs().max()
        engine.blocks.release([*blocks, *own])
    assert model.engine.blocks.num_free == model.engine.blocks.num_blocks


def poison(monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
    """Fill blocks with NaN as they are given out: whatever is read was written since."""
    allocate = engine.blocks.allocate

    def poisoned(count: int) -> list[int] | None:
        blocks = allocate(count)
        for layer in engine._cache:
            for pages in layer.pages.values():
                pages.tensor[blocks or []] = torch.nan
        return blocks

    monkeypatch.setattr(engine.blocks, "allocate", poisoned)


@pytest.mark.parametrize(
    ("sizes", "absorbed"),
    [
        ({}, True),
        ({}, False),
        ({"max_num_batched_tokens": 12, "max_num_seqs": 2}, True),
        ({"kv_cache_bytes": 9 * 16 * 576 * 4 * 4}, True),
    ],
    ids=["together", "decompressed", "in chunks", "preempted"],
)
def test_texts_are_as_alone(
    example: LanguageModel,
    example_fp8: Path,
    prompts: list[list[int]],
    sizes: dict[str, int],
    absorbed: bool,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[np.ndarray],
) -> None:
    """Three times the same prompts, later with what is left of earlier ones. Blocks hold NaN until they are written."""
    for attention in (LatentAttention, NativeLatentAttention):
        monkeypatch.setattr(attention, "absorbs_chunks", absorbed)
    chosen = prompts[:5]
    alone: list[tuple[Completion, list[np.ndarray]]] = []
    for prompt in chosen:
        rows.clear()
        done = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(prefix_cache=False)).generate(prompt, **GREEDY)
        alone.append((done, rows[:]))
    model = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(**{**SIZES, **sizes}))
    poison(monkeypatch, model.engine)
    reused = 0
    for _ in range(3):
        for found, (expected, expected_rows) in zip(model.generate(chosen, **GREEDY), alone, strict=True):
            assert_same(found, expected, expected_rows)
            reused += found.cached_tokens
    assert reused > 0
    assert (model.engine.scheduler.num_preempted > 0) == ("kv_cache_bytes" in sizes)
    assert model.engine.blocks.num_free == model.engine.blocks.num_blocks


def test_a_second_turn_starts_from_the_cache(model: LanguageModel, prompts: list[list[int]]) -> None:
    first = model.generate(prompts[2], **GREEDY)
    second = [*prompts[2], *first.token_ids, *model.tokenizer.encode(" And then")]
    found = model.generate(second, **GREEDY)
    assert found.cached_tokens == (len(prompts[2]) + 19) // 16 * 16  # its last token was never computed
    fresh = npuq.runtime.load(model.directory, "cpu", engine=EngineConfig(prefix_cache=False)).generate(
        second, **GREEDY
    )
    assert found.token_ids == fresh.token_ids


def test_choices_share_the_prompt(model: LanguageModel, prompts: list[list[int]]) -> None:
    prompt = prompts[4]
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    done = model.generate([prompt], n=3, **options)
    assert [each.cached_tokens for each in done] == [0, *[(len(prompt) - 1) // 16 * 16] * 2]
    expected = npuq.runtime.load(model.directory, "cpu", engine=EngineConfig(prefix_cache=False)).generate(
        [prompt], n=3, **options
    )
    assert [each.token_ids for each in done] == [each.token_ids for each in expected]
    assert [each.cached_tokens for each in expected] == [0, 0, 0]


def test_seeded_text_with_a_hit(model: LanguageModel, prompts: list[list[int]]) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 3, "top_p": 0.9}
    first, second = (model.generate(prompts[0], **options) for _ in range(2))
    assert (first.cached_tokens, second.cached_tokens > 0) == (0, True)
    assert first.token_ids == second.token_ids


def test_logits_leave_and_find_nothing(model: LanguageModel, prompts: list[list[int]]) -> None:
    (before,) = model.logits([prompts[0]])
    assert model.engine.blocks.num_known == 0
    assert model.generate(prompts[0], max_new_tokens=1).cached_tokens == 0
    (after,) = model.logits([prompts[0]])
    assert torch.equal(before, after)


def test_requests_of_other_salts_see_nothing(model: LanguageModel, prompts: list[list[int]]) -> None:
    def cached(salt: bytes) -> int:
        with model.stream(prompts[0], max_new_tokens=1, salt=salt) as stream:
            (done,) = [piece.completion for piece in stream if piece.completion is not None]
        return done.cached_tokens

    assert [cached(b""), cached(b"one"), cached(b"two")] == [0, 0, 0]
    assert min(cached(b""), cached(b"one"), cached(b"two")) > 0


def test_a_cancelled_prompt_leaves_what_was_written(example_fp8: Path, prompts: list[list[int]]) -> None:
    model = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(**SIZES, max_num_batched_tokens=33))
    prompt = [*prompts[8], *prompts[8]]
    with model.stream(prompt, **GREEDY):
        model.engine.step()
        model.engine.step()
    assert model.engine.blocks.num_known == 66 // 16
    assert model.generate(prompt, max_new_tokens=1).cached_tokens == 64


def test_logits_that_are_not_finite_leave_nothing(
    model: LanguageModel, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = Sampler.next_token

    def damaged(sampler: Sampler, row: LogitRow, context: Sequence[int]) -> Sampled:
        return choose(sampler, HostRow(np.full(row.size, np.nan, np.float32)), context)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "next_token", damaged)
        with pytest.raises(GenerationError, match="not finite"):
            model.generate(prompts[0], max_new_tokens=2)
    assert model.engine.blocks.num_known == 0


def test_an_int8_cache(int8_artifact: Path, prompts: list[list[int]], rows: list[np.ndarray]) -> None:
    """Prompts attend to rounded latents with and without a hit; only generated tokens round their queries.

    Most logits are within 1e-6. A last digit can turn a code of a quantized activation, which shows more.
    """
    differences = []
    for prompt in (*prompts[:4], prompts[4][:33]):
        model = npuq.runtime.load(int8_artifact, "cpu", engine=EngineConfig(**SIZES), kv_cache_dtype="int8")
        rows.clear()
        first, second = (model.generate(prompt, max_new_tokens=1, temperature=0) for _ in range(2))
        assert (first.cached_tokens, second.cached_tokens) == (0, (len(prompt) - 2) // 16 * 16)
        differences.append(np.abs(rows[1] - rows[0]).max() / np.abs(rows[0]).max())
    assert max(differences) < 5e-3
    assert np.median(differences) < 1e-5


def test_sparse_attention_finds_its_index_keys(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens selected among found ones: their index keys lie in the same blocks."""
    sparse = make_sparse(tmp_path_factory.mktemp("sparse") / "source", "glm")
    prompt = torch.randint(2, 100, (75,), generator=torch.Generator().manual_seed(3)).tolist()
    for backend in ("reference", "cpu"):
        model = npuq.runtime.load(sparse.directory, backend, engine=EngineConfig(block_size=16))
        poison(monkeypatch, model.engine)
        sequences = []
        for _ in range(2):
            sequence = model.engine.add(prompt, npuq.SamplingParams(max_new_tokens=8, ignore_eos=True))
            while sequence.finish_reason is None:
                model.engine.step()
            sequences.append(sequence)
        assert [sequence.num_reused for sequence in sequences] == [0, 64]
        assert sequences[0].tokens == sequences[1].tokens
        golden: Tensor = sparse.golden(torch.tensor([sequences[0].tokens])).logits[0]
        assert golden[74:-1].argmax(-1).tolist() == sequences[1].tokens[75:]
