"""Stage *files*: the files of the manifest, byte by byte, and stray files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..formats.artifact import DESCRIPTION_NAME, MANIFEST_NAME, OWN_FOLDER, RECIPE_NAME
from ..formats.checkpoint import CONFIG_NAME, INDEX_NAME
from ..formats.file_hashes import file_hashes, most_together
from ..inputs.files import inside
from ..parallel.pool import Pool
from ..progress import Progress, Task


class FileChecks:
    """Checks of the manifest's files on a pool.

    The last files, one group a worker, are still hashed when this is made: what comes after them on the pool fills
    its other threads. `problems` waits for them.
    """

    def __init__(self, directory: Path, files: Mapping[str, Any], pool: Pool, progress: Progress):
        self._directory, self._files = directory, files
        self._sizes = {name: _size(directory / name) for name in files}
        groups = _groups(self._sizes)
        self._found: dict[str, list[str]] = {}
        self._results = pool.begin(lambda names: _check_files(directory, names, files), groups)
        first = groups[: max(0, len(groups) - pool.workers)]
        if first:
            progress.start(Task("hash", sum(self._sizes[name] for group in first for name in group)))
        for _ in first:
            progress.advance(self._next())

    @property
    def bytes_left(self) -> int:
        """The bytes of the files whose results `problems` waits for."""
        return sum(size for name, size in self._sizes.items() if name not in self._found)

    def problems(self) -> Iterator[str]:
        """Yield a line for each file that is missing or has another size or hash, and for each stray file."""
        while self._found.keys() != self._files.keys():
            self._next()
        for name in self._files:
            yield from self._found[name]
        yield from stray_problems(self._directory, self._files)
        for name in (INDEX_NAME, CONFIG_NAME, DESCRIPTION_NAME, RECIPE_NAME):
            if name not in self._files:
                yield f"{MANIFEST_NAME}: does not list {name}"

    def _next(self) -> int:
        """Wait for the next group; return its bytes."""
        found = next(self._results)
        self._found |= found
        return sum(self._sizes[name] for name in found)


def stray_problems(directory: Path, known: Collection[str]) -> Iterator[str]:
    """A line for each file in the root that an engine would load although the artifact does not have it."""
    for path in sorted(directory.iterdir()):
        if path.name in known or path.name == OWN_FOLDER:
            continue
        if path.suffix == ".safetensors":
            yield f"{path.name}: not part of the artifact, but engines load every .safetensors in this folder"
        elif path.name.endswith(DESCRIPTION_NAME):
            yield f"{path.name}: a second description beside {DESCRIPTION_NAME}: engines may take either"


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """The files in groups that are hashed together, of about the same size: shards with shards, and these last."""
    names, together = sorted(sizes, key=lambda name: -sizes[name]), most_together()
    return [names[start : start + together] for start in range(0, len(names), together)][::-1]


def _check_files(directory: Path, names: Sequence[str], files: Mapping[str, Any]) -> dict[str, list[str]]:
    """The problems of some files of the manifest: existence, size, hash."""
    problems = {name: list(_file_problems(directory, name, files[name])) for name in names}
    sound = [name for name in names if not problems[name]]
    try:
        hashes = dict(zip(sound, file_hashes([directory / name for name in sound], ArtifactError), strict=True))
    except ArtifactError as error:
        if len(sound) > 1:  # of which file?
            return problems | {name: _check_files(directory, [name], files)[name] for name in sound}
        return problems | {sound[0]: [str(error)]}
    for name in sound:
        if hashes[name] != files[name]["sha256"]:
            problems[name].append(f"{name}: its sha256 is not the manifest's: the content has changed")
    return problems


def _file_problems(directory: Path, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Check a file without reading it: existence and size."""
    path = directory / name
    if not path.exists():
        yield f"{name}: missing"
        return
    try:
        inside(directory, name, ArtifactError)
        size = path.stat().st_size
        if size != entry["size"]:
            yield f"{name}: {size} bytes, the manifest has {entry['size']}"
    except ArtifactError as error:
        yield str(error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
