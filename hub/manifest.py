"""An artifact's manifest on a hub or in a folder: its name, its size limit, and the files that it lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import HubError, NpuqError
from ..formats.artifact import FORMAT_VERSION, MANIFEST_NAME
from ..inputs.json_text import parse_object
from ..inputs.names import FileName, Sha256
from .listing import Wanted
from .names import byte_count
from .transfer.partial import PARTIAL_SUFFIX

MANIFEST: Final = FileName(MANIFEST_NAME)
MOST_MANIFEST_BYTES: Final = 64 << 20


def manifest_files(repo: str, content: bytes, error: type[NpuqError] = HubError) -> list[Wanted]:
    """Parse the files that a manifest from `repo` lists. Raises `error` for a malformed manifest, and for names, sizes
    and hashes that no artifact has."""
    where = f"{repo}: {MANIFEST_NAME}"
    manifest = parse_object(content, where, error)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version is None:
        raise error(f"{where} is no artifact's manifest; ask its owner to push again")
    if version != FORMAT_VERSION:
        raise error(f"{repo}: artifact format {version!r}; this npuq knows {FORMAT_VERSION}: use another npuq")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise error(f"{where} lists no files; ask its owner to push again")
    for name in files:
        if name.endswith(PARTIAL_SUFFIX):
            raise error(f"{where}: {name[:80]!r} is a name of npuq's own, for what is not whole; refusing it")
    return [
        Wanted(
            FileName.parse(name, where, error),
            byte_count(entry.get("size"), where, error),
            Sha256.parse(entry.get("sha256"), where, error),
        )
        for name, entry in files.items()
    ]


def listed_names(content: bytes, key: str) -> Iterable[FileName]:
    """Parse the file names under a key of a manifest (or of the note of an unfinished push); none if malformed."""
    try:
        found = parse_object(content, MANIFEST, HubError).get(key, ())
    except HubError:
        # Not npuq's manifest: none of its files may be removed.
        return ()
    names = found if isinstance(found, (dict, list)) else ()
    return [FileName(name) for name in names if isinstance(name, str) and FileName.holds(name)]
