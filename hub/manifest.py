"""An artifact's manifest as a hub or a folder has it: its name, its most bytes, and the files that it lists."""

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
    """The files that a manifest from `repo` lists. Raises `error` for what is no manifest, and for names, sizes and
    hashes that no artifact has."""
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
    """The file names under a key of a manifest (or of the note on an unfinished push); none where it is malformed."""
    try:
        found = parse_object(content, MANIFEST, HubError).get(key, ())
    except HubError:
        # Not a manifest: whoever put it there, none of its files is ours to remove.
        return ()
    names = found if isinstance(found, (dict, list)) else ()
    return [FileName(name) for name in names if isinstance(name, str) and FileName.holds(name)]
