"""What a repository holds at a revision, and which of an artifact's files differ from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from ..errors import HubError
from ..quant.artifact import DESCRIPTION_NAME, MANIFEST_NAME, OWN_FOLDER
from .client import Hub
from .download import file_url

# In the repository from the first commit of a push to its last: whoever finds it looks at an unfinished push. It lists
# the files of the artifact that was there before, so that the last commit can remove those that no longer belong.
UNFINISHED_NAME = f"{OWN_FOLDER}/unfinished.json"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: LFS files have their content's sha256, others git's sha1 of it."""

    size: int
    blob_id: str
    sha256: str | None

    def holds(self, size: int, sha256: str, content: bytes | None) -> bool:
        """Whether it is the file of this size and sha256; `content` decides for a file outside LFS."""
        if self.sha256 is not None:
            return self.size == size and self.sha256 == sha256
        return content is not None and self.blob_id == git_blob_id(content)


def git_blob_id(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def list_files(hub: Hub, revision: str) -> dict[str, RemoteFile]:
    """Every file of a revision, by its path."""

    def ask() -> dict[str, RemoteFile]:
        entries = hub.api.list_repo_tree(hub.repo, recursive=True, revision=revision)
        return {
            entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs is not None else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }

    return hub.call(f"listing {hub.repo}", ask)


def read_small_file(hub: Hub, name: str, revision: str) -> bytes | None:
    """The content of a small file; None when the revision has none of that name. Nothing is cached."""

    def ask() -> bytes | None:
        url = file_url(hub, name, revision)
        response = http_backoff("GET", url, headers=build_hf_headers(token=hub.api.token), follow_redirects=True)
        try:
            hf_raise_for_status(response)
        except RemoteEntryNotFoundError:
            return None
        return bytes(response.content)

    return hub.call(f"{hub.repo}: {name}", ask)


def previous_files(hub: Hub, remote: Mapping[str, RemoteFile], revision: str) -> frozenset[str]:
    """The files that npuq put there before: those of the manifest, or of the push that was not finished."""
    names: set[str] = set()
    for source, key in ((MANIFEST_NAME, "files"), (UNFINISHED_NAME, "replaces")):
        content = read_small_file(hub, source, revision) if source in remote else None
        if content is not None:
            names |= {source, *_names(content, key)}
    return frozenset(name for name in names if name in remote)


def _names(content: bytes, key: str) -> Iterable[str]:
    try:
        found: Any = json.loads(content)[key]
    except (ValueError, KeyError, TypeError):
        return ()
    return [name for name in found if isinstance(name, str)]


def refuse_strays(repo: str, remote: Mapping[str, RemoteFile], ours: Iterable[str]) -> None:
    """HubError when the repository holds weights that are not the artifact's: engines would load them too."""
    known = set(ours)
    for name in sorted(remote):
        in_root = "/" not in name
        if in_root and name not in known and (name.endswith((".safetensors", DESCRIPTION_NAME))):
            raise HubError(
                f"{repo} holds {name}, which is not part of this artifact, and engines load every such file; "
                "push to another repository, or delete it there first"
            )
