"""The command line as a whole: instant help, and errors in one line with the right exit status."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
import torch
import warm

import npuq.cli
from npuq import __version__
from npuq.cli.main import COMMANDS, LazyGroup, group, main
from npuq.cli.main import _set_up_warnings as set_up_warnings
from npuq.cli.terminal.console import format_bytes, parse_size
from npuq.errors import ArtifactError, NpuqWarning

PROBE = """
import sys
from npuq.cli.main import main
try:
    main()
finally:
    print("LOADED", sorted({"torch", "numpy", "transformers", "safetensors"} & set(sys.modules)), file=sys.stderr)
"""


def npuq_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return warm.run(*arguments)


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.strip() == "LOADED []"
    for name in COMMANDS:
        assert f"  {name}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, name, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.strip() == "LOADED []"
    assert "Usage: npuq" in done.stdout


def test_every_command_is_found_and_has_help() -> None:
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert command.help


def test_choices_are_those_that_there_are() -> None:
    """choices.py repeats what slow modules know, so that --help need not import them."""
    from npuq.choices import COMPUTE_DTYPES, ENGINES
    from npuq.engines import parameters, placement
    from npuq.quant.scales import Method
    from npuq.recipes.reading import parse_chain

    tables = [
        set(value)
        for module in (parameters, placement)
        for value in vars(module).values()
        if isinstance(value, dict) and "sglang" in value
    ]
    assert tables and all(table == set(ENGINES) for table in tables)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in COMPUTE_DTYPES)
    convert = group.get_command(click.Context(group), "convert")
    assert convert is not None
    (method,) = [option for option in convert.params if option.name == "method"]
    assert isinstance(method, click.Option) and method.help is not None
    for name in (*(each.value for each in Method), "rotate", "smooth", "auto", "rotate+smooth+gptq"):
        parse_chain(name, "--method")
        assert re.search(rf"\b{re.escape(name)}\b", method.help), name


def test_version() -> None:
    started = subprocess.run([sys.executable, "-m", "npuq", "--version"], capture_output=True, text=True, timeout=120)
    assert __version__ in started.stdout and started.stdout == npuq_command("--version").stdout


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (
        ["convrt"],
        ["convert"],
        ["convert", "a", "b", "--max-memory", "lots"],
        ["verify", "a", "--nope"],
    ):
        done = npuq_command(*arguments)
        assert done.returncode == 2, arguments
        assert "Error: " in done.stderr
        assert "Traceback" not in done.stderr


def test_bad_input_is_one_line_and_exits_with_1(tmp_path: Path) -> None:
    done = npuq_command("convert", str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("npuq: error: ")
    assert "nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_reader_that_goes_away_is_no_traceback(example_fp8: Path) -> None:
    done = warm.shell(f"npuq inspect {example_fp8} --json | head -c 10")
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("{")


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("2e9", 2 * 10**9), ("512m", 512 * 10**6)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1", "1PB", "0", "0.5", "five", "1e99"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


def test_formatting_bytes() -> None:
    values = (0, 999, 1000, 12_345_678, 999_600, 10**13)
    assert [format_bytes(value) for value in values] == ["0 B", "999 B", "1 kB", "12.3 MB", "1 MB", "10 TB"]


def test_json_is_the_only_thing_on_stdout(example_fp8: Path) -> None:
    done = npuq_command("inspect", str(example_fp8), "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["generate", "--prompt", "a"]])
def test_what_the_system_refuses_is_one_line(command: list[str]) -> None:
    done = npuq_command(command[0], "x" * 300, *command[1:])
    assert done.returncode == 1
    assert done.stderr.startswith("npuq: error: xxx") and done.stderr.count("\n") == 1


def ended_by(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str):
    """(exit code, stderr) of a command that ends with an error."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(LazyGroup, "invoke", fail)
    monkeypatch.setattr(sys, "argv", ["npuq", *options, "inspect", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, capsys.readouterr().err


def test_a_connection_that_breaks_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """click takes every broken pipe for that of stdout, of which there is nothing to say."""

    def fail(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(click.Group, "invoke", fail)
    monkeypatch.setattr(sys, "argv", ["npuq", "inspect", "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (1, "npuq: error: [Errno 32] Broken pipe\n")


class PanicError(BaseException):
    """As what pyo3 makes of a panic in Rust."""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyError("x"), 70, "internal error: KeyError: 'x'; please report it"),
        (RecursionError("too deep"), 70, "internal error: RecursionError: too deep; please report it"),
        (PanicError("called `unwrap()`\non a `None` value"), 70, "PanicError: called `unwrap()` on a `None` value;"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 1, "out of mem"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), 1, "CUDA out of memory\n"),
        (RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB (NPU 0; …"), 1, "NPU out of memory\n"),
        (OSError(28, "No space left on device", "/x"), 1, "/x: No space left on device"),
        (ArtifactError("a\x1b[2J\x9b\u202e: is\nnothing"), 1, "npuq: error: a\\x1b[2J\\x9b\\u202e: is nothing\n"),
        (KeyboardInterrupt(), 130, "npuq: error: interrupted\n"),
    ],
)
def test_whatever_ends_a_command_is_one_line(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, err = ended_by(error, monkeypatch, capsys)
    assert found == code
    err = err.lstrip("\n")  # click leaves the line of an interruption
    assert told in err and err.startswith("npuq: error: ") and err.count("\n") == 1
    assert "Traceback" not in err and err[:-1].isprintable()


@pytest.mark.parametrize(("command", "told"), [("convert", "; lower --max-memory or --workers"), ("inspect", "")])
def test_memory_is_lowered_where_it_can_be(command: str, told: str, tmp_path: Path) -> None:
    code = (
        "import npuq.convert, npuq.verification, npuq.cli.main\n"
        "def fail(*_, **__): raise MemoryError\n"
        "npuq.verification.inspect = npuq.convert.convert_checkpoint = fail\n"
        "npuq.cli.main.main()"
    )
    paths = [str(tmp_path), str(tmp_path / "out")][: 2 if command == "convert" else 1]
    done = subprocess.run([sys.executable, "-c", code, command, *paths], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"npuq: error: out of memory{told}\n")


def test_a_message_is_no_book(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, err = ended_by(ArtifactError(f"begin {'x' * 10**6} end"), monkeypatch, capsys)
    assert len(err) < 2100 and err.startswith("npuq: error: begin x") and err.endswith("x end\n")


@pytest.mark.parametrize("error", [KeyError("\x1b[2J"), ArtifactError("bad")])
def test_a_traceback_for_who_asks(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = ended_by(error, monkeypatch, capsys, "--traceback")
    assert err.startswith("Traceback") and "in fail" in err and "\x1b" not in err
    assert err.splitlines()[-1].startswith("npuq: error: ")


@pytest.mark.parametrize("encoding", ["latin-1", "gbk"])  # for ASCII click takes UTF-8
def test_characters_that_the_encoding_lacks_are_escapes(encoding: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    name = os.fsencode(tmp_path) + b"/\xe6\xa8\xa1\xc3\xa9\xff\xf0\x9f\x98\x80"
    done = warm.run("verify", name, text=False, env=environment)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr and done.stderr.count(b"\n") == 1
    assert b"\\udcff\\U0001f600: no such directory" in done.stderr


@pytest.mark.parametrize("path", sorted(Path(npuq.cli.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_what_commands_print_goes_through_the_console(path: Path) -> None:
    """`show`, `say` and `emit_json` alone write: they know what a terminal must not be told."""
    allowed = {
        "console": 4,  # `write` and `_to_stderr`, and those that call `write`
        "log": 1,  # to a file, made printable there
        "main": 1,  # the version
        "generate": 3,  # completions, which are made printable for a terminal there
        "screen": 1,  # answers, which are made printable there
        "transcript": 1,  # a conversation's file
        "progress": 1,  # JSON lines, in ASCII
    }
    found = re.findall(r"click\.s?echo\(|\bprint\(|(?<!def )\bwrite\(", path.read_text())
    assert len(found) == allowed.get(path.stem, 0)


def test_names_from_a_checkpoint_do_not_command_the_terminal(example_fp8: Path, tmp_path: Path) -> None:
    source = tmp_path / "a\x1b[31m\u202eb"
    shutil.copytree(example_fp8, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["\x1b]0;x\x07\x9b2J\u202e"]}))
    for arguments in (["convert", source, tmp_path / "out"], ["inspect", tmp_path / "out"], ["verify", source]):
        for option in ([], ["--json"]):
            done = npuq_command(*map(str, arguments), *option)
            assert not set("\x1b\x07\x9b\u202e") & set(done.stdout + done.stderr), (arguments, option)
    assert "a\\x1b[31m\\u202eb" in npuq_command("inspect", str(tmp_path / "out")).stdout


def test_a_warning_of_npuqs_own_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    set_up_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("the decode step\nruns eagerly", NpuqWarning, stacklevel=1)
    assert capsys.readouterr().err == "npuq: the decode step runs eagerly\n"
