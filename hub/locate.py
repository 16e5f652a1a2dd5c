"""From what a user writes as a model to a directory: a path, or a repository that is fetched first."""

from __future__ import annotations

from pathlib import Path

from ..errors import HubError
from .names import HubRepoId
from .progress import TransferProgress
from .pulling import BeforeWeights, pull


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    before_weights: BeforeWeights = lambda directory: None,
    progress: TransferProgress | None = None,
) -> Path:
    """The directory of a model: `model` itself, or for `user/repo` (or `user/repo@revision`) the local copy.

    Whatever exists here is a path. The repository may hold an artifact (whose files are checked against its manifest)
    or an unquantized checkpoint. `before_weights` as of `pull`. Raises HubError; a path that does not exist is returned
    as it is, for whoever opens it to refuse.
    """
    named = repo_and_revision(model)
    if named is None:
        return Path(model)
    repo, pinned = named
    try:
        return pull(
            repo,
            revision=pinned if revision is None else revision,
            token=token,
            before_weights=before_weights,
            progress=progress,
            artifact_only=False,
        )
    except HubError as error:
        raise type(error)(f"{model}: no such directory here; on the hub: {error}") from None


def repo_and_revision(model: str | Path) -> tuple[str, str | None] | None:
    """What `model` names on a hub, when it names nothing here: (repository, revision or None)."""
    if Path(model).exists():
        return None
    repo, at, revision = str(model).partition("@")
    if not HubRepoId.holds(repo) or (at and not revision):
        return None
    return repo, revision or None
