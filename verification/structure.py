"""Stage *structure*: index, description, tensors, config.json and manifest against each other, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..dtypes import FLOAT_CODES
from ..engines.requirements import config_schemes
from ..errors import ArtifactError, NpuqError
from ..formats.artifact import (
    DESCRIPTION_GLOBALS,
    DESCRIPTION_NAME,
    MANIFEST_NAME,
    MARKS,
    artifact_config,
    description_path,
    is_described,
)
from ..formats.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, index_path
from ..formats.safetensors import read_header
from ..formats.schemes import OutputTensor, Scheme
from ..inputs.files import inside
from ..inputs.json_text import read_object
from ..models.config import TEXT_CONFIG, text_config
from ..models.tensors import Spec
from ..recipes.reading import artifact_recipe
from .evaluations import read_evaluations
from .files import stray_problems
from .subject import Subject


def structure_problems(subject: Subject) -> Iterator[str]:
    """A line for each part of an artifact that contradicts another, or that a loader would fail at."""
    yield from _index(subject)
    yield from _description(subject)
    yield from _config(subject)
    if subject.manifest is None:
        shards = {path.name for path in subject.checkpoint.shards}
        described = description_path(subject.directory)
        yield from stray_problems(subject.directory, shards | ({described.name} if described else set()))
        return
    for name in subject.missing:
        yield f"tensor {name!r} is missing: config.json calls for it"
    yield from _tensors(subject)
    yield from _marks(subject)
    yield from _manifest(subject, subject.manifest)


def _index(subject: Subject) -> Iterator[str]:
    if subject.is_own and not (subject.directory / INDEX_NAME).exists():
        yield f"{INDEX_NAME}: missing"
        return
    yield from _unlisted(subject.checkpoint)


def _unlisted(checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each tensor of a shard that the index does not place there."""
    index, listed = index_path(checkpoint.directory), checkpoint.weight_map
    if index is None or listed is None:
        return
    for shard in checkpoint.shards:
        for name in read_header(shard)[0]:
            if Path(listed.get(name, "")) != shard.relative_to(checkpoint.directory):
                yield f"{index.name}: does not say that {name!r} is in {shard.name}"


def _description(subject: Subject) -> Iterator[str]:
    found = description_path(subject.directory)
    if found is not None and found.name != DESCRIPTION_NAME:
        yield f"{found.name}: engines look for {DESCRIPTION_NAME}: rename it, or run `npuq convert`"
    if subject.is_own:
        yield from _own_description(subject)
    tensors, described = subject.checkpoint.tensors, subject.described
    for name in tensors:
        if name not in described and is_described(name) and name != subject.tied:
            yield f"{DESCRIPTION_NAME}: has no entry for tensor {name!r}"
    for name in described:
        if name not in tensors:
            yield f"{DESCRIPTION_NAME}: describes {name!r}, which no shard has"


def _own_description(subject: Subject) -> Iterator[str]:
    """Check the entries of npuq's descriptions: those that each has, and those that none has."""
    try:
        content = read_object(inside(subject.directory, DESCRIPTION_NAME, ArtifactError), ArtifactError)
    except ArtifactError as error:
        yield str(error)
        return
    for key, value in DESCRIPTION_GLOBALS.items():
        if content.get(key) != value:
            yield f"{DESCRIPTION_NAME}: {key!r} is {content.get(key)!r} and must be {value!r}"
    for name in subject.described:
        if not is_described(name):
            yield f"{DESCRIPTION_NAME}: {name!r} makes engines give every RMS norm of the model a bias: remove that key"


def _config(subject: Subject) -> Iterator[str]:
    config = subject.checkpoint.config
    for where, part in (("", config), (f" under {TEXT_CONFIG}", config.get(TEXT_CONFIG))):
        if isinstance(part, Mapping) and "quantization_config" in part:
            yield f"{CONFIG_NAME}: quantization_config{where} is left: engines would ignore {DESCRIPTION_NAME}"


def _tensors(subject: Subject) -> Iterator[str]:
    """Check dtype, shape and description of every tensor that the schemes call for, and that there are no others."""
    wanted = set()
    for spec in subject.specs.values():
        try:
            outputs = subject.outputs(spec)
        except ValueError as error:
            yield f"{DESCRIPTION_NAME}: {subject.schemes[spec.name].value} for {spec.name!r}: {error}"
            continue
        for output in outputs:
            wanted.add(output.name)
            yield from _tensor(subject, spec, output)
    for name in subject.checkpoint.tensors:
        if name not in wanted and name in subject.described:
            yield f"tensor {name!r} belongs to no linear of its scheme"


def _tensor(subject: Subject, spec: Spec, output: OutputTensor) -> Iterator[str]:
    info, scheme = subject.checkpoint.tensors.get(output.name), subject.schemes[spec.name]
    if info is None:
        yield f"tensor {output.name!r} is missing: {scheme.value} needs it"
        return
    if info.dtype != output.dtype or info.shape != output.shape:
        yield (
            f"tensor {output.name!r} in {info.file.name} is {info.dtype} {list(info.shape)} "
            f"and must be {output.dtype} {list(output.shape)}"
        )
    if scheme is Scheme.FLOAT and info.dtype not in FLOAT_CODES:
        yield f"tensor {output.name!r} is described as FLOAT and stored as {info.dtype}"
    if subject.described.get(output.name, scheme) is not scheme:
        yield (
            f"{DESCRIPTION_NAME}: {output.name!r} is {subject.described[output.name].value}, its weight {scheme.value}"
        )


def _marks(subject: Subject) -> Iterator[str]:
    """Check the schemes in config.json, and the recipe, which has the target."""
    config = subject.checkpoint.config
    expected = text_config(artifact_config(config, **config_schemes(subject.specs.values(), subject.schemes)))
    for key in MARKS:
        found = subject.checkpoint.text_config.get(key)
        if found != expected.get(key):
            yield f"{CONFIG_NAME}: {key!r} is {found!r}, the description calls for {expected.get(key)!r}"
    try:
        artifact_recipe(subject.directory)
    except NpuqError as error:
        yield str(error)


def _manifest(subject: Subject, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Check the manifest's linears against the artifact's, and the form of its evaluations."""
    try:
        read_evaluations(manifest)
    except ArtifactError as damage:
        yield str(damage)
    linears = manifest.get("linears")
    if not isinstance(linears, dict):
        yield f"{MANIFEST_NAME}: lists no linears"
        return
    schemes = subject.schemes
    quantized = {name: schemes[name] for name in subject.specs if schemes[name] is not Scheme.FLOAT}
    for name in sorted(linears.keys() ^ quantized.keys()):
        where = "the manifest" if name in linears else "the description"
        yield f"{MANIFEST_NAME}: linear {name!r} is in {where} alone"
    for name in sorted(linears.keys() & quantized.keys()):
        written, described = linears[name].get("scheme"), quantized[name].value
        if written != described:
            yield f"{MANIFEST_NAME}: {name!r} is {written}, in the description {described}"
