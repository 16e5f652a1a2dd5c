"""`npuq evaluate` from the outside: what it prints, and what bad input gets."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from json_schemas import check

import npuq.runtime
from npuq.errors import GenerationError
from npuq.runtime import LanguageModel

from ..commands.rig import Run, copy


@pytest.fixture
def text(eval_text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(eval_text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    return path


def golden_perplexity(model: LanguageModel, text: Path, context: int) -> tuple[float, int]:
    """Windows by hand: BOS and all tokens but the last go in, every token is predicted."""
    tokens = model.tokenizer.encode(text.read_text(encoding="utf-8"), special=False)
    loss = 0.0
    for start in range(0, len(tokens), context):
        window = tokens[start : start + context]
        logits = next(model.logits([[0, *window[:-1]]])).double()
        loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(window), reduction="sum"))
    return math.exp(loss / len(tokens)), len(tokens)


@pytest.mark.parametrize("context", [64, 100000])
def test_evaluate_follows_the_window_rule(run: Run, example: LanguageModel, text: Path, context: int) -> None:
    context = min(context, example.context)
    code, out, err = run("evaluate", example.directory, "--text", text, "--context", context, "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert list(values) == [
        "schema",
        "perplexity",
        "tokens",
        "source_perplexity",
        "kl_divergence",
        "top1_agreement",
    ]
    perplexity, tokens = golden_perplexity(example, text, context)
    assert values["tokens"] == tokens
    assert values["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert values["source_perplexity"] is None


def test_evaluate_against_the_source(run: Run, artifact: Path, example: LanguageModel, text: Path) -> None:
    _, out, _ = run("evaluate", artifact, "--text", text, "--source", example.directory, "--context", 128, "--json")
    values = json.loads(out)
    assert values["source_perplexity"] == pytest.approx(golden_perplexity(example, text, 128)[0], rel=1e-5)
    ours = npuq.runtime.load(artifact, "cpu")
    tokens = ours.tokenizer.encode(text.read_text(encoding="utf-8"), special=False)
    divergence, agreements = 0.0, 0
    for start in range(0, len(tokens), 128):
        window = [[0, *tokens[start : start + 128][:-1]]]
        model, source = (next(runner.logits(window)).double().log_softmax(-1) for runner in (ours, example))
        divergence += float(torch.nn.functional.kl_div(model, source, reduction="sum", log_target=True))
        agreements += int((model.argmax(-1) == source.argmax(-1)).sum())
    assert values["kl_divergence"] == pytest.approx(divergence / len(tokens), rel=1e-3)
    assert values["top1_agreement"] == pytest.approx(agreements / len(tokens))
    assert 1e-4 < values["kl_divergence"] < 1e-2


def test_evaluate_layers(run: Run, artifact: Path, example: LanguageModel, text: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    arguments = ("evaluate", artifact, "--text", text, "--source", example.directory, "--context", 128, "--layers")
    _, out, _ = run(*arguments, "--json", "--save")
    check("evaluate", json.loads(out))
    layers = json.loads(out)["layers"]
    assert npuq.verification.inspect(artifact).evaluations[0]["layers"] == layers
    content = text.read_text(encoding="utf-8")
    assert layers == [vars(error) for error in npuq.runtime.layer_errors(artifact, content, example.directory, 128)]
    _, table, _ = run(*arguments)
    assert [line.split()[:2] for line in table.splitlines()[-4:]] == [
        [str(layer["layer"]), f"{layer['relative_error']:.3%}"] for layer in layers
    ]
    code, _, err = run("evaluate", artifact, "--text", text, "--layers")
    assert (code, "name it with --source" in err) == (2, True)


def test_evaluate_prints_a_table(run: Run, example: LanguageModel, text: Path) -> None:
    _, out, _ = run("evaluate", example.directory, "--text", text, "--source", example.directory)
    assert "perplexity" in out
    assert "top-1 agreement    100.00 %" in out


def test_evaluate_without_bos_leaves_out_first_tokens(example_fp8: Path, tmp_path: Path, text: Path) -> None:
    directory = copy(example_fp8, tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    model = npuq.runtime.load(directory, "cpu")
    content = text.read_text(encoding="utf-8")
    tokens = len(model.tokenizer.encode(content, special=False))
    assert npuq.evaluate(model, content, context=64).tokens == tokens - math.ceil(tokens / 64)


def test_evaluate_refuses_what_it_cannot_do(run: Run, example: LanguageModel, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00")
    for arguments, expected in (
        (("--text", empty), "no token to predict"),
        (("--text", binary), "UTF-8"),
    ):
        code, out, err = run("evaluate", example.directory, *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert expected in err
    assert run("evaluate", example.directory)[0] == 2
    with pytest.raises(GenerationError, match="context 5000 exceeds the 4096"):
        npuq.evaluate(example, "whale " * 6000, context=5000)


def test_evaluate_refuses_another_vocabulary(
    example: LanguageModel, make_checkpoint: Callable[..., Any], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, "v3")
    with pytest.raises(GenerationError, match="vocabular"):
        npuq.evaluate(example, "The whale and the sea", source=tmp_path)
