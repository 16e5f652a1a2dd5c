"""The local files of an artifact that a push sends, with sizes and hashes of its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError, HubError, NpuqError
from ..formats.artifact import read_manifest
from ..inputs.files import inside, read_bytes
from ..inputs.names import FileName, Sha256
from .listing import Listing
from .manifest import MANIFEST, MOST_MANIFEST_BYTES, manifest_files
from .transfer.digests import content_holds, file_holds
from .transfer.wording import PassingError


@dataclass(frozen=True)
class LocalFile:
    """A local file, with size and hash of the manifest."""

    name: FileName
    path: Path
    size: int
    sha256: Sha256

    def checked_content(self) -> bytes:
        """Read a small file. ArtifactError when its hash is not the manifest's."""
        content = read_bytes(self.path, ArtifactError, self.size)
        if not content_holds(content, self.size, self.sha256):
            raise self.changed()
        return content

    def is_in(self, listing: Listing) -> bool:
        """True where the hub has the file with the manifest's hash."""
        there = listing.files.get(self.name)
        if there is None or there.digest is None or there.size != self.size:
            return False
        if there.sha256 is not None:
            return there.sha256 == self.sha256
        return file_holds(self.path, self.size, {self.sha256, there.digest})

    def changed(self) -> ArtifactError:
        """The error for content that is not the manifest's."""
        return ArtifactError(f"{self.path}: its sha256 is not the manifest's: it has changed since it was converted")


def local_files(artifact: Path) -> tuple[dict[FileName, LocalFile], bytes]:
    """The manifest's files in order, and the manifest's bytes. ArtifactError for a missing file, another size, and a
    directory that is no finished artifact."""
    read_manifest(artifact)
    sealed = read_bytes(inside(artifact, MANIFEST, ArtifactError), ArtifactError, MOST_MANIFEST_BYTES)
    files = {}
    for listed in manifest_files(str(artifact), sealed, ArtifactError):
        path = inside(artifact, listed.name, ArtifactError)
        if path.stat().st_size != listed.size:
            raise ArtifactError(f"{path}: is not as the manifest has it; run `npuq verify {artifact}`")
        files[listed.name] = LocalFile(listed.name, path, listed.size, Sha256(listed.digest))
    return files, sealed


def not_sent(failed: Mapping[str, NpuqError], count: int) -> HubError:
    """The error for files of a push that were not sent. All others were; pushing again sends only these."""
    lasting = [error for error in failed.values() if not isinstance(error, PassingError)]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    what = f"{len(failed)} of {count} files were not sent ({', '.join([*failed][:3])}{more})"
    if not lasting:
        return PassingError(f"{what}: {next(iter(failed.values()))}")
    return HubError(f"{what}: {lasting[0]}; the others are there: once that is settled, push again")
