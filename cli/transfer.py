"""Common parts of commands that use a hub: models that may be repositories, and a silent client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from ..choices import HUBS
from ..errors import CheckpointError, HubError
from .terminal.console import format_bytes
from .terminal.progress import TerminalProgress

if TYPE_CHECKING:
    from ..formats.checkpoint import Checkpoint
    from ..hub import ShardPusher


hub_option: Final = click.option(
    "--hub",
    "which",
    type=click.Choice(HUBS),
    default="huggingface",
    show_default=True,
    help="The hub that has the repository, or gets it.",
)


def local_model(
    model: str | Path,
    *,
    quiet: bool,
    progress: str = "auto",
    before_weights: Callable[[Path], object] = lambda directory: None,
) -> Path:
    """The directory of a MODEL argument; `user/repo` is fetched from the hub first, with progress of that form.

    `before_weights` raises an error for an unsuitable model; for a repository it is called before its weights are
    fetched.
    """
    if Path(model).exists():
        before_weights(Path(model))
        return Path(model)
    from ..hub import resolve

    silence_client()
    with TerminalProgress(progress, quiet) as display:
        path = resolve(model, before_weights=before_weights, progress=display)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    before_weights(path)
    if display.total:
        display.note(f"{model}: {format_bytes(display.total)} fetched to {path}")
    return path


def open_source(source: str, output: str, revision: str | None, window_bytes: int | None) -> Path | Checkpoint:
    """The source of a SOURCE argument: a directory, or an open checkpoint on the hub, to be read from there."""
    named = None
    if not Path(source).exists():
        from ..hub.locate import repo_and_revision

        named = repo_and_revision(source)
    if named is None:
        if revision is not None:
            raise click.UsageError("--revision is for a repository on the hub; SOURCE is a directory")
        if window_bytes is not None:
            raise click.UsageError("--download-window is for a repository on the hub; SOURCE is a directory")
        return Path(source)
    from ..formats.artifact import OWN_FOLDER
    from ..hub import open_remote
    from ..hub.remote import DEFAULT_WINDOW

    silence_client()
    repo, pinned = named
    # Beside the output shards: on the same disk, and removed with the output directory.
    folder = Path(output) / OWN_FOLDER / "download"
    try:
        window_bytes = window_bytes or DEFAULT_WINDOW
        return open_remote(repo, folder, revision=revision or pinned, window_bytes=window_bytes)
    except HubError as error:
        raise type(error)(f"{source}: no such directory here; on the hub: {error}") from None


def open_pusher(output: str, repo: str, note: Callable[[str], None]) -> ShardPusher:
    """Open a push of an artifact during its conversion. Raises HubError, before the work begins."""
    from ..hub import ShardPusher

    silence_client()
    return ShardPusher(output, repo, note=note)


def silence_client() -> None:
    """Silence huggingface_hub, which would draw a bar for each file, and warn of each retry."""
    import logging

    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
