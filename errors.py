"""The errors npuq raises on bad input: each message is one line that says what is wrong, where, and what to do."""

from __future__ import annotations


class NpuqError(Exception):
    """Base of every error a user can cause; the command line prints the message and exits with `exit_code`."""

    exit_code = 1


class CheckpointError(NpuqError):
    """A source checkpoint (or any directory of safetensors) cannot be read as it is."""


class RecipeError(NpuqError):
    """A recipe is malformed, or asks for something that no engine could load."""


class CalibrationError(NpuqError):
    """A calibration text cannot be used, or the model does not compute with it."""


class ConversionError(NpuqError):
    """A conversion cannot start or go on: the output belongs to another run, the disk is full, memory is too small."""


class ArtifactError(NpuqError):
    """A quantized artifact is not what its format promises."""


class GenerationError(NpuqError):
    """A request cannot be generated: prompt too long, unreadable tokenizer, bad sampling parameter."""


class BackendError(NpuqError):
    """A backend is not available here, or cannot run this model."""


class HubError(NpuqError):
    """A hub refused, or what came back is not what was pushed."""


class ReportError(NpuqError):
    """A report cannot be drawn or written."""
