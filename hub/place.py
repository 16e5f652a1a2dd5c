"""Where pulled files go: the Hugging Face cache, shared with every other tool, or a folder of the user's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from ..errors import HubError
from ..quant.artifact import MANIFEST_NAME, OWN_FOLDER
from .client import Hub
from .fetch import Wanted, fetch_file, file_sha256, mismatch
from .verified import VerifiedFiles

# Files from here on are fetched by ranges, so that a cut goes on inside the file; smaller ones start again.
RANGE_BYTES = 4 << 20


class Place(Protocol):
    """A directory that files of one commit are fetched into."""

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those files that are not there with the right content."""

    def fetch(self, wanted: Wanted, advance: Callable[[int], object]) -> None:
        """Fetch one file and check it; thread-safe. HubError when it is not what it must be."""

    def fetch_unchecked(self, name: str) -> None:
        """Fetch a file that has no hash to check."""

    def remember(self) -> None:
        """Note what was checked, for the next time."""

    def finish(self, manifest: Path) -> Path:
        """Everything is there: the manifest too, and the directory is an artifact."""


class CachePlace:
    """The snapshot of a commit in the Hugging Face cache."""

    def __init__(self, hub: Hub, commit: str):
        self._hub = hub
        self._commit = commit
        self._folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub.repo, repo_type="model")
        self.directory = self._folder / "snapshots" / commit
        self._verified = VerifiedFiles(hub.repo, commit)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        result = [file for file in wanted if not self._is_right(file)]
        self.remember()
        return result

    def fetch(self, wanted: Wanted, advance: Callable[[int], object]) -> None:
        path, damaged = self.directory / wanted.name, (self.directory / wanted.name).exists()
        by_range = wanted.size >= RANGE_BYTES and wanted.sha256 is not None
        if by_range:
            # The cache names an LFS file's content by its sha256 and links to what is there under that name.
            fetch_file(self._hub, wanted, self._commit, self._folder / "blobs" / str(wanted.sha256), advance)
        self._download(wanted.name, force=damaged and not by_range)
        if not by_range:
            advance(wanted.size)
        if wanted.sha256 is None:
            return
        if not by_range and file_sha256(path) != wanted.sha256:
            raise mismatch(self._hub, wanted.name)
        self._verified.add(path, wanted.sha256)

    def fetch_unchecked(self, name: str) -> None:
        self._download(name)

    def remember(self) -> None:
        self._verified.save()

    def finish(self, manifest: Path) -> Path:
        return self.directory

    def refer(self, revision: str | None) -> None:
        """Note which commit a branch meant, so that it is found without the hub."""
        reference = self._folder / "refs" / (revision or constants.DEFAULT_REVISION)
        if revision != self._commit:
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(self._commit, encoding="utf-8")

    def _download(self, name: str, force: bool = False) -> None:
        hub = self._hub
        hub.call(
            f"{hub.repo}: {name}",
            lambda: hub.api.hf_hub_download(hub.repo, name, revision=self._commit, force_download=force),
            attempts=3,
        )

    def _is_right(self, wanted: Wanted) -> bool:
        path = self.directory / wanted.name
        if not path.is_file() or path.stat().st_size != wanted.size:
            return False
        if wanted.sha256 is None or self._verified.has(path, wanted.sha256):
            return True
        if file_sha256(path) != wanted.sha256:
            return False
        self._verified.add(path, wanted.sha256)
        return True


class FolderPlace:
    """A folder of the user's own. Only files that the artifact has are written, and none other is touched."""

    def __init__(self, hub: Hub, commit: str, directory: Path, manifest: Path):
        self._hub = hub
        self._commit = commit
        self.directory = directory
        self._claim(manifest)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        return [file for file in wanted if not self._is_right(file)]

    def fetch(self, wanted: Wanted, advance: Callable[[int], object]) -> None:
        fetch_file(self._hub, wanted, self._commit, self.directory / wanted.name, advance)

    def fetch_unchecked(self, name: str) -> None:
        hub = self._hub
        cached = hub.call(f"{hub.repo}: {name}", lambda: hub.api.hf_hub_download(hub.repo, name, revision=self._commit))
        shutil.copyfile(cached, self.directory / name)

    def remember(self) -> None:
        return

    def finish(self, manifest: Path) -> Path:
        target = self.directory / MANIFEST_NAME
        partial = target.with_name("manifest.npuq-part")
        shutil.copyfile(manifest, partial)
        partial.replace(target)
        return self.directory

    def _is_right(self, wanted: Wanted) -> bool:
        path = self.directory / wanted.name
        return path.is_file() and path.stat().st_size == wanted.size and file_sha256(path) == wanted.sha256

    def _claim(self, manifest: Path) -> None:
        """npuq writes into a directory that it made or found empty, and knows it again by its own folder."""
        own = self.directory / OWN_FOLDER
        if self.directory.exists() and not self.directory.is_dir():
            raise HubError(f"{self.directory}: exists and is not a directory; choose another")
        if self.directory.exists() and not own.is_dir() and any(self.directory.iterdir()):
            raise HubError(f"{self.directory}: is not empty and holds no artifact of npuq's; choose another directory")
        held = self.directory / MANIFEST_NAME
        if held.exists() and held.read_bytes() != manifest.read_bytes():
            raise HubError(f"{self.directory}: holds another artifact, or another revision; choose another directory")
        own.mkdir(parents=True, exist_ok=True)
