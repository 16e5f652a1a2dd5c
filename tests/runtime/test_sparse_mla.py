"""Sparse attention in the runtime against transformers' DeepseekV32 and GlmMoeDsa: same weights, float32.

Sequences are several times as long as a selection. With 16 index heads no two keys of a query score the same.
"""

from __future__ import annotations

import json
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
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams, layer_errors
from npuq.runtime.attention.sparse_mla import SparseMlaAttention
from npuq.runtime.step import Chunk

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "convert"), str(TESTS / "convert" / "sparse")]

from calibrated import VOCABULARY  # noqa: E402
from sparse_models import MODELS, Sparse, make_sparse  # noqa: E402

TOLERANCE = 1e-4
BACKENDS = ["reference", "cpu"]
TOPK = 8
TOKENS = torch.randint(2, VOCABULARY, (75,), generator=torch.Generator().manual_seed(3)).tolist()
OTHERS = [TOKENS[40:70], TOKENS[:5], TOKENS[20:29]]
SMALL = EngineConfig(block_size=16, max_num_seqs=4, max_num_batched_tokens=24, prefix_segment_tokens=32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sparse]:
    """`models(name, **changes of the config)`: each made once."""
    made: dict[str, Sparse] = {}

    def get(name: str, **changes: Any) -> Sparse:
        key = f"{name} {sorted(changes.items())}"
        if key not in made:
            made[key] = make_sparse(tmp_path_factory.mktemp("sparse") / "source", name, **changes)
        return made[key]

    return get


