"""What npuq does with a checkpoint that has Kimi's tokenizer files: no code of it runs, and nobody is asked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import npuq
from npuq.cli.main import main
from npuq.convert import CalibrationText
from npuq.convert.calibrate.texts import read_calibration
from npuq.errors import GenerationError
from npuq.runtime.text.tokenizer import Tokenizer

from .conversations import CONVERSATIONS, SETTINGS
from .test_chat_templates import split
from .tiktoken_models import kimi_checkpoint, reference
from .tool_styles import TOOL_STYLES

TEXT = "Call me Ishmael. 中文English混合 it's 1234567 🐋 naïve\n\n" * 8
FILES = ("tiktoken.model", "tokenizer_config.json", "tokenization_kimi.py")


@pytest.fixture(scope="module")
def kimi(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory, ranks: dict[bytes, int]) -> Path:
    return kimi_checkpoint(example_fp8, tmp_path_factory.mktemp("checkpoint") / "kimi", ranks)


@pytest.fixture(scope="module")
def artifact(kimi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated on a text, which needs the tokenizer."""
    folder = tmp_path_factory.mktemp("artifact")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    text = CalibrationText(folder / "text.txt", samples=2, sequence_length=32)
    npuq.convert_checkpoint(kimi, folder / "w4a8", method="smooth", calibration=text)
    return folder / "w4a8"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is asked"))
    capsys.readouterr()
    try:
        main()
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    out, err = capsys.readouterr()
    return out, err


def test_the_artifact_has_the_tokenizers_files(kimi: Path, artifact: Path) -> None:
    assert {name: (artifact / name).read_bytes() for name in FILES} == {
        name: (kimi / name).read_bytes() for name in FILES
    }
    assert Tokenizer(artifact).encode(TEXT) == reference(kimi).encode(TEXT)


