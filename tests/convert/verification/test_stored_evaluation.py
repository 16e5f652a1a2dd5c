"""`npuq evaluate --save`: the manifest and the card keep the result, and verify and inspect agree with it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import npuq
from npuq.cli.inspect import command as inspect_command
from npuq.errors import ArtifactError, ConversionError
from npuq.runtime import LayerError
from npuq.runtime.evaluation.perplexity import Evaluation
from npuq.verification import inspect, verify
from npuq.verification.evaluations import check_can_save, save_evaluation

MANIFEST, CARD = "npuq/manifest.json", "README.md"
RESULT = Evaluation(66.5, 1000, 66.41, 0.00131, 0.977)


@pytest.fixture
def artifact(example_fp8: Path, tmp_path: Path) -> Path:
    path = tmp_path / "artifact"
    npuq.convert_checkpoint(example_fp8, path, method="minmax")
    return path


@pytest.fixture
def text() -> tuple[str, str]:
    """Name and sha256."""
    return "wiki|text.txt", hashlib.sha256(b"Once upon a time").hexdigest()


def test_manifest_and_card(artifact: Path, text: tuple[str, str]) -> None:
    before = (artifact / CARD).read_text()
    files = json.loads((artifact / MANIFEST).read_text())["files"]
    save_evaluation(artifact, RESULT, *text, 256)
    manifest, digest = json.loads((artifact / MANIFEST).read_text()), text[1]
    assert manifest["files"] == files
    assert manifest["evaluations"] == [
        {
            "text": "wiki|text.txt",
            "text_sha256": digest,
            "context": 256,
            "tokens": 1000,
            "perplexity": 66.5,
            "source_perplexity": 66.41,
            "kl_divergence": 0.00131,
            "top1_agreement": 0.977,
        }
    ]
    card = (artifact / CARD).read_text()
    row = f"| wiki\\|text.txt | `{digest[:16]}` | 256 | 1000 | 66.500 | 66.410 | 0.00131 | 97.70% |"
    assert row in card
    assert before.index("## Size") < card.index("## Evaluation") < card.index("## Loading")
    start, end = card.index("## Evaluation"), card.index("## Loading")
    assert card[:start] + card[end:] == before
    assert verify(artifact).problems == ()
    assert inspect(artifact).as_dict()["evaluations"][0]["perplexity"] == 66.5


def test_replaced_by_text_and_context(artifact: Path, text: tuple[str, str]) -> None:
    for context, perplexity in ((256, 70.0), (512, 60.0), (256, 71.0)):
        save_evaluation(artifact, Evaluation(perplexity, 10), *text, context)
    stored = inspect(artifact).evaluations
    assert [(entry["context"], entry["perplexity"]) for entry in stored] == [(512, 60.0), (256, 71.0)]
    card = (artifact / CARD).read_text()
    assert card.count("## Evaluation") == 1
    assert "70.000" not in card
    assert "| 71.000 | – | – | – |" in card


def test_an_int8_cache_is_told_and_kept_apart(artifact: Path, text: tuple[str, str]) -> None:
    save_evaluation(artifact, Evaluation(70.0, 10), *text, 256)
    save_evaluation(artifact, Evaluation(71.0, 10), *text, 256, kv_cache_dtype="int8")
    save_evaluation(artifact, Evaluation(72.0, 10), *text, 256, kv_cache_dtype="int8")
    stored = inspect(artifact).evaluations
    assert [(entry.get("kv_cache_dtype"), entry["perplexity"]) for entry in stored] == [(None, 70.0), ("int8", 72.0)]
    card = (artifact / CARD).read_text()
    assert "| wiki\\|text.txt | `" in card
    assert "| wiki\\|text.txt (int8 KV cache) | `" in card
    shown = CliRunner().invoke(inspect_command, [str(artifact)]).output
    assert "perplexity 70.000 on wiki|text.txt, context 256\n" in shown
    assert "perplexity 72.000 on wiki|text.txt (int8 KV cache), context 256\n" in shown


def test_errors_of_layers(artifact: Path, text: tuple[str, str]) -> None:
    card = (artifact / CARD).read_text()
    layers = [LayerError(0, 0.01, 0.999, 0.01, 0.999), LayerError(1, 0.03, 0.99, 0.02, 0.995)]
    save_evaluation(artifact, RESULT, *text, 256, layers)
    (stored,) = inspect(artifact).evaluations
    assert stored["layers"][1] == {
        "layer": 1,
        "relative_error": 0.03,
        "cosine": 0.99,
        "own_relative_error": 0.02,
        "own_cosine": 0.995,
        "own_selection_agreement": None,
    }
    assert verify(artifact).problems == ()
    with_layers = (artifact / CARD).read_text()
    save_evaluation(artifact, RESULT, *text, 256)  # in place of the first, whose layers go with it
    assert "layers" not in inspect(artifact).evaluations[0]
    assert (artifact / CARD).read_text() == with_layers != card


def test_the_authors_text_stays(artifact: Path, text: tuple[str, str]) -> None:
    card = artifact / CARD
    card.write_text("Foreword\n## Evaluation\n\n## Loading\n" + card.read_text() + "Afterword\n")
    before = card.read_text()
    assert save_evaluation(artifact, RESULT, *text, 256)
    assert card.read_text().startswith("Foreword\n## Evaluation\n\n## Loading\n---")
    assert card.read_text().endswith("Afterword\n")
    assert len(card.read_text()) > len(before)
    card.write_text("mine alone\n")
    assert not save_evaluation(artifact, RESULT, *text, 256)
    assert card.read_text() == "mine alone\n"
    card.unlink()
    assert not save_evaluation(artifact, RESULT, *text, 256)
    assert not card.exists()
    assert len(inspect(artifact).evaluations) == 1


def test_a_second_conversion_finds_it_finished(artifact: Path, text: tuple[str, str], example_fp8: Path) -> None:
    save_evaluation(artifact, RESULT, *text, 256)
    before = (artifact / MANIFEST).read_bytes()
    npuq.convert_checkpoint(example_fp8, artifact, method="minmax")
    assert (artifact / MANIFEST).read_bytes() == before


def test_refusals(artifact: Path, text: tuple[str, str], example_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished npuq artifact"):
        check_can_save(example_fp8)
    cached = tmp_path / "cached"
    (cached / "npuq").mkdir(parents=True)
    (cached / MANIFEST).symlink_to(artifact / MANIFEST)
    with pytest.raises(ArtifactError, match="npuq pull"):
        check_can_save(cached)


def test_a_kill_before_the_rename_loses_nothing(
    artifact: Path, text: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (artifact / MANIFEST).read_bytes()

    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConversionError, match="space"):
        save_evaluation(artifact, RESULT, *text, 256)
    assert (artifact / MANIFEST).read_bytes() == before


SOUND = {"text": "a", "text_sha256": "b", "context": 1, "tokens": 1, "perplexity": 2.0}


@pytest.mark.parametrize(
    "damage",
    [
        {},
        [1],
        [{"text": "a"}],
        [{**SOUND, "text": 1}],
        [{**SOUND, "perplexity": "2"}],
        [{**SOUND, "layers": 4}],
        [{**SOUND, "layers": [0.01]}],
        [{**SOUND, "layers": [{"layer": 0, "relative_error": 0.1, "cosine": 1.0, "own_relative_error": 0.1}]}],
    ],
)
def test_damaged(artifact: Path, damage: object) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    (artifact / MANIFEST).write_text(json.dumps({**manifest, "evaluations": damage}))
    assert any("'evaluations' is damaged" in problem for problem in verify(artifact).problems)
    with pytest.raises(ArtifactError, match="'evaluations' is damaged"):
        inspect(artifact)
