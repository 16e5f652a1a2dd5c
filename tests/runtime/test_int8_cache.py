"""The int8 KV cache against numpy: which code lies where, attention over codes, and who refuses what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.errors import ArtifactError, GenerationError
from npuq.formats.artifact import KV_CACHE_NAME
from npuq.formats.kv_cache import latent_codes, load_scales, save_scales, storable_scale
from npuq.native.library import levels
from npuq.runtime import EngineConfig, evaluate, load
from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import (
    Decode,
    LayerCache,
    Ops,
    Positions,
)
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.reference import ReferenceOps

LATENT, ROPE, BLOCK, HEADS = 96, 16, 16, 3


def _native(level: str) -> Callable[[], Ops]:
    return lambda: NativeOps(threads=2, level=level)


BACKENDS = ("cpu", "reference")

SETS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "torch": CpuOps,
    **{f"native-{level}": _native(level) for level in levels()},
}


@pytest.fixture(params=SETS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return SETS[request.param]()


def _cache(ops: Ops, scale: np.ndarray, blocks: int = 8) -> LayerCache:
    return ops.caches.new(
        (Pool("latent", len(scale), int8=True), Pool("rope", ROPE)), blocks, BLOCK, {"latent": torch.from_numpy(scale)}
    )


def _scale(rng: np.random.Generator) -> np.ndarray:
    scales = torch.from_numpy(rng.uniform(0.004, 0.05, LATENT).astype(np.float32))
    return storable_scale(scales).numpy()


def test_codes_lie_in_tiles_of_32_and_outputs_are_what_they_stand_for(ops: Ops) -> None:
    rng = np.random.default_rng(1)
    scale = _scale(rng)
    cache = _cache(ops, scale, blocks=3)
    assert cache["latent"].tensor.shape == (3, LATENT // 32, BLOCK, 32)
    assert cache["latent"].tensor.dtype == torch.int8
    assert cache["rope"].tensor.dtype == ops.dtype
    kv = torch.from_numpy(rng.standard_normal((5, LATENT + ROPE)).astype(np.float32))
    gamma = torch.from_numpy(rng.uniform(0.5, 2, LATENT).astype(np.float32))
    kv[:, 7], gamma[7] = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0]), 40.0  # saturates
    slots = [40, 3, -1, 15, 16]
    positions = Positions(torch.tensor(slots), torch.ones(5, ROPE), torch.zeros(5, ROPE))
    written = ops.mla.kv_rmsnorm_rope_cache(kv, gamma, 1e-6, positions, cache, output_kv=True)
    assert written is not None
    _, latent = written
    exact = kv[:, :LATENT].double()
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6) * gamma
    # What the chunk itself attends to: whole codes, the nearest to the exact latent, times the channel's scale.
    codes = np.rint(latent.numpy() / scale)
    assert np.array_equal(latent.numpy(), codes.astype(np.float32) * scale)
    assert (np.abs(codes - np.clip(exact.numpy() / scale, -128, 127)) <= 0.5 + 1e-4).all()
    golden = np.zeros(tuple(cache["latent"].tensor.shape), np.int8)
    for slot, row in zip(slots, codes, strict=True):
        for channel, code in enumerate(row):
            if slot >= 0:
                golden[slot // BLOCK, channel // 32, slot % BLOCK, channel % 32] = code
    assert np.array_equal(cache["latent"].tensor.numpy(), golden)
    assert {-128, 127} <= set(golden[:, 0, :, 7].flatten().tolist())


def test_attention_over_codes(ops: Ops) -> None:
    """Against float64 on the values that the codes stand for, with the queries rounded to int8 as they are."""
    rng = np.random.default_rng(2)
    scale = _scale(rng)
    cache = _cache(ops, scale)
    cache["latent"].tensor.fill_(99)
    cache["rope"].tensor.fill_(float("nan"))
    tables, lengths, queries = [[6, 2], [5, 0, 3]], [20, 33], [1, 3]
    sequences = []
    for table, length in zip(tables, lengths, strict=True):
        codes = rng.integers(-128, 128, (length, LATENT)).astype(np.int8)
        rope = rng.standard_normal((length, ROPE)).astype(np.float32)
        for token in range(length):
            block, offset = table[token // BLOCK], token % BLOCK
            cache["latent"].tensor[block, :, offset] = torch.from_numpy(codes[token]).view(-1, 32)
            cache["rope"].tensor[block, :, offset] = torch.from_numpy(rope[token]).view(-1, 16)
        sequences.append((codes, rope))
    q_latent = rng.standard_normal((4, HEADS, LATENT)).astype(np.float32)
    q_rope = rng.standard_normal((4, HEADS, ROPE)).astype(np.float32)
    scaled = q_latent * scale
    largest = np.abs(scaled).max(-1, keepdims=True)
    rounded = np.rint(scaled * (np.float32(127) / largest)) * (largest.astype(np.float64) / 127)
    decode = Decode((1, 4), tuple(lengths), torch.tensor([[6, 2, 0], [5, 0, 3]], dtype=torch.int32))
    out = ops.mla.fused_infer_attention_paged(torch.from_numpy(q_latent), torch.from_numpy(q_rope), cache, decode, 0.2)
    first = 0
    for (codes, rope), count in zip(sequences, queries, strict=True):
        rows = slice(first, first + count)
        scores = np.einsum("qnl,sl->nqs", rounded[rows], codes.astype(np.float64))
        scores = 0.2 * (scores + np.einsum("qnr,sr->nqs", q_rope[rows].astype(np.float64), rope.astype(np.float64)))
        hidden = np.arange(len(codes))[None] > np.arange(count)[:, None] + len(codes) - count
        weights = np.exp(np.where(hidden, -np.inf, scores - scores.max(-1, keepdims=True)))
        weights /= weights.sum(-1, keepdims=True)
        golden = np.einsum("nqs,sl->qnl", weights, codes * scale.astype(np.float64))
        np.testing.assert_allclose(out[rows].numpy(), golden, atol=2e-5)
        first += count
    gathered = ops.caches.gather(cache, torch.tensor([0, 3], dtype=torch.int32), 17)
    latent, rope_rows = gathered["latent"], gathered["rope"]
    assert np.array_equal(latent.numpy(), (sequences[1][0] * scale)[16:33])
    assert np.array_equal(rope_rows.numpy(), sequences[1][1][16:33])


def test_a_query_that_is_no_number_does_not_become_one(ops: Ops) -> None:
    cache = _cache(ops, np.full(LATENT, 0.5, np.float32))
    cache["latent"].tensor.fill_(3)
    q_latent, q_rope = torch.ones(2, HEADS, LATENT), torch.ones(2, HEADS, ROPE)
    q_latent[0, 1, 5] = torch.nan
    decode = Decode((1, 2), (9, 9), torch.tensor([[1], [2]], dtype=torch.int32))
    out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, 0.2)
    assert out[0, 1].isnan().all()
    out[0, 1] = 0
    assert out.isfinite().all()


@given(st.lists(st.floats(2.0**-14, 6e4, width=32), min_size=1))
def test_scales_lose_nothing_in_a_16_bit_type(values: list[float]) -> None:
    scale = torch.tensor(values)
    stored = storable_scale(scale)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(stored.to(dtype).float(), stored)
    assert (stored >= scale).all()
    assert (stored <= scale * (1 + 2**-7)).all()


def test_codes_of_extremes() -> None:
    codes = latent_codes(torch.tensor([[2.5, 3.5, 1e9, -1e9, torch.nan, torch.inf]]), torch.ones(6))
    assert codes.tolist() == [[2, 4, 127, -128, 0, 127]]


def test_stored_scales_come_back_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kv_cache.safetensors"
    scales = [storable_scale(torch.rand(32) + 0.1) for _ in range(2)]
    save_scales(scales, path)
    assert all(torch.equal(a, b) for a, b in zip(scales, load_scales(path, 2, 32), strict=True))
    with pytest.raises(ArtifactError, match=r"layers\.0\.self_attn\.kv_cache_scale.*\[64\]"):
        load_scales(path, 2, 64)
    with pytest.raises(ArtifactError, match=r"layers\.2\.self_attn\.kv_cache_scale' is missing"):
        load_scales(path, 3, 32)
    save_scales([scales[0], torch.full((32,), torch.nan)], path)
    with pytest.raises(ArtifactError, match=r"layers\.1\..*outside"):
        load_scales(path, 2, 32)
    path.write_bytes(b"damage")
    with pytest.raises(ArtifactError, match="truncated"):
        load_scales(path, 2, 32)


def test_without_scales_it_is_refused(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"{KV_CACHE_NAME}: there are no scales .*--method gptq"):
        load(artifact, kv_cache_dtype="int8")
    with pytest.raises(GenerationError, match="'fp8' is unknown; npuq has auto, int8"):
        load(artifact, kv_cache_dtype="fp8")


TEXTS = [list(range(5, 60)), [7, 300, 12], list(range(900, 940))]


def test_all_tokens_attend_to_codes_when_logits_are_asked_for(int8_artifact: Path) -> None:
    """The three sets agree among themselves, and differ from a float cache by what int8 costs, which is little."""
    sizes = EngineConfig(max_num_batched_tokens=64)  # two steps
    plain = list(load(int8_artifact, "cpu", engine=sizes).logits(TEXTS))
    found = [list(load(int8_artifact, kind, engine=sizes, kv_cache_dtype="int8").logits(TEXTS)) for kind in BACKENDS]
    for ours, theirs, floats in zip(*found, plain, strict=True):
        span = float(floats.abs().max())
        assert float((ours - theirs).abs().max()) < 0.02 * span
        assert 1e-4 * span < float((ours - floats).abs().mean()) < 0.02 * span


def test_a_sequence_longer_than_a_step_is_read_from_codes_too(int8_artifact: Path) -> None:
    whole, parts = (
        load(int8_artifact, "cpu", engine=EngineConfig(max_num_batched_tokens=size), kv_cache_dtype="int8")
        for size in (1024, 33)
    )
    tokens = list(range(20, 120))
    (expected,), (found,) = (list(model.logits([tokens])) for model in (whole, parts))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert whole.engine.blocks.num_free == whole.engine.blocks.num_blocks


def test_generation_over_chunks_and_blocks(int8_artifact: Path) -> None:
    """Several prompts, chunked prefill beside decodes, blocks used again: both backends find the same tokens."""
    sizes = EngineConfig(8 << 20, block_size=16, max_num_seqs=2, max_num_batched_tokens=20, prefix_segment_tokens=32)
    results = [
        load(int8_artifact, kind, engine=sizes, kv_cache_dtype="int8").generate(TEXTS, max_new_tokens=8, temperature=0)
        for kind in BACKENDS
    ]
    assert [each.token_ids for each in results[0]] == [each.token_ids for each in results[1]]


def test_more_tokens_fit(int8_artifact: Path) -> None:
    sizes = EngineConfig(kv_cache_bytes=4 << 20, max_num_seqs=1000)
    plain, int8 = (load(int8_artifact, "cpu", engine=sizes, kv_cache_dtype=kind) for kind in ("auto", "int8"))
    pages = [pages for layer in int8.engine._cache for pages in layer.pages.values()]
    stored = sum(each.tensor.numel() * each.tensor.element_size() for each in pages)
    assert stored <= sizes.kv_cache_bytes
    assert int8.engine.blocks.num_blocks == pytest.approx(
        plain.engine.blocks.num_blocks * 4 * 576 / (512 + 4 * 64), abs=2
    )


def test_logits_of_more_sequences_than_the_cache_holds(int8_artifact: Path) -> None:
    """A step takes as many as there are blocks for; one of another's is all that refuses."""
    sizes = EngineConfig(kv_cache_bytes=1 << 20, block_size=64, max_num_seqs=2)
    model = load(int8_artifact, "cpu", engine=sizes, kv_cache_dtype="int8")
    blocks = model.engine.blocks
    count = 2 * blocks.num_blocks + 1
    assert count * 3 < sizes.max_num_batched_tokens
    found = list(model.logits([[7, 300, 12]] * count))
    assert len(found) == count
    assert blocks.num_free == blocks.num_blocks
    taken = blocks.allocate(blocks.num_blocks)
    with pytest.raises(GenerationError, match="the cache is in use"):
        list(model.logits([[7, 300, 12]]))
    blocks.release(taken or [])


def test_missing_scales_are_told_before_weights_are_read(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npuq.runtime.llm.load_weights", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ArtifactError, match="there are no scales"):
        load(artifact, kv_cache_dtype="int8")


def test_evaluate_judges_the_cache(int8_artifact: Path, example_fp8: Path, tmp_path: Path) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12
    plain, int8 = (
        evaluate(int8_artifact, text, example_fp8, 128, "cpu", kv_cache_dtype=kind) for kind in ("auto", "int8")
    )
    assert plain.source_perplexity == int8.source_perplexity
    assert plain.perplexity != int8.perplexity
    assert int8.perplexity == pytest.approx(plain.perplexity, rel=0.02)
