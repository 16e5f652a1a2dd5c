"""The output errors of decoder layers, against those of transformers' own layers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.errors import GenerationError
from npuq.progress import Silent, Task
from npuq.runtime import layer_errors
from npuq.runtime.evaluation.perplexity import cut_contexts
from npuq.runtime.text.tokenizer import Tokenizer

CONTEXT = 24
CHANGED = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def pair(
    make_checkpoint: Callable[..., Any], example_fp8: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Any]:
    """A float checkpoint, one that differs in a weight of layer 1, and transformers' model of the first."""
    original, changed = (tmp_path_factory.mktemp("layers") / name for name in ("original", "changed"))
    vocabulary = json.loads((example_fp8 / "config.json").read_text())["vocab_size"]
    model = make_checkpoint(original, "v3", vocab_size=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example_fp8 / name, original)
    shutil.copytree(original, changed)
    weights = load_file(changed / "model.safetensors")
    weights[CHANGED] = weights[CHANGED] * 1.25
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    return original, changed, model


@pytest.fixture(scope="module")
def text(eval_text: Path) -> str:
    return eval_text.read_text(encoding="utf-8")[:600]


def _outputs(model: Any, contexts: list[tuple[int, ...]]) -> list[Tensor]:
    """Output of every layer over all tokens of the contexts, float64 [layers, tokens, hidden], from transformers."""
    caught: list[list[Tensor]] = [[] for _ in model.model.layers]

    def hook(index: int) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            caught[index].append(hidden.reshape(-1, hidden.shape[-1]).double())

        return keep

    handles = [layer.register_forward_hook(hook(index)) for index, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for each in contexts:
            model(torch.tensor([each]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in caught]


def test_transformers_own_layers_differ_by_the_same(pair: tuple[Path, Path, Any], text: str) -> None:
    original, changed, model = pair
    contexts = [each.inputs for each in cut_contexts(text, Tokenizer(original), CONTEXT)]
    assert len(contexts) > 2
    before = _outputs(model, contexts)
    weight = model.get_parameter(CHANGED)
    with torch.no_grad():
        weight.mul_(1.25)
        after = _outputs(model, contexts)
        weight.div_(1.25)
    found = layer_errors(changed, text, original, CONTEXT)
    assert [error.layer for error in found] == [0, 1, 2]
    for error, ours, theirs in zip(found, after, before, strict=True):
        assert error.relative_error == pytest.approx(float((ours - theirs).norm() / theirs.norm()), rel=1e-3, abs=1e-6)
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).mean()
        assert error.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert found[1].relative_error > 0.01
    # Only layer 1 differs: the same input gives the same output in the others, and layer 1's input is the same.
    assert found[0].own_relative_error == found[2].own_relative_error == 0.0
    assert found[1].own_relative_error == found[1].relative_error
    assert found[2].relative_error > 0.01


class Seen(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.steps: list[tuple[int, int | None, bool]] = []

    def start(self, task: Task, /) -> None:
        self.task = task

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        self.steps.append((count, layer, layer_done))


def test_an_artifact(artifact: Path, example_fp8: Path, text: str) -> None:
    seen = Seen()
    found = layer_errors(artifact, text, example_fp8, 64, progress=seen)
    assert seen.task == Task("evaluate", 4, "layers", layers=4)
    assert seen.steps == [(1, 0, True), (1, 1, True), (1, 2, True), (1, 3, True)]
    assert found[0].own_relative_error == found[0].relative_error > 0
    assert all(0 < error.own_relative_error < 0.1 and 0.99 < error.own_cosine < 1 for error in found)
    assert found[3].relative_error > found[3].own_relative_error
    again = layer_errors(artifact, text, example_fp8, 64, backend="reference")
    for one, other in zip(found, again, strict=True):
        assert astuple(one)[:5] == pytest.approx(astuple(other)[:5], rel=0.05)
        assert one.own_selection_agreement is None


def test_not_the_same_model(pair: tuple[Path, Path, Any], artifact: Path, text: str) -> None:
    with pytest.raises(GenerationError, match=r"num_hidden_layers 4 and .* has 3: not the same model"):
        layer_errors(artifact, text, pair[0])


def test_context_is_too_long(artifact: Path, example_fp8: Path, eval_text: Path) -> None:
    with pytest.raises(GenerationError, match="lower --context"):
        layer_errors(artifact, eval_text.read_text(encoding="utf-8") * 2, example_fp8, 10**6)


def test_a_layer_that_is_not_finite_is_named(pair: tuple[Path, Path, Any], text: str, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(pair[1], tmp_path / "damaged"))
    weights = load_file(damaged / "model.safetensors")
    weights[CHANGED][3, 5] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(GenerationError, match="layer 1: its output is not finite"):
        layer_errors(damaged, text, pair[0], CONTEXT)
