"""A tokenizer that npuq does not read is said before the work, with advice that works."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import npuq
import npuq.runtime
from npuq.cli.main import main
from npuq.errors import CalibrationError, GenerationError
from npuq.runtime.text.tokenizer_check import tokenizer_problem


@pytest.fixture
def qwen(example_fp8: Path, tmp_path: Path) -> Path:
    """A checkpoint with tokenizer files as those of the first Qwen."""
    directory = Path(shutil.copytree(example_fp8, tmp_path / "qwen"))
    for path in directory.glob("tokenizer*"):
        path.unlink()
    (directory / "qwen.tiktoken").write_text("IQ== 0\nIg== 1\n")
    (directory / "tokenization_qwen.py").write_text("raise SystemExit('remote code')\n")
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    config = {"auto_map": auto_map, "tokenizer_class": "QWenTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tokenizer.json", "tiktoken.model"], None),
        (["tokenizer.model", "tokenizer_config.json"], None),  # transformers converts it
        (["vocab.json", "merges.txt", "tokenizer_config.json"], None),
        (["vocab.json", "merges.txt"], "vocab.json without the tokenizer_config.json"),
        (["tiktoken.model", "tokenization_kimi.py", "tokenizer_config.json"], None),
        (["tiktoken.model", "tokenization_kimi.py"], "tiktoken.model without the tokenizer_config.json"),
        (["qwen.tiktoken"], "qwen.tiktoken, which npuq does not read"),
        (["tokenizer_config.json", "config.json"], "no tokenizer.json; put the model's tokenizer.json"),
        ([], "no tokenizer.json"),
    ],
)
def test_what_the_names_of_files_say(names: list[str], said: str | None) -> None:
    problem = tokenizer_problem(names)
    assert problem is said is None or (problem is not None and said is not None and said in problem)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
    capsys.readouterr()
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


COMMANDS = [
    ("generate", "MODEL", "--prompt", "x"),
    ("evaluate", "MODEL", "--text", "TEXT"),
    ("convert", "MODEL", "OUT", "--method", "gptq"),
    ("convert", "MODEL", "OUT", "--method", "rotate+smooth", "--dry-run"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("missing", [False, True])
def test_every_command_that_needs_one_says_so_first(
    command: tuple[str, ...],
    missing: bool,
    qwen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if missing:
        for name in ("qwen.tiktoken", "tokenizer_config.json"):
            (qwen / name).unlink()
    (tmp_path / "text.txt").write_text("Call me Ishmael.")
    places = {"MODEL": qwen, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    for name in ("read", "read_rows", "read_bytes", "view"):
        monkeypatch.setattr(
            f"npuq.formats.checkpoint.Checkpoint.{name}", lambda *arguments: pytest.fail("a weight is read")
        )
    status, err = run(monkeypatch, capsys, *(places.get(word, word) for word in command))
    assert status == 1 and err.startswith("npuq: error: ") and err.count("\n") == 1
    assert ("has no tokenizer" if missing else "qwen.tiktoken, which npuq does not read") in err
    assert "tokenizer.json" in err and ("--method mse" in err) == (command[0] == "convert")
    assert not (tmp_path / "out").exists()


def test_so_does_the_library(qwen: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match=r"qwen\.tiktoken, which npuq does not read"):
        npuq.evaluate(qwen, "Call me Ishmael.")
    with pytest.raises(CalibrationError, match=r"qwen\.tiktoken, which npuq does not read"):
        npuq.convert_checkpoint(qwen, tmp_path / "out", method="smooth+gptq")


def test_the_advice_works(
    qwen: Path, example_fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What needs no text converts; with a tokenizer.json put there, the rest goes on."""
    for method in ("mse", "rotate+mse"):
        status, err = run(monkeypatch, capsys, "convert", qwen, tmp_path / method, "--method", method)
        assert status == 0 and "npuq generate and evaluate will not run the artifact" in err
    shutil.copyfile(example_fp8 / "tokenizer.json", qwen / "tokenizer.json")
    shutil.copyfile(example_fp8 / "tokenizer.json", tmp_path / "mse" / "tokenizer.json")
    assert run(monkeypatch, capsys, "convert", qwen, tmp_path / "gptq", "--method", "gptq", "--dry-run") == (0, "")
    status, _ = run(monkeypatch, capsys, "generate", tmp_path / "mse", "--prompt", "x", "--max-new-tokens", "1")
    assert status == 0
