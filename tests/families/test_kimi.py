"""What Kimi-K2.5 has beside its blocks, on trained weights: a nested config, a vision tower, media in messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kimi_k25
import pytest
import torch
from safetensors.torch import load_file

import npuq
import npuq.runtime
from npuq.convert import CalibrationText
from npuq.errors import CheckpointError, GenerationError
from npuq.report.facts import read_facts
from npuq.runtime.evaluation.perplexity import evaluate


@pytest.fixture(scope="module")
def trained(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kimi_k25.as_k25(example_fp8, tmp_path_factory.mktemp("trained") / "kimi")


@pytest.fixture(scope="module")
def artifact(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    npuq.convert_checkpoint(trained, out, method="mse")
    return out


def test_config_and_description_speak_to_loaders_of_nested_configs(trained: Path, artifact: Path) -> None:
    source, config = (json.loads((path / "config.json").read_text()) for path in (trained, artifact))
    text = config.pop("text_config")
    assert not {"quantization_config", "quantize", "moe_quantize"} & config.keys()
    assert (text.pop("quantize"), text.pop("moe_quantize")) == ("w8a8_dynamic", "w4a8_dynamic")
    source_text = source.pop("text_config")
    assert source_text.pop("quantization_config") and text == source_text
    assert config == source
    described = json.loads((artifact / "quant_model_description.json").read_text())
    assert described["vision_tower.encoder.blocks.0.mlp.fc0.weight"] == "FLOAT"
    assert described["language_model.model.layers.1.mlp.experts.0.up_proj.weight"] == "W4A8_DYNAMIC"
    assert not any("norm.bias" in name or "_packed" in name or "_shape" in name for name in described)


def test_the_vision_tower_keeps_its_bytes(trained: Path, artifact: Path) -> None:
    before, after = ({}, {})  # type: ignore[var-annotated]
    for tensors, directory in ((before, trained), (after, artifact)):
        for shard in directory.glob("*.safetensors"):
            tensors |= load_file(shard)
    names = [name for name in before if name.startswith(("vision_tower.", "mm_projector."))]
    assert len(names) == 35  # of a tower of one block, and the projector
    for name in names:
        assert torch.equal(after[name], before[name])


def test_other_places_of_the_quantization_config(trained: Path, tmp_path: Path) -> None:
    """At the top, as later releases have it, and at both places."""

    def at_the_top(config: dict[str, Any]) -> None:
        config["quantization_config"] = config["text_config"].pop("quantization_config")

    def twice(config: dict[str, Any]) -> None:
        config["quantization_config"] = config["text_config"]["quantization_config"]

    for edit in (at_the_top, twice):
        source, out = edited(trained, tmp_path / f"{edit.__name__}-source", edit), tmp_path / edit.__name__
        summary = npuq.convert_checkpoint(source, out, method="minmax")
        assert not any("int4" in note for note in summary.notes)
        written = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in written and "quantization_config" not in written["text_config"]


def test_calibrated_and_rotated_is_better(trained: Path, artifact: Path, eval_text: Path, tmp_path: Path) -> None:
    text = eval_text.read_text()[:6000]
    npuq.convert_checkpoint(
        trained,
        tmp_path / "best",
        method="rotate+smooth+gptq",
        calibration=CalibrationText(samples=12, sequence_length=256),
    )
    assert npuq.verify(tmp_path / "best", trained).problems == ()
    source = npuq.runtime.load(trained, "cpu")
    best, plain = (evaluate(path, text, source, context=256).kl_divergence for path in (tmp_path / "best", artifact))
    assert best is not None and plain is not None
    assert 0 < best < 0.9 * plain  # measured: 0.47


def test_text_is_answered_and_media_are_refused(trained: Path, artifact: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    for directory in (trained, artifact):
        model = npuq.runtime.load(directory, "cpu")
        assert model.chat("Once upon", chat_template=template, max_new_tokens=4).completion_tokens > 0
        for part in (
            {"type": "image_url", "image_url": {"url": "data:,"}},
            {"type": "image", "image": "a.png"},
            {"type": "video"},
            {"type": "input_audio", "input_audio": {}},
            {"image": "a.png"},
        ):
            messages = [
                {"role": "system", "content": "Look."},
                {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]},
            ]
            with pytest.raises(GenerationError, match=r"messages\[1\] has a part .*: npuq reads text alone") as caught:
                model.chat(messages, chat_template=template)
            assert "\n" not in str(caught.value)


def test_inspect_and_report(trained: Path, artifact: Path) -> None:
    found = npuq.inspect(trained)
    assert (found.kind, found.model_type, found.layers, found.experts) == ("checkpoint", "kimi_k25", 4, 16)
    assert {line.role for line in npuq.inspect(artifact).lines} == {line.role for line in found.lines}
    facts = read_facts(artifact)
    assert facts is not None
    assert "### vLLM-Ascend" in (artifact / "README.md").read_text()


def edited(trained: Path, directory: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(trained, directory)
    config = json.loads((trained / "config.json").read_text())
    edit(config)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no text model": (lambda c: c.pop("text_config"), "needs an object text_config, not None"),
    "a text": (lambda c: c.update(text_config="kimi_k2"), "needs an object text_config, not 'kimi_k2'"),
    "another text model": (
        lambda c: c["text_config"].update(model_type="qwen3_moe"),
        "the text model of a kimi_k25 is kimi_k2 or deepseek_v3, not 'qwen3_moe'",
    ),
    "a list": (lambda c: c["text_config"].update(model_type=["kimi_k2"]), "is kimi_k2 or deepseek_v3, not ['kimi_k2']"),
    # What stands at the top alone is not the text model's.
    "no width": (lambda c: c.update(hidden_size=c["text_config"].pop("hidden_size")), "hidden_size is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nested_configs_that_are_refused(case: str, trained: Path, tmp_path: Path) -> None:
    edit, words = REFUSED[case]
    source = edited(trained, tmp_path / "source", edit)
    for read in (npuq.inspect, npuq.runtime.load, lambda path: npuq.convert_checkpoint(path, tmp_path / "out")):
        with pytest.raises(CheckpointError) as caught:
            read(source)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_head_is_tied_by_the_text_model_alone(trained: Path, tmp_path: Path) -> None:
    """transformers' own default at the top is true; the checkpoint has a head."""
    source = edited(trained, tmp_path / "source", lambda c: c.update(tie_word_embeddings=True))
    summary = npuq.convert_checkpoint(source, tmp_path / "out", method="minmax")
    assert any("ties embedding and head at the top, and text_config does not" in note for note in summary.notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]) == (False, False)
