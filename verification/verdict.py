"""`verify`: is an artifact all that its format promises and its loaders need? Streamed, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engines.placement import ENGINES, loading_problems
from ..errors import ArtifactError, CheckpointError, NpuqError
from ..formats.artifact import MANIFEST_NAME, description_path, is_own, read_manifest
from ..formats.checkpoint import CONFIG_NAME, Checkpoint, read_config
from ..formats.schemes import Scheme
from ..formats.sources.compressed_tensors import is_compressed
from ..formats.sources.opening import open_weights
from ..formats.sources.weights import WeightSource
from ..formats.ties import share_tied
from ..inputs.files import is_inside
from ..models.tensors import Spec
from ..parallel.pool import Pool
from ..parallel.torch_threads import single_threaded_torch
from ..progress import LayersLeft, Progress, Silent, Task
from ..recipes.recipe import STORED, Target
from .original import Original
from .stored import check_stored
from .stored_evaluation import stored_evaluations
from .structure import Layout, check_file, check_strays, read_layout
from .values import check_kv_cache, check_rope, check_shared_inputs, check_values
from .weight_errors import LinearError, RoleError, linear_errors, role_errors

# The manifest's error was summed from exact integers, this one in floating point.
_ERROR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found: `problems` name a file or tensor each; `errors` has the weight error of every linear when a
    source was given, but for those whose weights were smoothed, of which `notes` speak, and `roles` of every role."""

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
        """Whether nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {key: [vars(error) for error in fields[key]] for key in ("errors", "roles")}
        return {"ok": self.ok, **fields}


def verify(
    path: str | Path,
    source: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check an artifact; with `source`, also that it is that checkpoint's, and the error of every linear.

    An artifact that ModelSlim made has no manifest and no rotary tables: the rest is checked. Every byte is read twice,
    once for its file's hash and once for its value; `progress` hears of both. Everything wrong with the artifact is a
    problem in the report. Raises CheckpointError when there is no such directory, or the source cannot be read.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    try:
        stored = not is_own(directory) and description_path(directory) is not None
        manifest = {} if stored else _own_manifest(directory)
    except NpuqError as error:
        return VerifyReport(str(path), (str(error),), 0, 0, 0, ())
    if stored:
        return _verify_stored(path, source, workers, progress or Silent())
    files = manifest.get("files")
    if not isinstance(files, dict):
        return VerifyReport(str(path), (f"{MANIFEST_NAME}: lists no files",), 0, 0, 0, ())
    with ExitStack() as stack:
        weights = None
        if source is not None:
            weights = _source_weights(stack.enter_context(Checkpoint.open(source)))
        pool = stack.enter_context(Pool(workers or len(os.sched_getaffinity(0))))
        stack.enter_context(single_threaded_torch())
        watch = progress or Silent()
        sizes = {name: _size(directory / name) for name in files}
        watch.start(Task("hash", sum(sizes.values())))
        problems = []
        for name, found in zip(
            files, pool.map(lambda item: list(check_file(directory, *item)), files.items()), strict=True
        ):
            problems += found
            watch.advance(sizes[name])
        problems += check_strays(directory, files)
        layout = read_layout(directory, problems)
        if layout is None:
            return VerifyReport(str(path), tuple(problems), len(files), 0, 0, ())
        stack.enter_context(layout.checkpoint)
        problems += check_rope(layout)
        problems += check_kv_cache(layout)
        problems += check_shared_inputs(layout.checkpoint, layout.config, layout.specs, layout.schemes)
        checks, notes = [], []
        original = Original(layout, weights, manifest)
        if original.skipped:
            notes.append(
                f"{original.skipped} tensors were smoothed: they are no longer the source's, weight by weight; "
                "npuq evaluate --source compares what the models compute"
            )
        left = LayersLeft(spec.layer for spec in layout.specs.values())
        nbytes = sum([_stored_bytes(layout, spec) for spec in layout.specs.values()])
        watch.start(Task("verify", nbytes, layers=left.count))
        for check in pool.map(lambda spec: check_values(layout, spec, original.of(spec)), layout.specs.values()):
            checks.append(check)
            layer = check.spec.layer
            watch.advance(_stored_bytes(layout, check.spec), layer=layer, layer_done=left.part_done(layer))
    problems += [problem for check in checks for problem in check.problems]
    errors = tuple(linear_errors(layout.schemes, checks))
    problems += _check_manifest(manifest, layout, errors)
    notes += _engine_notes(layout)
    linears = sum(layout.schemes[name] is not Scheme.FLOAT for name in layout.specs)
    tensors = len(layout.checkpoint.tensors)
    roles = tuple(role_errors(layout.schemes, checks))
    return VerifyReport(str(path), tuple(problems), len(files), tensors, linears, errors, tuple(notes), roles)


def _engine_notes(layout: Layout) -> Iterator[str]:
    """What the engines would do with an artifact that is meant for them, wherever they place it."""
    if layout.target is Target.ENGINES:
        for engine in ENGINES:
            yield from loading_problems(engine, layout.checkpoint.config, layout.schemes)


def _source_weights(checkpoint: Checkpoint) -> WeightSource:
    """The weights of a source, of which the artifact has a tied head twice."""
    share_tied(checkpoint)
    return open_weights(checkpoint)


def _own_manifest(directory: Path) -> Mapping[str, Any]:
    """`read_manifest`, but a compressed-tensors checkpoint is called that and not an unfinished artifact."""
    if not is_own(directory) and is_inside(directory, CONFIG_NAME) and is_compressed(read_config(directory)):
        raise ArtifactError(f"{directory}: compressed-tensors weights: run `npuq convert` on it, and verify the result")
    return read_manifest(directory)


def _verify_stored(
    path: str | Path, source: str | Path | None, workers: int | None, progress: Progress
) -> VerifyReport:
    """ModelSlim's own artifact: there is no manifest to check it against."""
    with ExitStack() as stack:
        original = None if source is None else _source_weights(stack.enter_context(Checkpoint.open(source)))
        pool = stack.enter_context(Pool(workers or len(os.sched_getaffinity(0))))
        stack.enter_context(single_threaded_torch())
        found = check_stored(Path(path), original, pool, progress)
    if found.source is None:
        return VerifyReport(str(path), found.problems, 0, 0, 0, ())
    schemes, checkpoint = found.source.schemes, found.source.checkpoint
    linears = sum(scheme is not Scheme.FLOAT for scheme in schemes.values())
    return VerifyReport(
        str(path),
        found.problems,
        len(checkpoint.shards),
        len(checkpoint.tensors),
        linears,
        tuple(linear_errors(schemes, found.checks)),
        roles=tuple(role_errors(schemes, found.checks)),
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stored_bytes(layout: Layout, spec: Spec) -> int:
    try:
        outputs = layout.outputs(spec)
    except ValueError:  # the layout checks have named it
        return 0
    tensors = layout.checkpoint.tensors
    return sum(tensors[output.name].nbytes for output in outputs if output.name in tensors)


def _check_manifest(manifest: Mapping[str, Any], layout: Layout, errors: tuple[LinearError, ...]) -> Iterator[str]:
    """The manifest's linears against those that are there, and its errors against those just measured; the evaluations
    that it keeps have the form that the card needs.
    """
    try:
        stored_evaluations(manifest)
    except ArtifactError as damage:
        yield str(damage)
    linears = manifest.get("linears")
    if not isinstance(linears, dict):
        yield f"{MANIFEST_NAME}: lists no linears"
        return
    quantized = {name: layout.schemes[name] for name in layout.specs if layout.schemes[name] is not Scheme.FLOAT}
    for name in sorted(linears.keys() ^ quantized.keys()):
        where = "the manifest" if name in linears else "the description"
        yield f"{MANIFEST_NAME}: linear {name!r} is in {where} alone"
    for name in sorted(linears.keys() & quantized.keys()):
        written, described = linears[name].get("scheme"), quantized[name].value
        if written != described:
            yield f"{MANIFEST_NAME}: {name!r} is {written}, in the description {described}"
    for error in errors:
        # Made from codes: the float checkpoint behind them is as good a source, with an error of its own.
        if linears.get(error.name, {}).get("method") == STORED:
            continue
        promised = linears.get(error.name, {}).get("relative_error", error.relative_error)
        if abs(error.relative_error - promised) > _ERROR_TOLERANCE * (promised + error.relative_error):
            yield (
                f"tensor {error.name!r}: its error against the source is {error.relative_error:.3%}, the manifest has "
                f"{promised:.3%}: it was made from other weights"
            )
