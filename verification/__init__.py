"""An artifact goes in, a verdict comes out: `verify` checks it against everything its loaders need, `inspect` says what
is in one, and what `npuq evaluate` measured is kept with it."""

from .inspection import Inspection, inspect
from .verdict import Verdict, verify
from .weight_errors import LinearError, RoleError

__all__ = ["Inspection", "LinearError", "RoleError", "Verdict", "inspect", "verify"]
