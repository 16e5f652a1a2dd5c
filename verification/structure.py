"""Verification of everything but values: files, headers, index, description, config, shapes, and the engines' rules.

Each check yields problems as lines that name the file or tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..engines.rules import config_schemes, violations
from ..errors import ArtifactError, NpuqError
from ..formats.artifact import (
    DESCRIPTION_GLOBALS,
    DESCRIPTION_NAME,
    MANIFEST_NAME,
    OWN_FOLDER,
    RECIPE_NAME,
    artifact_config,
    read_description,
)
from ..formats.checkpoint import CONFIG_NAME, INDEX_NAME, Checkpoint, index_path, read_weight_map
from ..formats.safetensors import read_header
from ..formats.schemes import SUFFIXES, OutputTensor, Scheme, output_tensors
from ..inputs.files import file_sha256, inside
from ..inputs.json_text import read_object
from ..models.config import ModelConfig, model_dtype
from ..models.roles import Role
from ..models.tensors import Spec, expected_specs
from ..recipes.reading import stored_recipe
from ..recipes.recipe import Target

_FLOAT_CODES = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class Layout:
    """An artifact whose structure could be read: its tensors by role and scheme, for the checks of values."""

    checkpoint: Checkpoint
    config: ModelConfig
    specs: Mapping[str, Spec]  # one a source tensor
    schemes: Mapping[str, Scheme]  # one an artifact tensor
    target: Target  # who is to load it, by its recipe

    def outputs(self, spec: Spec) -> tuple[OutputTensor, ...]:
        """The artifact's tensors of one source tensor, as the format wants them. ValueError: it has no such form."""
        scheme = self.schemes[spec.name]
        if scheme is Scheme.FLOAT:
            code = spec.kept_dtype or self.checkpoint.tensors[spec.name].dtype
            return (OutputTensor(spec.name, code, spec.shape),)
        return output_tensors(spec.name, scheme, spec.shape, row_parallel=spec.row_parallel, float16=self.is_float16)

    @property
    def is_float16(self) -> bool:
        """Whether config.json says that engines compute in float16."""
        return model_dtype(self.checkpoint.config) is torch.float16


def check_file(directory: Path, name: str, entry: Any) -> Iterator[str]:
    """One file of the manifest: there, of its size, of its hash."""
    path = directory / name
    if not path.exists():
        yield f"{name}: missing"
        return
    try:
        inside(directory, name, ArtifactError)
    except ArtifactError as error:
        yield str(error)
        return
    if path.stat().st_size != entry["size"]:
        yield f"{name}: {path.stat().st_size} bytes, the manifest has {entry['size']}"
    elif file_sha256(path, ArtifactError) != entry["sha256"]:
        yield f"{name}: its sha256 is not the manifest's: the content has changed"


def check_strays(directory: Path, files: Mapping[str, Any]) -> Iterator[str]:
    """Files in the root that an engine would pick up although the artifact does not have them."""
    for path in sorted(directory.iterdir()):
        if path.name in files or path.name == OWN_FOLDER:
            continue
        if path.suffix == ".safetensors":
            yield f"{path.name}: not part of the artifact, but engines load every .safetensors in this folder"
        elif path.name.endswith(DESCRIPTION_NAME):
            yield f"{path.name}: a second description beside {DESCRIPTION_NAME}: engines may take either"
    for name in (INDEX_NAME, CONFIG_NAME, DESCRIPTION_NAME, RECIPE_NAME):
        if name not in files:
            yield f"{MANIFEST_NAME}: does not list {name}"


def read_layout(directory: Path, problems: list[str]) -> Layout | None:
    """Open the artifact and check its structure, appending to `problems`; None when values cannot be checked."""
    try:
        checkpoint = Checkpoint.open(directory)
        config = ModelConfig.from_dict(checkpoint.config)
        schemes = read_description(directory)
    except NpuqError as error:
        problems.append(str(error))
        return None
    if schemes is None:
        problems.append(f"{DESCRIPTION_NAME}: missing")
        return None
    problems += _check_index(checkpoint)
    problems += _check_description(directory, checkpoint, schemes)
    specs = _specs(config, checkpoint, schemes, problems)
    layout = Layout(checkpoint, config, specs, schemes, _target(directory, problems))
    problems += _check_tensors(layout)
    problems += _check_rules(layout)
    problems += _check_config(checkpoint.config, layout)
    return layout


def _check_index(checkpoint: Checkpoint) -> Iterator[str]:
    if not (checkpoint.directory / INDEX_NAME).exists():
        yield f"{INDEX_NAME}: missing"
        return
    yield from unlisted(checkpoint)


