"""Paths that the documentation names are there: links of every page, and every path in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import click
import pytest

from npuq.cli.conversation.commands import COMMANDS
from npuq.cli.options.loading import LOADING
from npuq.cli.serve import command as serve
from npuq.models.families import FAMILIES
from npuq.serve import limits
from npuq.serve.app import ENDPOINTS
from npuq.serve.chat.request import ChatRequest
from npuq.serve.completions.request import CompletionRequest
from npuq.serve.http.protocol import MOST_CONNECTIONS, REST_BYTES, REST_SECONDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"`([A-Za-z_.][\w.-]*(?:/[\w.-]+)*/?)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_named_paths_exist(name: str) -> None:
    """What looks like a path (it has a slash, or ends in .py, .c or .h) is one."""
    named = set(_PATH.findall((ROOT / name).read_text(encoding="utf-8")))
    paths = {path for path in named if "/" in path or path.endswith((".py", ".c", ".h"))}
    assert paths
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


def test_the_page_of_models_has_every_family() -> None:
    """In both tables: what it is, and what was run."""
    text = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    families, run = text.split("## What was run, and how")
    for part in (families.split("## Families")[1].split("\n#")[0], run):
        assert re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE) == sorted(FAMILIES)


def test_the_page_of_models_has_every_source_format() -> None:
    """Each file of formats/sources/ that opening.py asks for weights."""
    tree = ast.parse((ROOT / "formats/sources/opening.py").read_text(encoding="utf-8"))
    asked = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module != "weights"
    }
    named = re.findall(r"\.\./formats/sources/(\w+)\.py", (ROOT / "docs/models.md").read_text(encoding="utf-8"))
    assert asked and set(named) == asked


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "models.md"], ids=lambda page: page.name)
def test_families_are_listed_in_one_place(page: Path) -> None:
    """Other pages name a family where they speak of it, and do not list all."""
    text = page.read_text(encoding="utf-8")
    assert any(f"`{name}`" not in text for name in FAMILIES)


def test_every_page_is_in_the_index() -> None:
    linked = _LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= set(linked)


@pytest.fixture(scope="module")
def serving() -> str:
    return (ROOT / "docs/serving.md").read_text(encoding="utf-8")


def test_the_page_of_serving_has_every_option_with_its_default(serving: str) -> None:
    """Options that other commands have too are in the pages of those."""
    shared = {*LOADING, "parallel", "quiet", "as_json"}
    rows = dict(re.findall(r"^\| `(--[a-z-]+)` ?([^|]*?) \|", _section(serving, "Options"), re.MULTILINE))
    expected = {
        option.opts[0]: str(option.default).removesuffix(".0") if option.show_default else ""
        for option in serve.params
        if isinstance(option, click.Option) and option.name not in shared
    }
    del rows["--quiet"]
    assert rows == expected


def test_the_page_of_serving_has_every_field(serving: str) -> None:
    named = set(re.findall(r"`(\w+)`", serving))
    fields = {*CompletionRequest.__struct_fields__, *ChatRequest.__struct_fields__}
    assert fields - named == set()


def test_the_page_of_serving_has_every_endpoint(serving: str) -> None:
    named = set(re.findall(r"`((?:GET|POST) [^`]*)`", _section(serving, "Endpoints")))
    assert named == {f"{method} {path.replace('{name:path}', 'NAME')}" for method, path in ENDPOINTS}


def test_the_page_of_serving_has_the_limits_of_the_code(serving: str) -> None:
    values = dict(re.findall(r"^\| ([^|]*) \| ([^|]*) \|", _section(serving, "Limits"), re.MULTILINE))
    assert values["body"] == f"`--max-body`, and {limits.BODY_SECONDS:g} s to arrive"
    assert values["prompts of a request, times `n`"] == str(limits.Limits.max_prompts)
    either = "`logprobs` of completions, `top_logprobs` of chat"
    assert values[either] == f"{limits.MOST_LOGPROBS}, {limits.MOST_TOP_LOGPROBS}"
    assert values["`stop`"] == f"{limits.MOST_STOPS} texts of {limits.MOST_STOP_CHARACTERS} characters"
    assert values["`logit_bias`"] == f"{limits.MOST_BIASES} entries"
    assert values["tools"].startswith(f"{limits.MOST_TOOLS}, ")
    slow = f"a client that takes less than {limits.SEND_BYTES >> 10} KiB, or a sixteenth, of what waits"
    assert limits.SEND_SHARE == 16
    assert values[slow] == f"{limits.SEND_SECONDS:g} s"
    assert values["the rest of a body behind its answer"] == f"{REST_BYTES >> 20} MiB, and {REST_SECONDS:g} s"
    assert values["connections"] == f"half of `ulimit -n`, {MOST_CONNECTIONS}"
    assert values["a silent stream"] == f"a comment every {limits.PING_SECONDS:g} s"
    assert f"at most {limits.MOST_RETRY_SECONDS} s" in serving


def test_the_page_of_serving_has_the_commands_of_a_conversation(serving: str) -> None:
    named = set(re.findall(r"`/(\w+)", _section(serving, "npuq chat")))
    assert named - {"v1"} == COMMANDS.keys()


def _section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]
