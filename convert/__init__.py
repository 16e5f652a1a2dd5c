"""A checkpoint goes in, an artifact comes out, resumably and in bounded memory. Only calibration runs a model."""

from ..progress import Progress
from .calibrate.settings import CalibrationText
from .conversion import convert_checkpoint
from .plan.summary import Summary

__all__ = ["CalibrationText", "Progress", "Summary", "convert_checkpoint"]
