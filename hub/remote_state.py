"""The state of a repository that npuq pushed to: the artifact's files, and those of an unfinished push."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final

from ..errors import HubError
from ..formats.artifact import DESCRIPTION_NAME, OWN_FOLDER
from ..inputs.names import FileName
from .hub import Repository
from .listing import Listing
from .manifest import MANIFEST, MOST_MANIFEST_BYTES, listed_names
from .transfer.download import read_whole

# In the repository from the first commit of a push to its last: it marks an unfinished push. It lists the files of the
# artifact before, so that the last commit can remove the stale ones.
UNFINISHED: Final = FileName(f"{OWN_FOLDER}/unfinished.json")


def previous_files(repository: Repository, listing: Listing) -> frozenset[FileName]:
    """The files of earlier pushes: the manifest's, or those of an unfinished push."""
    names: set[FileName] = set()
    for source, key in ((MANIFEST, "files"), (UNFINISHED, "replaces")):
        if source in listing.files:
            content = read_whole(repository, source, listing.files[source], MOST_MANIFEST_BYTES)
            names |= {source, *listed_names(content, key)}
    return frozenset(names & listing.files.keys())


def unfinished_note(names: Iterable[FileName]) -> bytes:
    """The content of npuq/unfinished.json: `names` are all files that the push leaves or must remove."""
    replaces = sorted({*names} - {UNFINISHED})
    return json.dumps({"unfinished_push": True, "replaces": replaces}, indent=1).encode() + b"\n"


def refuse_strays(repo: str, listing: Listing, ours: Iterable[str]) -> None:
    """Raise HubError when the repository has weights outside the artifact: engines would load them too."""
    known = set(ours)
    for name in (*sorted(listing.files), *listing.unusable):
        in_root = "/" not in name
        if in_root and name not in known and (name.endswith((".safetensors", DESCRIPTION_NAME))):
            raise HubError(
                f"{repo} holds {name}, which is not part of this artifact, and engines load every such file; "
                "push to another repository, or delete it there first"
            )
