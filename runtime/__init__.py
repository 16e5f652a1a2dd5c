"""The runtime: an artifact (or an unquantized checkpoint) goes in, tokens come out.

The model is written once (`model.py`) against the operators of a backend (`ops/`); the engine feeds it steps.
"""

from .engine import EngineConfig
from .evaluation import Evaluation, evaluate
from .layer_error import LayerError, layer_errors
from .llm import Completion, LanguageModel, Piece, load
from .sampler import SamplingParams

__all__ = [
    "Completion",
    "EngineConfig",
    "Evaluation",
    "LanguageModel",
    "LayerError",
    "Piece",
    "SamplingParams",
    "evaluate",
    "layer_errors",
    "load",
]