def unlisted(checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each tensor of a shard that the index does not say to be there."""
    index, listed = index_path(checkpoint.directory), read_weight_map(checkpoint.directory)
    if index is None or listed is None:
        return
    for shard in checkpoint.shards:
        for name in read_header(shard)[0]:
            if Path(listed.get(name, "")) != shard.relative_to(checkpoint.directory):
                yield f"{index.name}: does not say that {name!r} is in {shard.name}"


def _check_description(directory: Path, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    try:
        content = read_object(inside(directory, DESCRIPTION_NAME, ArtifactError), ArtifactError)
    except ArtifactError as error:
        yield str(error)
        return
    for key, value in DESCRIPTION_GLOBALS.items():
        if content.get(key) != value:
            yield f"{DESCRIPTION_NAME}: {key!r} is {content.get(key)!r} and must be {value!r}"
    for name in checkpoint.tensors:
        if name not in schemes:
            yield f"{DESCRIPTION_NAME}: has no entry for tensor {name!r}"
    for name in schemes:
        if name not in checkpoint.tensors:
            yield f"{DESCRIPTION_NAME}: describes {name!r}, which no shard has"
        if name.endswith("norm.bias"):
            yield f"{DESCRIPTION_NAME}: {name!r} would give every RMSNorm of the model a bias"


def _specs(
    config: ModelConfig, checkpoint: Checkpoint, schemes: Mapping[str, Scheme], problems: list[str]
) -> dict[str, Spec]:
    """What can be checked further: tensors that the architecture knows and that are there, and unknown float ones."""
    layers = {layer for name in checkpoint.tensors if (layer := config.family.layer_of(name)) is not None}
    mtp = tuple(sorted(layer for layer in layers if layer >= config.num_hidden_layers))
    specs, claimed = {}, set()
    for spec in expected_specs(config, mtp).values():
        if spec.name in checkpoint.tensors and spec.name in schemes:
            specs[spec.name] = spec
        elif spec.name not in checkpoint.tensors and not spec.optional:
            problems.append(f"tensor {spec.name!r} is missing: config.json calls for it")
        prefix = spec.name.removesuffix("weight")
        claimed |= {spec.name, *(prefix + suffix for suffix in SUFFIXES)}
    for name, info in checkpoint.tensors.items():
        if name not in claimed and name in schemes:
            specs[name] = Spec(name, Role.OTHER, info.shape, config.family.layer_of(name))
    return specs


def _check_tensors(layout: Layout) -> Iterator[str]:
    """Dtype, shape and description entry of every tensor that the schemes call for, and none besides."""
    wanted = set()
    for spec in layout.specs.values():
        try:
            outputs = layout.outputs(spec)
        except ValueError as error:
            yield f"{DESCRIPTION_NAME}: {layout.schemes[spec.name].value} for {spec.name!r}: {error}"
            continue
        for output in outputs:
            wanted.add(output.name)
            yield from _check_tensor(layout, spec, output)
    for name in layout.checkpoint.tensors:
        if name not in wanted and name in layout.schemes:
            yield f"tensor {name!r} belongs to no linear of its scheme"


def _check_tensor(layout: Layout, spec: Spec, output: OutputTensor) -> Iterator[str]:
    info = layout.checkpoint.tensors.get(output.name)
    if info is None:
        yield f"tensor {output.name!r} is missing: {layout.schemes[spec.name].value} needs it"
        return
    if info.dtype != output.dtype or info.shape != output.shape:
        yield (
            f"tensor {output.name!r} in {info.file.name} is {info.dtype} {list(info.shape)} "
            f"and must be {output.dtype} {list(output.shape)}"
        )
    if layout.schemes[spec.name] is Scheme.FLOAT and info.dtype not in _FLOAT_CODES:
        yield f"tensor {output.name!r} is described as FLOAT and stored as {info.dtype}"
    if layout.schemes.get(output.name, layout.schemes[spec.name]) is not layout.schemes[spec.name]:
        yield (
            f"{DESCRIPTION_NAME}: {output.name!r} is {layout.schemes[output.name].value}, "
            f"its weight {layout.schemes[spec.name].value}"
        )


def _target(directory: Path, problems: list[str]) -> Target:
    try:
        return stored_recipe(directory).target
    except NpuqError as error:
        problems.append(str(error))
        return Target.ENGINES


def _check_rules(layout: Layout) -> Iterator[str]:
    for violation in violations(layout.specs, layout.schemes.__getitem__, layout.target):
        yield f"{DESCRIPTION_NAME}: {violation}"


def _check_config(config: Mapping[str, Any], layout: Layout) -> Iterator[str]:
    for where, part in (("", config), (" under text_config", config.get("text_config"))):
        if isinstance(part, Mapping) and "quantization_config" in part:
            yield f"{CONFIG_NAME}: quantization_config{where} is left: engines would ignore {DESCRIPTION_NAME}"
    expected = artifact_config(config, **config_schemes(layout.specs.values(), layout.schemes))
    for key in ("quantize", "moe_quantize", "mtp_quantize"):
        if config.get(key) != expected.get(key):
            yield f"{CONFIG_NAME}: {key!r} is {config.get(key)!r}, the description calls for {expected.get(key)!r}"
