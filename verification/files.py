"""Stage *files*: the files of the manifest, byte by byte, and stray files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..formats.artifact import DESCRIPTION_NAME, MANIFEST_NAME, OWN_FOLDER, RECIPE_NAME
from ..formats.checkpoint import CONFIG_NAME, INDEX_NAME
from ..inputs.files import file_sha256, inside
from ..parallel.pool import Pool
from ..progress import Progress, Task


def file_problems(directory: Path, files: Mapping[str, Any], pool: Pool, progress: Progress) -> Iterator[str]:
    """A line for each file of the manifest that is missing or has another size or hash, and for each stray file."""
    sizes = {name: _size(directory / name) for name in files}
    progress.start(Task("hash", sum(sizes.values())))
    checks = pool.map(lambda item: list(_check_file(directory, *item)), files.items())
    for name, found in zip(files, checks, strict=True):
        yield from found
        progress.advance(sizes[name])
    yield from stray_problems(directory, files)
    for name in (INDEX_NAME, CONFIG_NAME, DESCRIPTION_NAME, RECIPE_NAME):
        if name not in files:
            yield f"{MANIFEST_NAME}: does not list {name}"


def stray_problems(directory: Path, known: Collection[str]) -> Iterator[str]:
    """A line for each file in the root that an engine would load although the artifact does not have it."""
    for path in sorted(directory.iterdir()):
        if path.name in known or path.name == OWN_FOLDER:
            continue
        if path.suffix == ".safetensors":
            yield f"{path.name}: not part of the artifact, but engines load every .safetensors in this folder"
        elif path.name.endswith(DESCRIPTION_NAME):
            yield f"{path.name}: a second description beside {DESCRIPTION_NAME}: engines may take either"


def _check_file(directory: Path, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Check one file of the manifest: existence, size, hash."""
    path = directory / name
    if not path.exists():
        yield f"{name}: missing"
        return
    try:
        inside(directory, name, ArtifactError)
        size = path.stat().st_size
        if size != entry["size"]:
            yield f"{name}: {size} bytes, the manifest has {entry['size']}"
        elif file_sha256(path, ArtifactError) != entry["sha256"]:
            yield f"{name}: its sha256 is not the manifest's: the content has changed"
    except ArtifactError as error:
        yield str(error)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
