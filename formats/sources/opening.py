"""Detection of a checkpoint's stored forms, from its description, its tensors' names and config.json."""

from __future__ import annotations

from collections.abc import Container, Mapping

from ...errors import CheckpointError
from ..artifact import is_own, read_description, read_manifest
from ..checkpoint import Checkpoint
from ..schemes import SUFFIXES
from .compressed_tensors import compressed_linears, is_compressed
from .described import described_linears
from .float_weights import float_weights
from .fp4 import fp4_weights
from .fp8 import is_beside_fp8
from .grouped_int4 import grouped_int4_weights
from .weights import Weight, WeightSource


def open_weights(checkpoint: Checkpoint) -> WeightSource:
    """Find a checkpoint's weights: by its description, as packed int4 by their names, as FP4 by config.json's
    `expert_dtype`, by compressed-tensors' config, or as float weights.

    Reads headers alone. Raises CheckpointError and ArtifactError, with the reason, for weights that npuq cannot read.
    """
    types = read_description(checkpoint.directory)
    if types is not None:
        if is_own(checkpoint.directory):
            read_manifest(checkpoint.directory)  # an unfinished conversion is no source
        return _with_floats(checkpoint, described_linears(checkpoint, types), frozenset())
    packed = grouped_int4_weights(checkpoint) or fp4_weights(checkpoint)
    if packed:
        return _with_floats(checkpoint, packed, frozenset())
    if is_compressed(checkpoint.text_config):
        return _with_floats(checkpoint, *compressed_linears(checkpoint))
    return WeightSource(checkpoint, float_weights(checkpoint, checkpoint.tensors))


def _with_floats(checkpoint: Checkpoint, linears: Mapping[str, Weight], ignored: Container[str]) -> WeightSource:
    """The source of these linears, and of float weights in all other tensors but `ignored` ones.

    Raises CheckpointError for a tensor that is neither, and for a weight that is stored as both.
    """
    claimed = {name for linear in linears.values() for name in linear.stored_names}
    left = [name for name in checkpoint.tensors if name not in claimed and name not in ignored]
    for name in left:
        if not is_beside_fp8(checkpoint.tensors, name):
            _refuse_orphan(checkpoint, name)
    floats = float_weights(checkpoint, left)
    for name in linears.keys() & floats.keys():
        stored = linears[name].stored_names[0]
        raise CheckpointError(
            f"{checkpoint.tensors[stored].file}: tensors {name!r} and {stored!r} are one weight stored twice; keep "
            "the right one"
        )
    # In the checkpoint's order; a linear takes its codes' place.
    by_tensor = floats | {linear.stored_names[0]: linear for linear in linears.values()}
    ordered = [by_tensor[name] for name in checkpoint.tensors if name in by_tensor]
    decided = any(weight.linear is not None for weight in ordered)
    return WeightSource(checkpoint, {weight.name: weight for weight in ordered}, is_quantized=decided)


def _refuse_orphan(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    if name.rpartition(".")[2] in SUFFIXES:
        raise CheckpointError(f"{info.file}: tensor {name!r} belongs to no linear of its scheme; fetch it again")
    if info.dtype in ("I8", "I32"):
        raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}, but nothing says how it is quantized")
