"""Scheduling: what runs together does not change what comes out, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import npuq.runtime
from npuq.errors import GenerationError
from npuq.native.library import levels
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.runtime.block_manager import BlockManager
from npuq.runtime.ops.latent_attention import LatentAttention
from npuq.runtime.ops.native.latent_attention import NativeLatentAttention
from npuq.runtime.sampling.rows import LogitRow
from npuq.runtime.sampling.sampler import Sampled, Sampler

PROMPTS = [
    "Call me Ishmael.",
    "And God said, Let there be light",
    "The President of the United States reported to the Congress that the revenue of the year was greater than "
    "the expenditure, and that the surplus would be applied to the reduction of the public debt, which",
    "The",
    "In the beginning was the Word, and the Word was with",
]


@pytest.fixture(scope="module")
def alone(example: LanguageModel) -> list[str]:
    return [example.generate(prompt, max_new_tokens=24, temperature=0).text for prompt in PROMPTS]


def small(directory: Path, blocks: int, **sizes: int) -> LanguageModel:
    """The example with so many blocks of 16 tokens, of (512 + 64) float32 channels in each of 4 layers."""
    settings = {"block_size": 16, "kv_cache_bytes": blocks * 16 * 576 * 4 * 4, **sizes}
    model = npuq.runtime.load(directory, "cpu", engine=EngineConfig(**settings))
    assert model.engine.blocks.num_blocks == blocks
    return model


def test_together_as_alone(example: LanguageModel, alone: list[str]) -> None:
    assert len(set(alone)) == len(alone)
    assert [done.text for done in example.generate(PROMPTS, max_new_tokens=24, temperature=0)] == alone


@pytest.mark.parametrize("absorbed", [True, False])
def test_few_at_once_in_small_chunks(
    example_fp8: Path, alone: list[str], absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two run, the others wait for their place; prompts come in chunks of at most 12 tokens beside decodes."""
    for attention in (LatentAttention, NativeLatentAttention):
        monkeypatch.setattr(attention, "absorbs_chunks", absorbed)
    model = small(example_fp8, 16, max_num_seqs=2, max_num_batched_tokens=12, prefix_segment_tokens=16)
    assert [done.text for done in model.generate(PROMPTS, max_new_tokens=24, temperature=0)] == alone
    assert model.engine.scheduler.num_preempted == 0
    assert model.engine.blocks.num_free == 16


def test_preempted_sequences_are_recomputed(example_fp8: Path, alone: list[str]) -> None:
    model = small(example_fp8, 6, max_num_seqs=4, max_num_batched_tokens=64)
    assert [done.text for done in model.generate(PROMPTS, max_new_tokens=24, temperature=0)] == alone
    assert model.engine.scheduler.num_preempted > 0
    assert model.engine.blocks.num_free == 6


def test_blocks_are_reused_after_others(example_fp8: Path, alone: list[str]) -> None:
    """Stale tokens of an earlier sequence in a block are never seen."""
    model = small(example_fp8, 8)
    for _ in range(2):
        assert [model.generate(prompt, max_new_tokens=24, temperature=0).text for prompt in PROMPTS] == alone


def test_completion_fields(example: LanguageModel) -> None:
    done = example.generate(PROMPTS[0], max_new_tokens=5, temperature=0)
    assert done.completion_tokens == len(done.token_ids) == 5
    assert done.prompt_tokens == len(example.tokenizer.encode(PROMPTS[0]))
    assert done.finish_reason == "length"
    assert done.text == example.tokenizer.decode(done.token_ids)
    assert done.prefill_seconds > 0
    assert done.decode_seconds > 0


def test_token_ids_are_a_prompt_too(example: LanguageModel) -> None:
    ids = example.tokenizer.encode(PROMPTS[0])
    (done,) = example.generate([ids], max_new_tokens=5, temperature=0)
    assert done == pytest.approx(done)
    assert done.token_ids == example.generate(PROMPTS[0], max_new_tokens=5, temperature=0).token_ids


@pytest.mark.parametrize("as_list", [False, True])
def test_end_of_sequence_from_generation_config(example_fp8: Path, tmp_path: Path, as_list: bool) -> None:
    directory = Path(shutil.copytree(example_fp8, tmp_path / "model"))
    free = npuq.runtime.load(directory, "cpu").generate(PROMPTS[0], max_new_tokens=24, temperature=0)
    end = free.token_ids[7]
    assert end not in free.token_ids[:7]
    config = {"eos_token_id": [1, end] if as_list else end}
    (directory / "generation_config.json").write_text(json.dumps(config))
    model = npuq.runtime.load(directory, "cpu")
    done = model.generate(PROMPTS[0], max_new_tokens=24, temperature=0)
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[:8]
    assert done.text == model.tokenizer.decode(free.token_ids[:7])
    assert model.generate(PROMPTS[0], max_new_tokens=24, temperature=0, ignore_eos=True).token_ids == free.token_ids


