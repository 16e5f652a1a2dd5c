"""`verify`: checks that an artifact is what its format promises and its loaders need. Streamed, in bounded memory.

In stages: files, structure, values, source, engines. Each yields its problems, lines that name a file or tensor; npuq's
own artifacts and those of other tools pass through the same stages.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, CheckpointError, NpuqError
from ..formats.artifact import MANIFEST_NAME, converted_as, description_path, is_own, read_manifest
from ..formats.checkpoint import CONFIG_NAME, Checkpoint, read_config
from ..formats.schemes import Scheme
from ..formats.sources.compressed_tensors import is_compressed
from ..formats.sources.opening import open_weights
from ..formats.sources.ties import share_tied
from ..formats.sources.weights import WeightSource
from ..inputs.files import is_inside
from ..models.config import text_config
from ..parallel.pool import Pool
from ..parallel.torch_threads import single_threaded_torch
from ..progress import Progress, Silent
from .engines import engine_notes, engine_problems
from .files import FileChecks
from .source import Original, source_problems
from .structure import structure_problems
from .subject import Subject, open_subject
from .values import check_weights, table_problems
from .weight_errors import LinearError, RoleError, linear_errors, role_errors


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`. `problems` name a file or tensor each. `errors` has the weight error of every linear when
    a source was given, except for smoothed weights, which `notes` name; `roles` has the errors of roles."""

    path: str
    problems: tuple[str, ...]
    files: int
    tensors: int
    linears: int
    errors: tuple[LinearError, ...]
    notes: tuple[str, ...] = ()
    roles: tuple[RoleError, ...] = ()

    @property
    def ok(self) -> bool:
        """True without problems."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Fields as values for JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {key: [vars(error) for error in fields[key]] for key in ("errors", "roles")}
        return {"ok": self.ok, **fields}


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    family: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Check an artifact; with `source`, also that it was made from that checkpoint, and the error of every linear.

    An artifact of ModelSlim's has no manifest and no rotary tables: everything else is checked. Every byte is read
    twice, once for its file's hash and once for its value; `progress` counts both. Everything wrong with the artifact
    is a problem in the verdict. An artifact and a source of unknown model_type are read as models of `family`. Raises
    CheckpointError when there is no such directory, or the source cannot be read.
    """
    directory, watch = Path(path), progress or Silent()
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        manifest = _manifest(directory)
    except NpuqError as error:
        return Verdict(str(path), (str(error),), 0, 0, 0, ())
    with ExitStack() as stack:
        weights = None
        if source is not None:
            weights = _source_weights(stack.enter_context(Checkpoint.open(source)), directory, family)
        pool = stack.enter_context(Pool(workers or len(os.sched_getaffinity(0))))
        stack.enter_context(single_threaded_torch())
        problems: list[str] = []
        files = {} if manifest is None else manifest["files"]
        hashed = None if manifest is None else FileChecks(directory, files, pool, watch)
        try:
            subject = open_subject(directory, manifest, family)
        except NpuqError as error:
            found = (*(hashed.problems() if hashed else ()), str(error))
            return Verdict(str(path), found, len(files), 0, 0, ())
        stack.enter_context(subject.checkpoint)
        problems = _found(structure_problems, subject)
        problems += _found(table_problems, subject)
        original = Original(subject, weights)
        left = hashed.bytes_left if hashed else 0
        checks = list(check_weights(subject, original, pool, watch, left))
        if hashed:
            problems = [*hashed.problems(), *problems]
            watch.advance(left)
    problems += [problem for check in checks for problem in check.problems]
    errors = tuple(linear_errors(subject.schemes, checks))
    problems += source_problems(subject, errors)
    problems += engine_problems(subject)
    return Verdict(
        path=str(path),
        problems=tuple(problems),
        files=len(files) or len(subject.checkpoint.shards),
        tensors=len(subject.checkpoint.tensors),
        linears=sum(subject.schemes[name] is not Scheme.FLOAT for name in subject.specs),
        errors=errors,
        notes=(*original.notes, *engine_notes(subject)),
        roles=tuple(role_errors(subject.schemes, checks)),
    )


def _found(stage: Callable[[Subject], Iterable[str]], subject: Subject) -> list[str]:
    """The problems of a stage; what keeps it from its end, such as a shard that was cut meanwhile, is the last one."""
    problems: list[str] = []
    try:
        problems.extend(stage(subject))
    except NpuqError as error:
        problems.append(str(error))
    return problems


def _manifest(directory: Path) -> Mapping[str, Any] | None:
    """The manifest of npuq's own artifact; None for one that another tool made.

    Raises ArtifactError for compressed-tensors weights by that name, and not as an unfinished artifact.
    """
    if not is_own(directory):
        if description_path(directory) is not None:
            return None
        if is_inside(directory, CONFIG_NAME) and is_compressed(text_config(read_config(directory))):
            raise ArtifactError(
                f"{directory}: compressed-tensors weights: run `npuq convert` on it, and verify the result"
            )
    manifest = read_manifest(directory)
    if "files" not in manifest:
        raise ArtifactError(f"{MANIFEST_NAME}: lists no files")
    return manifest


def _source_weights(checkpoint: Checkpoint, artifact: Path, family: str | None) -> WeightSource:
    """The weights of an artifact's source; a tied head has both names, as in the artifact."""
    checkpoint.read_as(family or converted_as(artifact, checkpoint.config))
    share_tied(checkpoint)
    return open_weights(checkpoint)
