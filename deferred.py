"""torch, imported when an attribute of it is first used.

Importing torch takes a second, and a conversion without calibration needs none of it where the native kernels are
built. Modules on that way say `from ..deferred import torch`; those that compute with torch import it as usual.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["is_imported", "torch"]

if TYPE_CHECKING:
    import torch as torch
else:

    class _Deferred:
        def __getattr__(self, name: str) -> Any:
            value = getattr(import_module("torch"), name)
            setattr(self, name, value)  # the next look-up does not come here
            return value

    torch = _Deferred()


def is_imported() -> bool:
    """True where something in this process has imported torch."""
    return "torch" in sys.modules
