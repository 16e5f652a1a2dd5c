"""A checkpoint goes in, an artifact comes out. `convert_checkpoint` makes one, resumably and in bounded memory;
`verify` checks one against everything its loaders need; `inspect` says what is in one. Only calibration runs a model,
layer by layer."""

from ..progress import Progress
from .conversion import convert_checkpoint
from .engine_placement import check_placement
from .inspection import Inspection, inspect
from .prepare import CalibrationText
from .summary import Summary
from .verification import VerifyReport, verify
from .weight_errors import LinearError, RoleError

__all__ = [
    "CalibrationText",
    "Inspection",
    "LinearError",
    "Progress",
    "RoleError",
    "Summary",
    "VerifyReport",
    "check_placement",
    "convert_checkpoint",
    "inspect",
    "verify",
]
