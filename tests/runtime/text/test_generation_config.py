"""generation_config.json: how the model is sampled where nobody says otherwise, and what a damaged one gets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import npuq
from npuq.errors import GenerationError
from npuq.runtime import SamplingParams
from npuq.runtime.text.generation_config import default_sampling, eos_ids, read_generation_config

HERE = Path("model")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.95}, {"temperature": 0.6, "top_p": 0.95}),  # R1
        ({"do_sample": True, "temperature": 0}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_k": 5}, {}),
        ({"temperature": 0.6, "top_k": 20}, {"temperature": 0.6, "top_k": 20}),  # as vLLM
        ({"top_p": 0.9}, {}),
        ({"do_sample": True, "top_k": -1, "top_p": None, "min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.05}),
        ({"max_length": 131072, "eos_token_id": 163586, "num_beams": 4}, {}),  # Kimi-K2
    ],
)
def test_what_is_in_force(content: dict[str, Any], expected: dict[str, Any]) -> None:
    assert default_sampling(HERE, content) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"temperature": "0.6"}, r"temperature '0\.6' is not valid"),
        ({"temperature": [0.6]}, "temperature .* is not valid"),
        ({"do_sample": True, "temperature": -1}, "temperature -1 is not valid"),
        ({"do_sample": True, "temperature": 10**39}, None),
        ({"do_sample": True, "top_k": 1e30}, "top_k 1e.30 is not valid"),
        ({"do_sample": True, "top_p": 0}, "top_p 0 is not valid"),
        ({"repetition_penalty": {"a": "\x1b[31m"}}, r"repetition_penalty \{'a': '\\x1b\[31m'\} is not valid"),
    ],
)
def test_damage_is_one_line(content: dict[str, Any], expected: str | None) -> None:
    if expected is None:
        assert default_sampling(HERE, content).temperature == 1e39
        return
    with pytest.raises(GenerationError, match=f"^model/generation_config.json: {expected}") as caught:
        default_sampling(HERE, content)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "content",
    [b"[]", b'{"temperature": NaN}', b"{", b"\xff", b'{"eos_token_id": 1e999}', b"[" * 10**5, b" " * (2 << 20)],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(GenerationError, match=r"generation_config\.json: ") as caught:
        read_generation_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    os.mkfifo(path)
    with pytest.raises(GenerationError, match="not a regular file"):
        read_generation_config(tmp_path)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(GenerationError, match="outside the directory"):
        read_generation_config(tmp_path)


def test_ends_of_sequences() -> None:
    assert eos_ids(HERE, {}, {}) == frozenset()
    assert eos_ids(HERE, {"eos_token_id": None}, {"eos_token_id": [1, 2]}) == {1, 2}
    assert eos_ids(HERE, {"eos_token_id": 7}, {"eos_token_id": [1, 2]}) == {7}
    for bad in (True, "1", [1, None], {"a": 1}):
        with pytest.raises(GenerationError, match=r"model/generation_config\.json: eos_token_id"):
            eos_ids(HERE, {"eos_token_id": bad}, {})
    with pytest.raises(GenerationError, match=r"model/config\.json: eos_token_id"):
        eos_ids(HERE, {}, {"eos_token_id": 1.5})


def test_a_request_over_the_models_own(example_fp8: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(example_fp8, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 1, "temperature": 1.5}))
    model = npuq.load(directory, "cpu")
    greedy = model.generate("Call me", SamplingParams(max_new_tokens=12)).text
    assert model.generate("Call me", max_new_tokens=12).text == greedy  # the likeliest of one
    sampled = {model.generate("Call me", max_new_tokens=12, top_k=0, seed=seed).text for seed in range(3)}
    assert len(sampled | {greedy}) > 1
    assert model.generate("Call me", max_new_tokens=12, top_k=0, temperature=0).text == greedy


def test_a_damaged_one_does_not_keep_from_evaluating(example_fp8: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(example_fp8, tmp_path / "model"))
    expected = npuq.evaluate(directory, "It was the best of times", backend="cpu")
    (directory / "generation_config.json").write_text(json.dumps({"temperature": "hot"}))
    assert npuq.evaluate(directory, "It was the best of times", backend="cpu") == expected
    model = npuq.load(directory, "cpu")
    with pytest.raises(GenerationError, match=r"temperature 'hot'.*remove the field"):
        model.generate("x")
    assert model.generate("x", SamplingParams(max_new_tokens=1)).completion_tokens == 1
