"""The runtime: an artifact (or an unquantized checkpoint) goes in, tokens come out.

`model.py` is the model, written against the operators of a backend (`ops/`). `engine.py` feeds it steps.
"""

from .engine import EngineConfig
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
