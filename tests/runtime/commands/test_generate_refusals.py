"""`npuq generate` from the outside: what bad input and wrong usage get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .rig import Run, copy


def drop_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")


def drop_shard(directory: Path) -> None:
    (directory / "model-00002-of-000003.safetensors").unlink()


def cut_shard(directory: Path) -> None:
    path = directory / "model-00003-of-000003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change(key: str, value: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return damage


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_tokenizer, "tokenizer.json"),
        (drop_shard, "model-00002-of-000003.safetensors"),
        (cut_shard, "model-00003-of-000003.safetensors"),
        (change("model_type", "llama"), "'llama' is unknown"),
        (change("hidden_size", 512), "model.embed_tokens.weight"),
        (change("rope_scaling", {"type": "spiral", "factor": 2}), "'spiral' is unknown"),
    ],
)
def test_bad_checkpoint_gets_one_line(
    run: Run, example_fp8: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    directory = copy(example_fp8, tmp_path)
    damage(directory)
    code, out, err = run("generate", directory, "--prompt", "x", "--max-new-tokens", 1)
    assert (code, out) == (1, "")
    assert expected in err
    assert err.startswith("npuq: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--prompt", "whale " * 5000), "the context is 4096"),
        (("--prompt", ""), "prompt is empty"),
        (("--prompt", "x", "--chat"), "no chat template"),
        (("--prompt", "x", "--cache-size", "1kB"), "at least that"),
    ],
)
def test_bad_request_gets_one_line(run: Run, example_fp8: Path, arguments: tuple[str, ...], expected: str) -> None:
    code, out, err = run("generate", example_fp8, *arguments)
    assert (code, out) == (1, "")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--max-new-tokens", "0", "--prompt", "x"),
        ("--temperature", "-1", "--prompt", "x"),
        ("--top-p", "0", "--prompt", "x"),
        ("--seed", str(2**63), "--prompt", "x"),
        ("--backend", "tpu", "--prompt", "x"),
        ("--prompt", "\udcff\udcfe"),  # how bytes that are no UTF-8 arrive
        ("--prompt", "x", "--stop", "\udcff"),
        ("--prompt", "x", "--stop", ""),
        ("--prompt", "x", "--cache-size", "0.5"),
        ("--prompt-file", "/no/file"),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, example_fp8: Path, arguments: tuple[str, ...]) -> None:
    assert run("generate", example_fp8, *arguments)[0] == 2


@pytest.mark.parametrize(
    ("option", "content", "expected"),
    [
        ("--messages", b"{}", r"given: holds no messages; give [{"),
        ("--messages", b'"Hi"', "given: holds no messages"),
        ("--messages", b"[" * 100_000, "given: not valid JSON: it is nested too deeply"),
        ("--messages", b"[{]", "given: not valid JSON"),
        ("--messages", b"\xff", "given: is not UTF-8 text (byte 0)"),
        ("--jsonl", b'"a"\n{"prompt": 5}', 'given: line 2: must be a text, {"prompt": …} or {"messages": …}'),
        ("--jsonl", b'"a"\n\n{"prompt": "a"', "given: line 3: not valid JSON"),
        ("--jsonl", b'"a"\nNaN', "given: line 2: not valid JSON"),
        ("--jsonl", b'{"messages": "Hi"}', "given: line 1: holds no messages"),
        ("--jsonl", b"\n \n", "given: holds no prompt"),
    ],
)
def test_files_that_hold_no_prompts(
    run: Run, example_fp8: Path, tmp_path: Path, option: str, content: bytes, expected: str
) -> None:
    (tmp_path / "given").write_bytes(content)
    code, out, err = run("generate", example_fp8, option, tmp_path / "given")
    assert (code, out) == (2, "")
    assert expected in err


def test_a_conversation_that_is_refused_names_its_file(run: Run, example_fp8: Path, tmp_path: Path) -> None:
    (tmp_path / "given").write_text('{"prompt": "a"}\n{"messages": [{"content": "no role"}]}')
    code, out, err = run("generate", example_fp8, "--jsonl", tmp_path / "given")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert f"{tmp_path / 'given'}: line 2: " in err
