"""A checkpoint's ModelConfig. Where its model_type is unknown, the error names the families that its tensors fit."""

from __future__ import annotations

from ...errors import NpuqError, UnknownModelError
from ...models.config import ModelConfig
from ...models.families import is_known, unknown_type
from ...models.recognition import unknown_model
from ..artifact import is_own
from ..checkpoint import Checkpoint
from .opening import open_weights


def read_model_config(checkpoint: Checkpoint) -> ModelConfig:
    """Read and check config.json. CheckpointError names the key that is missing, malformed or unknown."""
    raw = checkpoint.config
    # An artifact's config.json is npuq's: with an unknown model_type it is damaged.
    if is_known(raw.get("model_type")) or is_own(checkpoint.directory):
        return ModelConfig.from_dict(raw)
    try:
        weights = open_weights(checkpoint).weights
    except NpuqError as error:
        raise UnknownModelError(
            f"{unknown_type(raw.get('model_type'))}, and cannot compare its tensors with theirs: {error}", ()
        ) from error
    raise unknown_model(raw, weights)
