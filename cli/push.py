"""`npuq push`: an artifact goes to a hub."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import ArtifactError
from .terminal.console import emit_json, format_bytes, json_option, show, work_is_done
from .terminal.progress import TerminalProgress, progress_options
from .transfer import hub_option, silence_client

if TYPE_CHECKING:
    from ..hub import PushSummary
    from ..progress import Progress


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("repo", metavar="USER/NAME")
@click.option("--private/--public", default=None, help="Of a repository that is made now. [default: the hub's]")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, made when it is not there. [default: main]")
@click.option("--message", help="Title of the commits, or of the pull request.")
@click.option("--base-model", metavar="OWNER/NAME", help="Name of the source on the hub, for the model card.")
@click.option("--create-pr", is_flag=True, help="Open a pull request, or go on with yours of the same title.")
@click.option("--tag", metavar="NAME", help="Tag the result.")
@click.option("--token", metavar="TOKEN", help="Instead of HF_TOKEN or the token of `hf auth login`.")
@click.option("--no-verify", is_flag=True, help="Do not check the artifact before it is sent.")
@hub_option
@progress_options
@json_option("Print the summary as JSON.")
def command(
    artifact: Path,
    repo: str,
    private: bool | None,
    revision: str | None,
    message: str | None,
    base_model: str | None,
    create_pr: bool,
    tag: str | None,
    token: str | None,
    no_verify: bool,
    which: str,
    progress: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Push ARTIFACT to the repository USER/NAME of the Hugging Face hub, or of ModelScope.

    Interrupted at any moment, the same command continues; only content missing on the hub is sent. Until the last
    commit the repository says that it is unfinished.
    """
    from ..hub import push

    silence_client()
    with TerminalProgress(progress, quiet) as display:
        summary = push(
            artifact,
            repo,
            hub=which,
            private=private,
            revision=revision,
            message=message,
            base_model=base_model,
            create_pr=create_pr,
            tag=tag,
            token=token,
            verify=None if no_verify else partial(verified, progress=display),
            progress=display,
        )
    with work_is_done():
        _print(summary, as_json)


def _print(summary: PushSummary, as_json: bool) -> None:
    if as_json:
        emit_json(summary.as_dict())
        return
    # ModelScope's client does not report it.
    commit = f", commit {summary.commit[:12]}" if summary.commit else ""
    if summary.sent_files:
        sent = f"{summary.sent_files} of {summary.files} files, {format_bytes(summary.sent_bytes)}"
        show(f"{summary.pull_request or summary.url}: {sent}{commit}")
    else:
        show(f"{summary.url}: has all of it already{commit}")


def verified(artifact: Path, progress: Progress | None = None) -> None:
    """Raise ArtifactError unless `npuq verify` finds no problem. `progress` counts the bytes read."""
    from ..verification import verify

    problems = verify(artifact, progress=progress).problems
    if problems:
        more = f" (and {len(problems) - 1} more; see `npuq verify {artifact}`)" if len(problems) > 1 else ""
        raise ArtifactError(f"{artifact}: not pushed, verification failed: {problems[0]}{more}")
