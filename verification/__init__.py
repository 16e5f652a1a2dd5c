"""An artifact goes in, a verdict comes out: `verify` checks it against everything its loaders need, `inspect` lists its
tensors by role, and `evaluations` keeps the results of `npuq evaluate --save`."""

from .inspection import Inspection, inspect
from .verdict import Verdict, verify
from .weight_errors import LinearError, RoleError

__all__ = ["Inspection", "LinearError", "RoleError", "Verdict", "inspect", "verify"]
