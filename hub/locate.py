"""Resolution of a user's model argument to a directory: a path, or a repository that is fetched first."""

from __future__ import annotations

from pathlib import Path

from ..errors import HubError
from ..progress import Progress, Silent
from .checkpoints import CONFIG, fetch_checkpoint
from .huggingface.hub import HuggingFace
from .names import HubRepoId, parse_revision
from .pulling import BeforeWeights, fetch_artifact, find_manifest


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    before_weights: BeforeWeights = lambda directory: None,
    progress: Progress | None = None,
) -> Path:
    """Find a model's directory: `model` itself, or for `user/repo` (or `user/repo@revision`) the local copy.

    An existing path always wins. The repository may hold an artifact (checked against its manifest) or an unquantized
    checkpoint. `before_weights` as of `pull`. Raises HubError. A path that does not exist is returned unchanged: its
    reader refuses it.
    """
    named = repo_and_revision(model)
    if named is None:
        return Path(model)
    repo, pinned = named
    try:
        return _fetch(repo, pinned if revision is None else revision, token, before_weights, progress or Silent())
    except HubError as error:
        raise type(error)(f"{model}: no such directory here; on the hub: {error}") from None


def _fetch(
    repo: str, revision: str | None, token: str | None, before_weights: BeforeWeights, progress: Progress
) -> Path:
    hub = HuggingFace(repo, token)
    with hub.errors(f"fetching {repo}"):
        located = hub.locate(parse_revision(revision, hub.default_branch))
        place = located.place
        if located.unanswered is not None and place.manifest() is None and (place.directory / CONFIG).is_file():
            # Without the hub it is unknown whether there is a manifest. A checkpoint that was fetched before has none.
            return place.directory
        sealed, listing = find_manifest(located, place)
        if sealed is not None:
            return fetch_artifact(located, place, sealed, listing, progress, before_weights)
        return fetch_checkpoint(located, listing or located.repository.listing(), progress, before_weights)


def repo_and_revision(model: str | Path) -> tuple[str, str | None] | None:
    """Parse `model` as (repository, revision or None); None for an existing path, and for text of another form."""
    if Path(model).exists():
        return None
    repo, at, revision = str(model).partition("@")
    if not HubRepoId.holds(repo) or (at and not revision):
        return None
    return repo, revision or None