def golden_logits(sparse: Sparse, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = sparse.golden(torch.tensor([tokens])).logits[0]
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
def test_whole_sequences(models: Callable[..., Sparse], name: str, backend: str) -> None:
    sparse = models(name)
    model = npuq.runtime.load(sparse.directory, backend)
    sequences = [TOKENS, *OTHERS]
    for tokens, ours in zip(sequences, model.logits(sequences), strict=True):
        assert relative_error(ours, golden_logits(sparse, tokens)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize(
    "starts",
    [[0, 24, 48, 72], [0, 5, 7, 8, 9, 17, 60], list(range(75)), [0, 30, *range(31, 75)]],
    ids=["chunks", "chunks across the limit", "one by one", "a prompt, then one by one"],
)
def test_through_the_cache(models: Callable[..., Sparse], name: str, backend: str, starts: list[int]) -> None:
    sparse = models(name)
    model = npuq.runtime.load(sparse.directory, backend, engine=SMALL)
    assert relative_error(by_chunks(model, TOKENS, starts), golden_logits(sparse, TOKENS)) < TOLERANCE


def test_layers_shared_by_frequency_and_offset(models: Callable[..., Sparse]) -> None:
    """The third way to say which layers are shared; the unused indexers of shared layers may be stored."""
    sparse = models("glm", num_hidden_layers=6, indexer_types=["full", "full", "shared", "shared", "full", "shared"])
    listed = npuq.runtime.load(sparse.directory, "reference")
    config = sparse.config
    config["index_topk_freq"], config["index_skip_topk_offset"] = 3, 2
    sparse.set_config(indexer_types=None, index_topk_freq=3, index_skip_topk_offset=2)
    model = npuq.runtime.load(sparse.directory, "reference")
    assert torch.equal(next(model.logits([TOKENS])), next(listed.logits([TOKENS])))
    assert relative_error(next(model.logits([TOKENS])), golden_logits(sparse, TOKENS)) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["v32-yarn", "glm"])
def test_batches_and_preemption(models: Callable[..., Sparse], name: str, backend: str) -> None:
    """Sequences on both sides of the limit in one step, and some computed again after they lost their blocks."""
    sparse = models(name)
    prompts = [TOKENS[:30], *OTHERS]
    alone = [greedy(npuq.runtime.load(sparse.directory, backend), [prompt], 20)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) == len(prompts)
    for prompt, tokens in zip(prompts, alone, strict=True):
        rows = golden_logits(sparse, prompt + tokens)
        assert rows[len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    assert greedy(npuq.runtime.load(sparse.directory, backend), prompts, 20) == alone
    model = npuq.runtime.load(sparse.directory, backend, engine=SMALL)
    assert greedy(model, prompts, 20) == alone
    block = sum(pool.row_bytes for pools in _stored(model) for pool in pools) * 16
    model = npuq.runtime.load(sparse.directory, backend, engine=replace(SMALL, kv_cache_bytes=8 * block))
    assert greedy(model, prompts, 20) == alone
    assert model.engine.scheduler.num_preempted > 0


def _stored(model: LanguageModel) -> list[Any]:
    attention = model.engine.model.attention
    layers = range(model.engine.model.config.num_hidden_layers)
    return [model.engine.model.ops.caches.stored(attention.pools(layer)) for layer in layers]


class AlwaysSelecting(SparseMlaAttention):
    """Selects in every step, even where all is visible."""

    @property
    def dense_tokens(self) -> int:
        return 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["v32-yarn", "glm"])
def test_while_everything_is_visible_it_is_dense(models: Callable[..., Sparse], name: str, backend: str) -> None:
    """Steps up to the limit are the same dense attention bit by bit, and selecting everything gives its result."""
    few, all_of_them = (
        npuq.runtime.load(models(name, index_topk=topk).directory, backend, engine=SMALL) for topk in (TOPK, 100)
    )
    starts = [0, 3, 7]
    assert torch.equal(by_chunks(few, TOKENS[:TOPK], starts), by_chunks(all_of_them, TOKENS[:TOPK], starts))
    starts = [0, 24, 48, 72]
    dense = by_chunks(all_of_them, TOKENS, starts)
    kind = all_of_them.engine.model.attention
    assert isinstance(kind, SparseMlaAttention)
    all_of_them.engine.model.attention = AlwaysSelecting(kind.config, kind.indexer, kind.full)
    all_of_them.engine._builder._dense_tokens = 0
    assert relative_error(by_chunks(all_of_them, TOKENS, starts), dense) < TOLERANCE
    assert relative_error(by_chunks(few, TOKENS, starts), dense) > 0.01


def test_the_wrong_rope_convention_shows(models: Callable[..., Sparse]) -> None:
    for name, wrong in (("v32", True), ("glm", False)):
        sparse = models(name)
        model = npuq.runtime.load(sparse.directory, "reference")
        for layer in model.engine.model.weights.layers:
            if layer.attention.indexer is not None:
                config = replace(layer.attention.indexer.config, rope_interleave=wrong)
                object.__setattr__(layer.attention.indexer, "config", config)
        ours, golden = next(model.logits([TOKENS])), golden_logits(sparse, TOKENS)
        assert relative_error(ours[:TOPK], golden[:TOPK]) < TOLERANCE
        assert relative_error(ours, golden) > 0.01


def test_a_missing_hand_over_shows(models: Callable[..., Sparse]) -> None:
    """Shared layers that attend to the first layer's selection in place of the nearest full layer's."""
    sparse = models("glm")
    model = npuq.runtime.load(sparse.directory, "reference")
    inner, attention = model.engine.model, model.engine.model.attention
    kept: list[Tensor] = []

    class Stale(SparseMlaAttention):
        def attend(self, *arguments: Any) -> Any:
            *others, selected = arguments
            attended = super().attend(*others, kept[0] if kept else selected)
            kept.append(attended.selected)
            return attended

    assert isinstance(attention, SparseMlaAttention)
    inner.attention = Stale(attention.config, attention.indexer, attention.full)
    assert relative_error(next(model.logits([TOKENS])), golden_logits(sparse, TOKENS)) > 0.01


def test_keys_are_written_in_dense_steps_too(models: Callable[..., Sparse]) -> None:
    model = npuq.runtime.load(models("glm").directory, "reference", engine=SMALL)
    by_chunks(model, TOKENS[:TOPK], [0])
    pools = [list(cache.pages) for cache in model.engine._cache]
    assert pools == [["latent", "rope", "index_key"]] * 2 + [["latent", "rope"]] * 2
    for cache in model.engine._cache[:2]:
        assert cache["index_key"].tensor.flatten(0, 2)[:TOPK].any(-1).all()


def test_an_int8_cache_is_refused(models: Callable[..., Sparse]) -> None:
    with pytest.raises(ArtifactError, match="deepseek_v32 has no int8 KV cache"):
        npuq.runtime.load(models("v32").directory, "reference", kv_cache_dtype="int8")


@pytest.fixture(scope="module")
def artifact(models: Callable[..., Sparse], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W4A8 experts, W8A8 attention and index queries."""
    output = tmp_path_factory.mktemp("artifact") / "out"
    convert_checkpoint(models("glm").directory, output, method="minmax")
    return output


def test_quantized_linears(artifact: Path) -> None:
    described = json.loads((artifact / "quant_model_description.json").read_text())
    assert described["model.layers.1.self_attn.indexer.wq_b.weight"] == "W8A8_DYNAMIC"
    reference, native = (npuq.runtime.load(artifact, backend, engine=SMALL) for backend in BACKENDS)
    ours = next(reference.logits([TOKENS]))
    # The same integers; a score that rounds differently may select another token for one query.
    rows = (next(native.logits([TOKENS])) - ours).norm(dim=-1) / ours.norm(dim=-1)
    assert float((rows < TOLERANCE).float().mean()) > 0.9
    starts = [0, 24, 48, *range(60, 75)]
    assert relative_error(by_chunks(native, TOKENS, starts), ours) < 0.1


def test_the_agreement_of_selections(models: Callable[..., Sparse], artifact: Path) -> None:
    text = " ".join(f"w{token}" for token in TOKENS * 3)
    source = models("glm").directory
    agreement = [error.own_selection_agreement for error in layer_errors(artifact, text, source, 40)]
    assert agreement[2:] == [None, None]  # another layer's selection
    assert all(each is not None and 0.5 < each < 1 for each in agreement[:2])
    same = layer_errors(source, text, source, 40)
    assert [error.own_selection_agreement for error in same] == [1.0, 1.0, None, None]
    assert [error.own_selection_agreement for error in layer_errors(artifact, text, source, TOPK)] == [None] * 4
