"""npuq: DeepSeek-style mixture-of-experts checkpoints become W4A8 artifacts for Ascend NPUs, and run.

The public functions are imported when they are first used, so that `import npuq` stays instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import NpuqError

if TYPE_CHECKING:
    from .convert import convert_checkpoint
    from .hub import pull, push
    from .runtime import Completion, EngineConfig, LanguageModel, SamplingParams, evaluate, load
    from .verification import inspect, verify

__version__ = "0.2.0.dev0"

_HOMES = {
    "convert_checkpoint": ".convert",
    "verify": ".verification",
    "inspect": ".verification",
    "push": ".hub",
    "pull": ".hub",
    "load": ".runtime",
    "evaluate": ".runtime",
    "Completion": ".runtime",
    "EngineConfig": ".runtime",
    "LanguageModel": ".runtime",
    "SamplingParams": ".runtime",
}

__all__ = [
    "Completion",
    "EngineConfig",
    "LanguageModel",
    "NpuqError",
    "SamplingParams",
    "__version__",
    "convert_checkpoint",
    "evaluate",
    "inspect",
    "load",
    "pull",
    "push",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
