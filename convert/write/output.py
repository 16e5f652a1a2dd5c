"""The output directory: its owner, and the choice to start, continue, or stop because the artifact is finished.

npuq owns a directory that it created or found empty, and marks it with its journal before any other file is written. It
writes into no other and deletes nothing but its own journal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ArtifactError, ConversionError
from ...formats.artifact import MANIFEST_NAME, OWN_FOLDER, read_manifest, read_report
from ...formats.checkpoint import JOURNAL_NAME
from ...formats.output_files import (
    PARTIAL_NAME,
    locked_directory,
    make_folder,
    refuse_link,
    sync_directory,
    write_error,
    write_file,
)
from .journal import Journal, Record

RUNS_FOLDER = f"{OWN_FOLDER}/ranks"
"""Of the journals of several processes (`ranks/run.py`), and of their claims on shards."""
CLAIMS_FOLDER = f"{RUNS_FOLDER}/claims"
_REMEDY = "give the same arguments as before, or another output directory, or remove this one yourself"


@dataclass(frozen=True)
class Finished:
    """The directory already holds the requested artifact; `role_totals` is the content of its npuq/report.json."""

    role_totals: Mapping[str, Any]


def check_separate(source: Path, output: Path) -> None:
    """Raise ConversionError for an output directory that is the source, or inside it."""
    if output.resolve().is_relative_to(source.resolve()):
        raise ConversionError(f"{output}: lies inside the source checkpoint; choose an output directory elsewhere")


def look(output: Path, identity: Mapping[str, str]) -> Record | Finished | None:
    """Find the state of an output directory: empty (None), an interrupted conversion's record, or the finished
    artifact.

    Changes nothing. Raises ConversionError, as `claim` would, when the directory holds anything else, or a conversion
    with other arguments, or cannot be written.
    """
    try:
        journal = output / JOURNAL_NAME
        if output.exists() and not output.is_dir():
            raise ConversionError(f"{output}: exists and is not a directory; choose another output")
        refuse_link(output / OWN_FOLDER)
        if (output / MANIFEST_NAME).exists():
            return _finished(output, identity)
        if journal.exists():
            found, record = Journal.look(journal)
            refuse_difference(output, found.identity, identity)
            _refuse_unwritable(output, output / OWN_FOLDER, journal)
            return record
        if (
            output.exists() and not _is_blank(output) and not journal.exists()
        ):  # another npuq may have made it meanwhile
            raise ConversionError(
                f"{output}: is not empty and holds no conversion of npuq's; choose an empty or new directory"
            )
        _refuse_unwritable(_existing(output))
    except OSError as error:
        raise write_error(output, error) from error
    return None


def claim(output: Path, identity: Mapping[str, str]) -> Journal:
    """Take the output directory for this conversion; return its journal, new or continued.

    Raises ConversionError when another npuq has taken it since `look`, and when it cannot be read or written.
    """
    journal = output / JOURNAL_NAME
    try:
        if not journal.exists():
            make_folder(output / OWN_FOLDER)
            sync_directory(output)
            with locked_directory(output / OWN_FOLDER):
                if not journal.exists():
                    write_file(output, JOURNAL_NAME, Journal.first_line(identity))
        opened = Journal.open(journal)
    except OSError as error:
        raise write_error(output, error) from error
    try:
        refuse_difference(output, opened.identity, identity)
        if begun_by_several(output):  # after the lock, which they look at once they have their folder
            raise ConversionError(f"{output}: several processes have begun to convert into it; run this again")
    except ConversionError:
        opened.close()
        raise
    return opened


def _is_blank(output: Path) -> bool:
    """True for a directory that is empty, but for files of a run before its journal exists, or killed by then."""
    for entry in output.iterdir():
        if entry.name != OWN_FOLDER or not entry.is_dir():
            return False
        if not {output / PARTIAL_NAME, output / RUNS_FOLDER}.issuperset(entry.iterdir()):
            return False
    return True


def _existing(output: Path) -> Path:
    """The directory itself, or its nearest existing parent. Raises OSError where another kind of file has the name."""
    existing = output.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(output))
    return existing


def _refuse_unwritable(*paths: Path) -> None:
    """Raise OSError for a directory or file that cannot be written."""
    for path in paths:
        if not os.access(path, os.W_OK | os.X_OK if path.is_dir() else os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def begun_by_several(output: Path) -> bool:
    """True where a conversion by several processes has begun, and is not finished."""
    return (output / CLAIMS_FOLDER).is_dir()


def refuse_difference(output: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ConversionError where an unfinished conversion has another identity than this one."""
    difference = _difference(before, now)
    if difference:
        raise ConversionError(f"{output}: holds an unfinished conversion with another {difference}; {_REMEDY}")


def _finished(output: Path, identity: Mapping[str, str]) -> Finished:
    manifest = read_manifest(output)
    try:
        difference = _difference(manifest["conversion"], identity)
        sizes = {output / name: entry["size"] for name, entry in manifest["files"].items()}
        report = read_report(output)
    except (KeyError, ArtifactError) as error:
        raise ArtifactError(
            f"{output}: holds a finished artifact whose manifest or report is damaged ({error!r}); "
            "run npuq verify, or remove the directory and convert again"
        ) from error
    if difference:
        raise ConversionError(f"{output}: holds a finished artifact with another {difference}; {_REMEDY}")
    for path, size in sizes.items():
        if not path.is_file() or path.stat().st_size != size:
            raise ArtifactError(
                f"{path}: the finished artifact has lost or changed this file; remove the directory and convert again"
            )
    return Finished(report)


def _difference(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The differing arguments, such as `recipe (w8a8 there, w4a8 now)`; empty when nothing differs."""
    keys = dict.fromkeys([*before, *now])
    return ", ".join(
        f"{key} ({before.get(key, 'none')} there, {now.get(key, 'none')} now)"
        for key in keys
        if before.get(key) != now.get(key)
    )
