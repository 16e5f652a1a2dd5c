"""`npuq generate` from the outside: what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from json_schemas import check

import npuq.runtime
from npuq.runtime import SamplingParams

from .rig import Run, copy


def test_generate_prints_the_text(run: Run, artifact: Path) -> None:
    expected = npuq.runtime.load(artifact, "cpu").generate("Call me", max_new_tokens=12, temperature=0).text
    for greedy in (("--greedy",), ("--temperature", "0")):
        code, out, err = run("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 12, *greedy)
        assert (code, out) == (0, expected + "\n")
        how, first, last = err.splitlines()
        assert how == "prompt: as it is"  # the example has no chat template
        assert first == "sampling: greedy"
        assert re.fullmatch(r"3 prompt tokens in \d+\.\d\d s, 12 new tokens at \d+\.\d tokens/s", last)
        quiet = run("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 12, *greedy, "--quiet")
        assert quiet == (0, expected + "\n", "")


def test_a_directory_that_is_not_there_is_called_that(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    assert run("generate", missing, "--prompt", "Call me") == (1, "", f"npuq: error: {missing}: no such directory\n")


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
        assert run(*common, *options)[2].splitlines()[1] == line
    model = npuq.runtime.load(artifact, "cpu")
    assert model.default_params == SamplingParams(temperature=0.8, top_p=0.95)
    sampled = model.generate("Call me", max_new_tokens=12, seed=3).text
    assert sampled != model.generate("Call me", max_new_tokens=12, temperature=0).text
    assert run(*common, "--seed", "3", "--quiet") == (0, sampled + "\n", "")


def test_options_without_effect_are_told_or_refused(run: Run, artifact: Path) -> None:
    common = ("generate", artifact, "--prompt", "Call me", "--max-new-tokens", 2)
    code, _, err = run(*common, "--greedy", "--top-k", "5", "--seed", "1")
    assert (code, err.splitlines()[2]) == (0, "--top-k, --seed: without effect, because sampling is greedy")
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


def test_conversations_and_prompts_from_files(run: Run, artifact: Path, tmp_path: Path) -> None:
    """A conversation is rendered without --chat, a prompt is not; stderr says which it was."""
    directory = copy(artifact, tmp_path)
    (directory / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    for name, content in (("list", messages), ("object", {"messages": messages})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    lines = ['"Call me"', "", '{"prompt": "And\\nGod"}', json.dumps({"messages": messages}) + "\r"]
    (tmp_path / "all.jsonl").write_bytes("\n".join(lines).encode())
    common = ("generate", directory, "--max-new-tokens", 4, "--greedy", "--json")

    def results(*arguments: object) -> tuple[list[dict[str, object]], str]:
        code, out, err = run(*common, *arguments)
        assert code == 0, err
        return [{name: each[name] for name in ("text", "prompt_tokens")} for each in json.loads(out)], err

    rendered, err = results("--prompt", "user: Hi\nassistant: Yes?\n")
    assert "prompt: as it is (--chat puts it into the model's chat template)\n" in err
    for name in ("list", "object"):
        found, err = results("--messages", tmp_path / f"{name}.json")
        assert found == rendered
        assert "prompt: in the model's chat template\n" in err
    plain, err = results("--prompt", "Call me", "--prompt", "And\nGod")
    assert "prompt: as they are (" in err
    found, err = results("--jsonl", tmp_path / "all.jsonl")
    assert found == [*plain, *rendered]
    assert "prompts: 1 in the model's chat template, 2 as they are\n" in err
    with_system, _ = results("--prompt", "system: Be brief\nuser: Hi\nassistant: Yes?\n")
    assert results("--messages", tmp_path / "list.json", "--system", "Be brief")[0] == with_system
    _, out, _ = run(*common[:-1], "--jsonl", tmp_path / "all.jsonl")
    assert out.index("=== 2: And God\n") < out.index("=== 3: Yes?\n")


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
        "--presence-penalty",
        "0.5",
        "--frequency-penalty",
        "-0.2",
        "--min-tokens",
        "4",
        "--seed",
        "-3",
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


def test_reasoning_is_apart_from_the_answer(run: Run, artifact: Path, tmp_path: Path) -> None:
    """stdout has the answer alone. The example does not think: its template writes the beginning of what it says."""
    model = copy(artifact, tmp_path)
    common = ("generate", model, "--prompt", "Why?", "--max-new-tokens", 8, "--greedy")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}<think>", encoding="utf-8")
    code, out, err = run(*common, "--chat")
    assert (code, out) == (0, "\n")
    document = json.loads(run(*common, "--chat", "--json", "--quiet")[1])
    check("generate", document)
    (shown,) = document
    assert shown["text"] == "" and shown["reasoning_tokens"] == 8 and shown["reasoning"]
    assert shown["reasoning"] in err and run(*common, "--chat", "--quiet") == (0, "\n", "")
    # A text is continued as it is, and so is the answer behind the end of reasoning.
    assert "reasoning" not in json.loads(run(*common, "--json", "--quiet")[1])[0]
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}<think></think>", encoding="utf-8")
    assert len(run(*common, "--chat", "--quiet")[1].strip()) > 4
