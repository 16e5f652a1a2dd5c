"""What a checkpoint is a source of: float weights, or linears that are quantized already."""

from __future__ import annotations

from .artifact import is_own, read_description, read_manifest
from .checkpoint import Checkpoint
from .compressed_tensors import compressed_linears, is_compressed
from .dialects import WeightSource
from .modelslim import described_linears
from .stored import QuantizedSource


def open_weights(checkpoint: Checkpoint) -> WeightSource:
    """The weights of a checkpoint by what it says of itself: a description, compressed-tensors, or neither.

    From headers alone. Raises CheckpointError and ArtifactError for what cannot be read, saying why.
    """
    types = read_description(checkpoint.directory)
    if types is not None:
        if is_own(checkpoint.directory):
            read_manifest(checkpoint.directory)  # an unfinished conversion is no source
        return QuantizedSource(checkpoint, described_linears(checkpoint, types))
    if is_compressed(checkpoint.config):
        linears, ignored = compressed_linears(checkpoint)
        return QuantizedSource(checkpoint, linears, ignored)
    return WeightSource(checkpoint)
