"""An artifact's manifest as a hub or a folder has it: its name, its most bytes, and which files one may have meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import HubError
from ..inputs.json_text import parse_object
from ..inputs.names import FileName
from ..quant.artifact import MANIFEST_NAME

MANIFEST: Final = FileName(MANIFEST_NAME)
MOST_MANIFEST_BYTES: Final = 64 << 20


def listed_names(content: bytes, key: str) -> Iterable[FileName]:
    """The file names under a key of a manifest (or of the note on an unfinished push); none where it is malformed."""
    try:
        found = parse_object(content, MANIFEST, HubError).get(key, ())
    except HubError:
        # Not a manifest: whoever put it there, none of its files is ours to remove.
        return ()
    names = found if isinstance(found, (dict, list)) else ()
    return [FileName(name) for name in names if isinstance(name, str) and FileName.holds(name)]