def test_closing_a_stream_frees_its_blocks(example: LanguageModel) -> None:
    stream = example.stream(PROMPTS, max_new_tokens=50, temperature=0)
    next(stream)
    assert example.engine.blocks.num_free < example.engine.blocks.num_blocks
    stream.close()  # type: ignore[attr-defined]
    assert example.engine.blocks.num_free == example.engine.blocks.num_blocks
    assert not example.engine.scheduler.has_work


def test_streamed_pieces_make_the_text(example: LanguageModel) -> None:
    pieces: dict[int, list[str]] = {}
    texts = {}
    for piece in example.stream(PROMPTS, max_new_tokens=12, temperature=0):
        pieces.setdefault(piece.index, []).append(piece.text)
        if piece.completion is not None:
            texts[piece.index] = piece.completion.text
    assert len(texts) == len(PROMPTS)
    assert all(len(pieces[index]) > 4 and "".join(pieces[index]) == texts[index] for index in texts)


def test_generation_ends_at_the_context(example_fp8: Path) -> None:
    model = small(example_fp8, 2)
    assert model.context == 32
    prompt = list(range(10, 38))
    (done,) = model.generate([prompt], max_new_tokens=100, temperature=0, ignore_eos=True)
    assert (done.completion_tokens, done.finish_reason) == (4, "length")


@pytest.mark.parametrize("length", [32, 33, 500])
def test_prompt_longer_than_the_context(example_fp8: Path, length: int) -> None:
    model = small(example_fp8, 2)
    with pytest.raises(GenerationError, match=f"prompt has {length} tokens and the context is 32"):
        model.generate([[5] * length])
    assert model.engine.blocks.num_free == 2
    assert not model.engine.scheduler.has_work


def test_one_bad_prompt_leaves_nothing_queued(example: LanguageModel) -> None:
    with pytest.raises(GenerationError, match="empty"):
        example.generate(["fine", ""])
    assert not example.engine.scheduler.has_work


@pytest.mark.parametrize("bad", [-1, 4096])
def test_token_out_of_vocabulary(example: LanguageModel, bad: int) -> None:
    with pytest.raises(GenerationError, match=f"token id {bad} is outside"):
        example.generate([[5, bad]])


@pytest.mark.parametrize(
    "sizes",
    [
        {"block_size": 24},
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"max_num_seqs": 64, "max_num_batched_tokens": 64},
        {"prefix_segment_tokens": 0},
    ],
)
def test_impossible_sizes(sizes: dict[str, int]) -> None:
    with pytest.raises(GenerationError):
        EngineConfig(**sizes)


def test_cache_too_small_for_a_block(example_fp8: Path) -> None:
    with pytest.raises(GenerationError, match="holds no block"):
        npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(kv_cache_bytes=1000))


@pytest.mark.parametrize("change", [{"num_nextn_predict_layers": 0}, {"num_nextn_predict_layers": 1}])
def test_mtp_layers_are_left_alone(example_fp8: Path, tmp_path: Path, change: dict[str, int]) -> None:
    directory = Path(shutil.copytree(example_fp8, tmp_path / "model"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    model = npuq.runtime.load(directory, "cpu")
    assert len(model.engine.model.weights.layers) == 4


def test_block_manager() -> None:
    manager = BlockManager(4, 16)
    assert [manager.blocks_for(tokens) for tokens in (1, 16, 17, 33)] == [1, 1, 2, 3]
    first = manager.allocate(3)
    assert first is not None
    assert manager.allocate(2) is None
    assert manager.num_free == 1
    manager.release(first)
    taken = manager.allocate(4)
    assert taken is not None
    assert sorted(taken) == [0, 1, 2, 3]


def test_bad_sampling_parameters() -> None:
    for bad in (
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"seed": -(2**63) - 1},
        {"seed": 2**63},
        {"stop": ("x", "")},
    ):
        with pytest.raises(GenerationError):
            SamplingParams(**bad)  # type: ignore[arg-type]


def test_unknown_option(example: LanguageModel) -> None:
    with pytest.raises(GenerationError, match="temprature"):
        example.generate("x", temprature=1.0)


@pytest.mark.skipif(not levels(), reason="the native library is not built here (no C compiler)")
def test_sampling_leaves_the_cores_to_the_kernels(example_fp8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch works on one thread between two steps of the kernels, and on all of its own again afterwards."""
    seen: list[int] = []
    sample = Sampler.next_token

    def spy(sampler: Sampler, row: LogitRow, context: Sequence[int]) -> Sampled:
        seen.append(torch.get_num_threads())
        return sample(sampler, row, context)

    monkeypatch.setattr(Sampler, "next_token", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        npuq.runtime.load(example_fp8, "cpu").generate("The", max_new_tokens=2, temperature=0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 1]