def test_calibration_reads_the_texts_tokens(kimi: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    expected = reference(kimi).encode(TEXT)
    found = read_calibration(tmp_path / "text.txt", kimi, 4096, 4096, samples=1, sequence_length=32)
    assert found.tokens.tolist() == [[3840, *expected[:31]]]  # [BOS] first


def test_calibration_on_chats(kimi: Path, tmp_path: Path) -> None:
    """Each turn's markers are tokens, and the template's text is in between."""
    messages = [{"role": "user", "content": "Thar she blows! " * 8}, {"role": "assistant", "content": "Aye."}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    found = read_calibration(tmp_path / "chats.jsonl", kimi, 4096, 4096, samples=1, sequence_length=24)
    assert found.tokens[0, :2].tolist() == [3840, 3850]  # [BOS], <|im_system|>


def test_a_dry_run_says_nothing_against_it(
    kimi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = run(monkeypatch, capsys, "convert", kimi, tmp_path / "out", "--method", "gptq", "--dry-run")
    assert "tokenizer" not in out + err


@pytest.mark.parametrize("missing", ["tokenizer_config.json", "tiktoken.model"])
def test_a_conversion_says_what_is_missing(
    missing: str,
    kimi: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = Path(shutil.copytree(kimi, tmp_path / "kimi"))
    (directory / missing).unlink()
    out, err = run(monkeypatch, capsys, "convert", directory, tmp_path / "out", "--method", "mse", "--dry-run")
    expected = {
        "tokenizer_config.json": "it has tiktoken.model without the tokenizer_config.json that says how it is read",
        "tiktoken.model": "it has no tokenizer.json; put the model's tokenizer.json and tokenizer_config.json there",
    }
    said = f"npuq generate and evaluate will not run the artifact as it will be: {expected[missing]}"
    assert said in " ".join((out + err).split())


@pytest.mark.parametrize("quantized", [False, True])
def test_generate(
    quantized: bool, kimi: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = artifact if quantized else kimi
    ids = reference(kimi).encode("Call me 鯨 🐋")
    expected = npuq.load(model).generate(ids, max_new_tokens=12, temperature=0)
    out, _ = run(
        monkeypatch, capsys, "generate", model, "--greedy", "--prompt", "Call me 鯨 🐋", "--max-new-tokens", 12
    )
    assert expected.text.strip() and expected.text in out


def test_a_conversation(
    kimi: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kimi's turns: each marker is one token, and the answer ends where the model says <|im_end|>."""
    rendered = (
        "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
        "<|im_user|>user<|im_middle|>Whale? 鯨<|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    tokenizer = Tokenizer(artifact)
    assert tokenizer.render_chat("Whale? 鯨") == rendered
    ids = tokenizer.chat("Whale? 鯨")
    assert ids == reference(kimi).encode(rendered, allowed_special="all")
    assert tokenizer.decode(ids) == "systemYou are a helpful assistantuserWhale? 鯨assistant"
    assert tokenizer.split_stops(["<|im_end|>", "x"]) == (("x",), frozenset({3842}))
    expected = npuq.load(artifact).generate(ids, max_new_tokens=8, temperature=0)
    out, _ = run(
        monkeypatch, capsys, "generate", artifact, "--greedy", "--chat", "--prompt", "Whale? 鯨", "--max-new-tokens", 8
    )
    assert expected.text in out


def test_evaluate(
    kimi: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    out, _ = run(monkeypatch, capsys, "evaluate", artifact, "--source", kimi, "--text", tmp_path / "text.txt", "--json")
    assert json.loads(out)["tokens"] == len(reference(kimi).encode(TEXT))


def sorted_deeply(value: Any) -> Any:
    """As `deep_sort_dict` of tokenization_kimi.py."""
    if isinstance(value, dict):
        return {key: sorted_deeply(item) for key, item in sorted(value.items())}
    return [sorted_deeply(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_kimis_template_in_a_file(name: str, kimi_files: Path, tmp_path: Path) -> None:
    """A chat_template.jinja beside the tokenizer: transformers' text, and tiktoken's ids of it."""
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    directory = Path(shutil.copytree(kimi_files, tmp_path / "kimi"))
    (directory / "chat_template.jinja").write_text(TOOL_STYLES["kimi-k2"], encoding="utf-8")
    tokenizer, models_own = Tokenizer(directory), reference(directory)
    for values in SETTINGS.values():
        options = {"add_generation_prompt": True, **values}
        theirs = {key: sorted_deeply(value) if key == "tools" else value for key, value in options.items()}
        names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
        arguments = {"conversations": [CONVERSATIONS[name]], "chat_template": TOOL_STYLES["kimi-k2"]}
        try:
            ((expected,), _) = utilities.render_jinja_template(**arguments, **{**names, **theirs})
        except Exception:
            with pytest.raises(GenerationError):
                tokenizer.render_chat(CONVERSATIONS[name], **split(options))
            continue
        assert tokenizer.render_chat(CONVERSATIONS[name], **split(options)) == expected
        ids = tokenizer.chat(CONVERSATIONS[name], **split(options))
        assert ids == models_own.encode(expected, allowed_special="all")


TOOLS = [{"type": "function", "function": {"name": "sail", "parameters": {"b": [{"z": 1, "a": None}], "a": "鯨"}}}]


def test_tools_come_with_their_keys_in_order(kimi: Path) -> None:
    """As `deep_sort_dict` of tokenization_kimi.py has them."""
    tokenizer = Tokenizer(kimi)
    rendered = tokenizer.render_chat("x", tools=TOOLS, chat_template="{{ tools|tojson(separators=(',', ':')) }}")
    assert rendered == json.dumps(TOOLS, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert list(TOOLS[0]) == ["type", "function"]


def test_a_text_that_only_the_models_code_makes_of_tools(kimi: Path) -> None:
    """Kimi-K2.5's template has the tools as declarations of TypeScript."""
    tokenizer = Tokenizer(kimi)
    template = (
        "{% if tools %}{% if tools_ts_str %}{{ tools_ts_str }}{% else %}{{ tools|tojson }}{% endif %}{% endif %}x"
    )
    assert tokenizer.render_chat("x", chat_template=template) == "x"
    with pytest.raises(GenerationError, match=r"reads tools_ts_str.*give it in chat_template_kwargs"):
        tokenizer.render_chat("x", tools=TOOLS, chat_template=template)
    given = {"tools_ts_str": "type sail = () => any;"}
    assert tokenizer.render_chat("x", tools=TOOLS, chat_template=template, chat_template_kwargs=given) == (
        "type sail = () => any;x"
    )
