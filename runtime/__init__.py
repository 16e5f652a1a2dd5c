"""The runtime: an artifact (or an unquantized checkpoint) goes in, tokens come out.

`model.py` is the model, written against the operators of a backend (`ops/`). `engine.py` feeds it steps.

The names below are imported when they are first used: checks of a checkpoint's text files need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine_config import EngineConfig
    from .evaluation.layer_error import LayerError, layer_errors
    from .evaluation.perplexity import Evaluation, evaluate
    from .llm import LanguageModel, load
    from .loop import Loop
    from .request import Request
    from .sampling.grammar import Grammar
    from .sampling.logprobs import TokenLogprobs
    from .sampling.params import SamplingOptions, SamplingParams
    from .stream import Completion, Inbox, Piece, Stream
    from .text.tokenizer import Tokenizer

_HOMES = {
    "Completion": ".stream",
    "EngineConfig": ".engine_config",
    "Evaluation": ".evaluation.perplexity",
    "Grammar": ".sampling.grammar",
    "Inbox": ".stream",
    "LanguageModel": ".llm",
    "LayerError": ".evaluation.layer_error",
    "Loop": ".loop",
    "Piece": ".stream",
    "Request": ".request",
    "SamplingOptions": ".sampling.params",
    "SamplingParams": ".sampling.params",
    "Stream": ".stream",
    "TokenLogprobs": ".sampling.logprobs",
    "Tokenizer": ".text.tokenizer",
    "evaluate": ".evaluation.perplexity",
    "layer_errors": ".evaluation.layer_error",
    "load": ".llm",
}

__all__ = [
    "Completion",
    "EngineConfig",
    "Evaluation",
    "Grammar",
    "Inbox",
    "LanguageModel",
    "LayerError",
    "Loop",
    "Piece",
    "Request",
    "SamplingOptions",
    "SamplingParams",
    "Stream",
    "TokenLogprobs",
    "Tokenizer",
    "evaluate",
    "layer_errors",
    "load",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)
