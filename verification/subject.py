"""The subject of a verification: an open artifact, npuq's own or ModelSlim's, with the contents of its headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, NpuqError
from ..formats.artifact import DESCRIPTION_NAME, is_described, read_description
from ..formats.checkpoint import Checkpoint
from ..formats.schemes import SUFFIXES, OutputTensor, Scheme, output_tensors
from ..formats.sources.described import described_linear
from ..formats.sources.float_weights import PlainWeight
from ..formats.sources.integer_tables import checked_table, with_checked_tables
from ..formats.sources.model_config import read_model_config
from ..formats.sources.opening import open_weights
from ..formats.sources.ties import share_tied
from ..formats.sources.weights import Weight
from ..models.config import ModelConfig
from ..models.inventory import take_inventory
from ..models.roles import Role
from ..models.tensors import Spec, expected_specs
from ..recipes.reading import artifact_recipe
from ..recipes.recipe import Target


@dataclass(frozen=True)
class Subject:
    """An artifact to verify.

    specs: one for each weight present. missing: weights that config.json calls for and no shard has. described: the
    scheme of every tensor in the description. schemes: the scheme of every weight. target: the loaders it is for.
    manifest: None where another tool made the artifact; `weights` has the readable ones then, and `tied` the name under
    which a stored tensor is read a second time.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    specs: Mapping[str, Spec]
    missing: tuple[str, ...]
    described: Mapping[str, Scheme]
    schemes: Mapping[str, Scheme]
    target: Target
    manifest: Mapping[str, Any] | None
    weights: Mapping[str, Weight] | None = None
    tied: str | None = None

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def is_own(self) -> bool:
        """True where npuq made it: then its form is known to the bit."""
        return self.manifest is not None

    def outputs(self, spec: Spec) -> tuple[OutputTensor, ...]:
        """The tensors of a weight in npuq's own form. Raises ValueError for a scheme that cannot hold it."""
        scheme = self.schemes[spec.name]
        if scheme is Scheme.FLOAT:
            code = spec.kept_dtype or self.checkpoint.tensors[spec.name].dtype
            return (OutputTensor(spec.name, code, spec.shape),)
        float16 = self.config.dtype_code == "F16"
        return output_tensors(spec.name, scheme, spec.shape, row_parallel=spec.row_parallel, float16=float16)

    def weight(self, spec: Spec) -> Weight | None:
        """A weight to read; None where its tensors contradict the structure, whose stage names the problem."""
        if self.weights is not None:
            return self.weights[spec.name]
        tensors = self.checkpoint.tensors
        try:
            outputs = self.outputs(spec)
        except ValueError:
            return None
        for output in outputs:
            info = tensors.get(output.name)
            if info is None or (info.dtype, info.shape) != (output.dtype, output.shape):
                return None
        if self.schemes[spec.name] is Scheme.FLOAT:
            return checked_table(PlainWeight(self.checkpoint, tensors[spec.name]), spec)
        return described_linear(self.checkpoint, self.described, spec.name)

    def nbytes(self, spec: Spec) -> int:
        """Bytes that reading the weight takes, as far as it can be read."""
        try:
            weight = self.weight(spec)
        except NpuqError:  # named when it is read
            return 0
        return 0 if weight is None else weight.nbytes


def open_subject(directory: Path, manifest: Mapping[str, Any] | None, family: str | None = None) -> Subject:
    """Open an artifact; without a manifest, one that another tool made. The caller closes its checkpoint.

    An artifact of unknown model_type is read as one of `family`. Raises CheckpointError and ArtifactError for an
    artifact that cannot be examined any further.
    """
    checkpoint = Checkpoint.open(directory)
    try:
        checkpoint.read_as(family)
        config = read_model_config(checkpoint)
        described = read_description(directory)
        if described is None:
            raise ArtifactError(f"{DESCRIPTION_NAME}: missing")
        if manifest is None:
            return _foreign(checkpoint, config, described)
        return _own(checkpoint, config, described, manifest)
    except BaseException:
        checkpoint.close()
        raise


def _foreign(checkpoint: Checkpoint, config: ModelConfig, described: Mapping[str, Scheme]) -> Subject:
    """Open another tool's artifact: as its tensors have many forms, the errors of its reader are raised."""
    tied = share_tied(checkpoint)
    source = open_weights(checkpoint)
    specs = take_inventory(config, source.weights).specs
    source = with_checked_tables(source, specs)
    return Subject(checkpoint, config, specs, (), described, source.schemes, Target.ENGINES, None, source.weights, tied)


def _own(
    checkpoint: Checkpoint, config: ModelConfig, described: Mapping[str, Scheme], manifest: Mapping[str, Any]
) -> Subject:
    """Open npuq's own artifact: every problem must be named, so all weights present are examined, known or not."""
    biases = (name for name in checkpoint.tensors if not is_described(name))
    schemes = {**dict.fromkeys(biases, Scheme.FLOAT), **described}
    layers = {layer for name in checkpoint.tensors if (layer := config.layer_of(name)) is not None}
    mtp = tuple(sorted(layer for layer in layers if layer >= config.num_hidden_layers))
    specs: dict[str, Spec] = {}
    missing, claimed = [], set()
    for spec in expected_specs(config, mtp).values():
        if spec.name in checkpoint.tensors and spec.name in schemes:
            specs[spec.name] = spec
        elif spec.name not in checkpoint.tensors and not spec.optional:
            missing.append(spec.name)
        prefix = spec.name.removesuffix("weight")
        claimed |= {spec.name, *(prefix + suffix for suffix in SUFFIXES)}
    for name, info in checkpoint.tensors.items():
        if name not in claimed and name in schemes:
            specs[name] = Spec(name, Role.OTHER, info.shape, config.layer_of(name))
    try:
        target = artifact_recipe(checkpoint.directory).target
    except NpuqError:  # named by the stage *structure*
        target = Target.ENGINES
    return Subject(checkpoint, config, specs, tuple(missing), described, schemes, target, manifest)
