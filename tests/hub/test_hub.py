"""What every hub must do alike, by the one protocol that push and pull know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub
from loopback_modelscope import LoopbackModelScope
from support import CARD, REPO, contents, files_of, npuq_run

import npuq
from npuq.choices import HUBS
from npuq.errors import HubError
from npuq.hub import hub as protocol
from npuq.hub.hub import open_hub
from npuq.hub.listing import parse_listing
from npuq.hub.names import RepoId
from npuq.progress import Task

pytestmark = pytest.mark.usefixtures("hub", "scope")


class Noted:
    """Progress that is written down."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.advanced: list[int] = []

    def start(self, task: Task, /) -> None:
        self.tasks.append(task)

    def advance(self, count: int, /, **more: Any) -> None:
        self.advanced.append(count)

    def note(self, text: str, /) -> None:
        raise AssertionError(text)


def test_every_choice_is_a_hub() -> None:
    assert set(HUBS) == set(protocol._HUBS)
    for name in HUBS:
        assert open_hub(name, REPO).repo == REPO
    for run in (lambda: npuq.pull(REPO, hub="gitlab"), lambda: open_hub("", REPO)):
        with pytest.raises(HubError, match="is not a hub that npuq knows; give one of huggingface, modelscope"):
            run()


@pytest.mark.parametrize("name", HUBS)
def test_push_then_pull_gives_the_same_files(artifact: Path, example_fp8: Path, tmp_path: Path, name: str) -> None:
    """From Python as from the command line, side files of every kind included."""
    source = tmp_path / "source"
    source.mkdir()
    beside = ("NOTICE.txt", "LICENSE", "modeling_deepseek.py", "chat_template.jinja", "tokenizer.model")
    for path, content in {**files_of(example_fp8), **{side: side.encode() for side in beside}}.items():
        (source / path).write_bytes(content)
    made = tmp_path / "made"
    npuq.convert_checkpoint(source, made, method="minmax")
    npuq.push(made, REPO, hub=name)
    done = npuq_run("pull", REPO, tmp_path / "command", "--hub", name, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    for pulled in (tmp_path / "command", npuq.pull(REPO, tmp_path / "python", hub=name)):
        assert set(files_of(pulled)) == set(files_of(made))
        assert {*beside, CARD} <= set(files_of(pulled))
        assert contents(pulled) == contents(made)
    assert contents(npuq.pull(REPO, hub=name)) == contents(made)
    again = npuq_run("push", made, REPO, "--hub", name, "--no-verify", "--quiet", "--json")
    assert '"sent_files": 0' in again.stdout, again.stderr


@pytest.mark.parametrize("name", HUBS)
def test_progress_is_one_task_that_adds_up(artifact: Path, tmp_path: Path, name: str) -> None:
    for verb, run in (
        ("push", lambda progress: npuq.push(artifact, REPO, hub=name, progress=progress)),
        ("pull", lambda progress: npuq.pull(REPO, tmp_path / "there", hub=name, progress=progress)),
    ):
        progress = Noted()
        run(progress)
        assert [(task.name, task.unit) for task in progress.tasks] == [(verb, "B")]
        assert progress.tasks[0].total == sum(progress.advanced) > 10**7


def test_long_names_are_kept_short() -> None:
    """A listing of names that no file of ours could have must not fill the memory."""
    names = ["a\n" * 10**6 + ".safetensors", "b\n"]
    listing = parse_listing(names, RepoId(REPO), lambda name, where: (name, 1, None))
    assert len(listing.files) == 0
    assert all(len(name) < 500 for name in listing.unusable)
    assert listing.unusable[0].endswith(".safetensors")


def test_importing_leaves_logging_alone() -> None:
    code = (
        "import logging, npuq.hub, npuq.hub.huggingface.hub; "
        "print(logging.getLogger('huggingface_hub._commit_api').filters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_client_does_not_warn_of_what_is_meant(
    hub: LoopbackHub, scope: LoopbackModelScope, artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    npuq.push(artifact, REPO)
    assert "Xet" not in caplog.text
