"""The user's choice of calibration: the text, its size, the time for trials, and the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .devices import Device

BUILTIN: Final = "builtin"
DEFAULT_SAMPLES: Final = 128
DEFAULT_SEQUENCE_LENGTH: Final = 512


@dataclass(frozen=True)
class CalibrationText:
    """The user's choice of calibration text: a file, a directory or "builtin", and its size in samples."""

    path: str | Path | None = None
    samples: int = DEFAULT_SAMPLES
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH
    time_budget: float | None = None  # seconds for all layers, in which the trials of `auto` must fit
    device: Device = Device.CPU  # for the matrix work
