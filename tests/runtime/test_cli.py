"""`npuq generate` and `npuq evaluate` from the outside: what they print, and what bad input gets."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import npuq.runtime
from npuq.cli.main import main
from npuq.errors import GenerationError
from npuq.runtime import LanguageModel, SamplingParams

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


# ---- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_the_text(run: Run, artifact: Path) -> None:
    expected = npuq.runtime.load(artifact, "cpu").generate("Call me", max_new_tokens=12, temperature=0).text
    for greedy in (("--greedy",), ("--temperature", "0")):
        code, out, err = run("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 12, *greedy)
        assert (code, out) == (0, expected + "\n")
        first, last = err.splitlines()
        assert first == "sampling: greedy"
        assert re.fullmatch(r"3 prompt tokens in \d+\.\d\d s, 12 new tokens at \d+\.\d tokens/s", last)
        quiet = run("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 12, *greedy, "--quiet")
        assert quiet == (0, expected + "\n", "")


def test_generate_samples_as_the_model_says(run: Run, artifact: Path, tmp_path: Path) -> None:
    """What generation_config.json says is in force where the user says nothing; stderr says what and why."""
    common = ("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 12)
    lines = {
        (): "sampling: temperature 0.8, top-p 0.95 (from generation_config.json)",
        (
            "--seed",
            "3",
        ): "sampling: temperature 0.8, top-p 0.95, seed 3 (temperature, top-p from generation_config.json)",
        ("--temperature", "0.5", "--top-p", "1"): "sampling: temperature 0.5",
        ("--greedy", "--repetition-penalty", "1.2"): "sampling: greedy, repetition-penalty 1.2",
    }
    for options, line in lines.items():
        assert run(*common, *options)[2].splitlines()[0] == line
    model = npuq.runtime.load(artifact, "cpu")
    assert model.default_params == SamplingParams(temperature=0.8, top_p=0.95)
    sampled = model.generate("Call me", max_new_tokens=12, seed=3).text
    assert sampled != model.generate("Call me", max_new_tokens=12, temperature=0).text
    assert run(*common, "--seed", "3", "--quiet") == (0, sampled + "\n", "")


def test_options_without_effect_are_told_or_refused(run: Run, artifact: Path) -> None:
    common = ("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 2)
    code, _, err = run(*common, "--greedy", "--top-k", "5", "--seed", "1")
    assert (code, err.splitlines()[1]) == (0, "--top-k, --seed: without effect, because sampling is greedy")
    for options, expected in (
        (("--greedy", "--temperature", "0.7"), "--greedy and --temperature"),
        (("--system", "Be brief"), "add --chat"),
        (("--chat-template-kwargs", "{}"), "add --chat"),
        (("--prompt-file", "-", "--prompt-file", "-"), "once only"),
        (("--chat", "--chat-template-kwargs", "[1]"), "not a JSON object"),
        (("--chat", "--chat-template-kwargs", '{"a": NaN}'), "not valid JSON"),
    ):
        code, out, err = run(*common, *options)
        assert (code, out) == (2, "")
        assert expected in err


def test_chat_options_reach_the_template(run: Run, artifact: Path, tmp_path: Path) -> None:
    directory = copy(artifact, tmp_path)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'Think.' if thinking else 'Answer.' }}"
    )
    given = ("--system", "Be brief", "--chat-template-kwargs", '{"thinking": true}')
    common = ("generate", directory, "--max-new-tokens", 6, "--greedy", "--quiet")
    plain = run(*common, "--prompt", "system: Be brief\nuser: Hi\nThink.")
    assert run(*common, "--chat", "--prompt", "Hi", *given) == plain
    code, out, err = run(*common, "--chat", "--prompt", "Hi", "--chat-template-kwargs", '{"messages": []}')
    assert (code, out) == (2, "")
    assert "messages cannot be given there" in err
    # A name that a Python function's first parameter has is a variable as any other.
    assert run(*common, "--chat", "--prompt", "Hi", "--chat-template-kwargs", '{"self": 1}')[0] == 0


def test_prompt_files_lose_their_last_line_end(run: Run, artifact: Path, tmp_path: Path) -> None:
    """As text editors and `echo` leave it; one of several is kept, because somebody meant it."""
    common = ("generate", artifact, "--max-new-tokens", 6, "--greedy", "--json")
    files = []
    for number, content in enumerate((b"Call me\n", b"Call me\r\n", b"Call me", b"Call me\n\n")):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(content)
        files += ["--prompt-file", path]
    results = json.loads(run(*common, *files)[1])
    plain, longer = json.loads(run(*common, "--prompt", "Call me", "--prompt", "Call me\n")[1])
    assert [each["text"] for each in results] == [plain["text"]] * 3 + [longer["text"]]
    assert [each["prompt_tokens"] for each in results] == [plain["prompt_tokens"]] * 3 + [longer["prompt_tokens"]]


def test_control_characters_do_not_reach_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from npuq.cli.generate import _shown

    text = "a\x1b[31mb\tc\nd\r"
    assert _shown(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert _shown(text) == "a\\x1b[31mb\tc\nd\\r"


def test_generate_json(run: Run, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("And God said")
    common = ("--max-new-tokens", 6, "--json", "--greedy", "--backend", "cpu")
    _, out, _ = run("generate", artifact, "--prompt", "Call me", *common)
    (one,) = json.loads(out)
    assert list(one) == [
        "schema",
        "text",
        "prompt_tokens",
        "completion_tokens",
        "finish_reason",
        "prefill_seconds",
        "decode_seconds",
    ]
    assert (one["completion_tokens"], one["finish_reason"]) == (6, "length")
    _, out, _ = run("generate", artifact, "--prompt", "Call me", "--prompt-file", tmp_path / "prompt.txt", *common)
    both = json.loads(out)
    assert both[0]["text"] == one["text"]
    assert len(both) == 2


def test_generate_takes_every_sampling_flag(run: Run, artifact: Path) -> None:
    flags = [
        "--temperature",
        "0.9",
        "--top-k",
        "50",
        "--top-p",
        "0.95",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "3",
    ]
    common = ("generate", artifact, "--prompt", "The", "--max-new-tokens", 10, "--quiet")
    first = run(*common, "--stop", "zzz", *flags)
    again = run(*common, "--stop", "zzz", *flags)
    greedy = run(*common, "--greedy")
    assert first == again
    assert first[0] == 0
    assert first[1] != greedy[1]


def test_several_prompts_are_printed_in_order(run: Run, artifact: Path) -> None:
    _, out, _ = run("generate", artifact, "--prompt", "Call me", "--prompt", "And God said", "--max-new-tokens", 3)
    assert out.index("=== 1: Call me\n") < out.index("=== 2: And God said\n")


def test_source_and_artifact_run_by_the_same_command(run: Run, example_fp8: Path) -> None:
    code, out, _ = run("generate", example_fp8, "--prompt", "Call me", "--max-new-tokens", 3)
    assert code == 0
    assert out.strip()


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / "model"))


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
        ("--seed", "-1", "--prompt", "x"),
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


def test_pipe_from_standard_input(example_fp8: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "npuq",
        "generate",
        str(example_fp8),
        "--prompt-file",
        "-",
        "--max-new-tokens",
        "2",
        "--quiet",
    ]
    done = subprocess.run(command, input="Call me", capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert done.stderr == ""


def test_runtime_does_not_import_transformers(example_fp8: Path) -> None:
    code = (
        "import sys, npuq.runtime; model = npuq.runtime.load(sys.argv[1], 'cpu');"
        "model.generate('x', max_new_tokens=1);"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(example_fp8)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- evaluate --------------------------------------------------------------------------------------------------------


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
