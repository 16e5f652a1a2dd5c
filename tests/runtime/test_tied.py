"""Tied embeddings, whatever the checkpoint stores: transformers, npuq and loaders of the artifact compute alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import npuq
import npuq.runtime

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = torch.randint(2, 320, (21,), generator=torch.Generator().manual_seed(4)).tolist()


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def same_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def transformers_logits(directory: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([TOKENS])).logits[0]
        return logits


def npuq_logits(directory: Path) -> Tensor:
    return next(npuq.runtime.load(directory, "reference", dtype=torch.float32).logits([TOKENS])).float()


@pytest.mark.parametrize("family", ["v2-lite", "v3"])
@pytest.mark.parametrize("edit", [None, other_head, same_head, head_alone])
def test_all_loaders_agree(
    make_checkpoint: Callable[..., Any], tmp_path: Path, family: str, edit: Callable[[dict[str, Tensor]], None] | None
) -> None:
    source, artifact = tmp_path / "source", tmp_path / "artifact"
    make_checkpoint(source, family, tie_word_embeddings=True)
    file = source / "model.safetensors"
    tensors = load_file(file)
    assert HEAD not in tensors
    if edit is not None:
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    expected = transformers_logits(source)
    torch.testing.assert_close(npuq_logits(source), expected, rtol=1e-3, atol=1e-4)

    said = npuq.convert_checkpoint(source, artifact, recipe="float").notes
    assert any(("stores both" if edit in (other_head, same_head) else "a second time") in note for note in said)
    verdict = npuq.verify(artifact, source)
    assert verdict.problems == ()
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    # Float weights under plain names: transformers reads the artifact as it is.
    torch.testing.assert_close(transformers_logits(artifact), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(npuq_logits(artifact), expected, rtol=1e-3, atol=1e-4)


def test_a_tied_model_can_be_rotated(make_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """The artifact has a head of its own, into which the final norm is folded."""
    source, artifact = tmp_path / "source", tmp_path / "artifact"
    make_checkpoint(source, "v3", tie_word_embeddings=True)
    npuq.convert_checkpoint(source, artifact, recipe="float", method="rotate")
    assert npuq.verify(artifact, source).problems == ()
    torch.testing.assert_close(npuq_logits(artifact), transformers_logits(source), rtol=1e-3, atol=2e-4)


def test_a_tied_pair_is_inspected_as_the_one_tensor_that_it_is(
    make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "source", "v3", tie_word_embeddings=True)
    lines = {line.role: line for line in npuq.inspect(tmp_path / "source").lines}
    assert "head" not in lines and lines["embedding"].tensors == 1
