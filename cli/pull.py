"""`npuq pull`: an artifact comes from a hub."""

from __future__ import annotations

from pathlib import Path

import click

from .terminal.console import emit_json, format_bytes, json_option, show, work_is_done
from .terminal.progress import TerminalProgress, progress_options
from .transfer import hub_option, silence_client


@click.command()
@click.argument("repo", metavar="USER/NAME[@REVISION]")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit. [default: main]")
@click.option("--token", metavar="TOKEN", help="Instead of HF_TOKEN or the token of `hf auth login`.")
@hub_option
@progress_options
@json_option("Print the result as JSON.")
def command(
    repo: str,
    directory: Path | None,
    revision: str | None,
    token: str | None,
    which: str,
    progress: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fetch the artifact USER/NAME into the cache of the hub's client, or into DIRECTORY, and print where it is.

    Interrupted at any moment, the same command continues, also inside a file. Every file is checked against the
    manifest's hash.
    """
    from ..hub import pull

    # In the form of a MODEL argument: user/name@revision.
    repo, at, pinned = repo.partition("@")
    if at and (revision is not None or not pinned):
        raise click.UsageError(f"{repo}@{pinned}: give the revision once, behind @ or with --revision")
    revision = pinned or revision
    silence_client()
    with TerminalProgress(progress, quiet) as display:
        path = pull(repo, directory, hub=which, revision=revision, token=token, progress=display)
    if display.total and not as_json:
        display.note(f"{format_bytes(display.total)} fetched")
    with work_is_done():
        if as_json:
            emit_json({"repo": repo, "path": str(path), "fetched_bytes": display.total})
        else:
            show(path)
