"""Errors of npuq on bad input: each message is one line with the fault, its place and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NpuqError(Exception):
    """The base of every error that a user can cause; the command line prints the message and exits with `exit_code`.

    details: what a program needs beside the message; under --json it is printed.
    """

    exit_code = 1
    details: Mapping[str, Any] = {}


class NpuqWarning(UserWarning):
    """Something that goes on in another, slower way than asked; the command line prints the message on stderr."""


class CheckpointError(NpuqError):
    """An unreadable source checkpoint (or any directory of safetensors)."""


class UnknownModelError(CheckpointError):
    """A config.json with a model_type that npuq does not know. `looks_like` names the families that its tensors fit
    exactly, the likeliest first."""

    def __init__(self, message: str, looks_like: tuple[str, ...]):
        super().__init__(message)
        self.details = {"looks_like": list(looks_like)}


class RecipeError(NpuqError):
    """A malformed recipe, or one whose artifact no engine could load."""


class CalibrationError(NpuqError):
    """An unusable calibration text, or one on which the model's activations are not finite."""


class ConversionError(NpuqError):
    """A conversion that cannot start or continue: another run's output, a full disk, too little memory."""


class ArtifactError(NpuqError):
    """A quantized artifact that violates its format."""


class GenerationError(NpuqError):
    """A request that cannot be generated: prompt too long, unreadable tokenizer, bad sampling parameter."""


class BackendError(NpuqError):
    """A backend that is not available on this machine, or cannot run this model."""


class RankError(NpuqError):
    """A launch over several ranks that does not fit the model or the machine, or a rank that is gone."""


class HubError(NpuqError):
    """A hub's refusal, or content that differs from its hash."""


class RemoteError(NpuqError):
    """A remote server that cannot be reached, refuses a request, or breaks its protocol."""


class ReportError(NpuqError):
    """A report that cannot be drawn or written."""
