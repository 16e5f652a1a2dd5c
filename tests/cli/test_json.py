"""What --json prints: one document with a schema number, one vocabulary, an error too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import warm
from json_schemas import FOLDER, NAMES, check, check_output

from npuq.cli.main import COMMANDS, group
from npuq.cli.terminal.console import JSON_SCHEMA

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-deepseek-v3-fp8"
DOCS = Path(__file__).parents[2] / "docs/json.md"


def npuq(*arguments: object) -> tuple[int, Any, str]:
    """(exit status, the document on stdout, which has the form of its schema, stderr)."""
    done = warm.run(*map(str, arguments))
    document = json.loads(done.stdout)
    check_output(str(arguments[0]), document)
    return done.returncode, document, done.stderr


def keys(value: Any) -> set[str]:
    """Every key of a document, at any depth."""
    if isinstance(value, dict):
        return set(value).union(*map(keys, value.values()))
    return set().union(*map(keys, value)) if isinstance(value, list) else set()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("json") / "artifact"
    status, summary, _ = npuq("convert", EXAMPLE, output, "--method", "minmax", "--quiet", "--json")
    assert status == 0 and summary["status"] == "converted" and summary["output_state"] == "new"
    return output


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report is written into the working directory."""
    monkeypatch.chdir(tmp_path)


def test_every_command_that_reports_takes_json() -> None:
    context = click.Context(group)
    for name in COMMANDS:
        command = group.get_command(context, name)
        assert command is not None
        assert any(isinstance(option, click.Option) and "--json" in option.opts for option in command.params), name


@pytest.mark.parametrize(
    "command",
    [
        ("inspect",),
        ("verify", "--quiet"),
        ("report", "--quiet"),
        ("doctor",),
        ("generate", "--prompt", "a", "--max-new-tokens", "1"),
    ],
    ids=lambda command: command[0],
)
def test_documents_have_a_schema_number_and_one_vocabulary(artifact: Path, command: tuple[str, ...]) -> None:
    _, document, _ = npuq(command[0], artifact, *command[1:], "--json")
    parts = document if command[0] == "generate" else [document]
    assert isinstance(parts, list) and parts and all(part["schema"] == JSON_SCHEMA for part in parts)
    assert not {"nbytes", "bytes"} & keys(document)


def test_a_plan_has_the_form_of_its_schema(artifact: Path) -> None:
    _, document, _ = npuq("doctor", "--plan", artifact, "--json")
    assert document["layouts"] and document["recommended"]


def test_states_are_words(artifact: Path) -> None:
    _, document, _ = npuq("convert", EXAMPLE, artifact, "--method", "minmax", "--dry-run", "--json")
    assert (document["status"], document["output_state"], document["refusal"]) == ("planned", "finished", None)
    status, document, _ = npuq("convert", EXAMPLE, artifact, "--method", "mse", "--dry-run", "--json")
    assert status == 1 and document["output_state"] == "refused" and document["refusal"]
    _, document, _ = npuq("inspect", EXAMPLE, "--json")
    assert document["kind"] == "checkpoint"


@pytest.mark.parametrize(
    ("arguments", "status", "kind"),
    [
        (("inspect", "no/such/directory/at/all", "--json"), 1, "CheckpointError"),
        (("generate", EXAMPLE, "--json"), 2, "UsageError"),
        (("verify", EXAMPLE, "--json", "--no-such-option"), 2, "NoSuchOption"),
    ],
    ids=["bad input", "wrong usage", "no option"],
)
def test_an_error_is_a_document(arguments: tuple[object, ...], status: int, kind: str) -> None:
    code, document, stderr = npuq(*arguments)
    assert code == status and set(document) == {"schema", "error"} and document["schema"] == JSON_SCHEMA
    error = document["error"]
    assert error["type"] == kind and error["exit_code"] == status
    assert error["message"].isprintable() and error["message"] in stderr


def test_without_json_an_error_prints_nothing_on_stdout() -> None:
    done = warm.run("inspect", "no/such/directory/at/all")
    assert done.returncode == 1 and done.stdout == ""


def test_the_docs_name_the_schema_and_every_key() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert f"`schema` is {JSON_SCHEMA}" in text
    told = set(re.findall(r"`([a-z0-9_]+)`", text))
    for name in NAMES:
        schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert re.search(
            rf"^\| \[`{name.replace('-plan', ' --plan')}`\]\(schemas/{name}\.json\) \|", text, re.MULTILINE
        ), name
        top = schema["items"] if schema["type"] == "array" else schema
        assert top["properties"]["schema"] == {"const": JSON_SCHEMA}
        of_lists = [top["properties"][key]["items"] for key in ("roles", "errors", "turns") if key in top["properties"]]
        for part in (top, *of_lists):
            assert set(part["properties"]) - {"schema"} <= told, (name, set(part["properties"]) - told)
    from npuq.runtime.diagnostics.doctor import Device  # no test machine has one

    doctor = json.loads((FOLDER / "doctor.json").read_text(encoding="utf-8"))["properties"]
    assert set(Device.__dataclass_fields__) == set(doctor["devices"]["items"]["properties"]) <= told


def test_every_command_has_a_schema() -> None:
    assert {*COMMANDS, "doctor-plan", "error"} == set(NAMES)


def test_a_document_with_a_key_too_many_or_too_few_is_told() -> None:
    error = {"type": "X", "message": "x", "exit_code": 1}
    check("error", {"schema": JSON_SCHEMA, "error": error})
    for wrong in (
        {"schema": 1, "error": error},
        {"schema": JSON_SCHEMA, "error": {**error, "more": 1}},
        {"schema": JSON_SCHEMA},
    ):
        with pytest.raises(AssertionError):
            check("error", wrong)


def test_sizes_are_named_as_such(artifact: Path) -> None:
    """Every key that speaks of bytes ends so; layers, experts and recipe are called alike wherever they occur."""
    documents = [
        npuq(*arguments, "--json")[1]
        for arguments in (
            ("convert", EXAMPLE, artifact, "--method", "minmax", "--dry-run"),
            ("inspect", artifact),
            ("report", artifact),
        )
    ]
    for document in documents:
        assert all(key.endswith("_bytes") for key in keys(document) if re.search("bytes|memory|disk", key))
    inspected, reported = documents[1:]
    for key in ("model_type", "layers", "experts", "recipe"):
        assert reported[key] == inspected[key], key
