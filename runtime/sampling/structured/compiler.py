"""Compilation of grammars by llguidance."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Final

import numpy as np

from ....errors import GenerationError
from ....inputs.printable import error_line
from ...text.tokenizer import Tokenizer
from ..grammar import Grammar
from .matching import JsonRuns, MatchedGrammar

_MOST_REASON: Final = 300
_PLACE: Final = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")
_EXCERPT: Final = re.compile(r"\n *\d+ \| ")

MakeGrammar = Callable[[], Grammar]
"""Makes the grammar of one completion, in its first state."""


class GrammarCompiler:
    """Compiles grammars for a tokenizer. May be used by several threads.

    ends: end-of-sequence tokens, which a text ends with. markers: token ids that stand for no text, beside special
    tokens. Making one takes about 2 µs a token. Raises GenerationError without llguidance, and for a model without an
    end-of-sequence token.
    """

    def __init__(self, tokenizer: Tokenizer, ends: Collection[int], markers: Iterable[int] = ()):
        try:
            from llguidance import LLMatcher, LLParserLimits, LLTokenizer
        except ImportError:
            raise GenerationError("structured output needs llguidance: pip install 'npuq[serve]'") from None
        known = sorted(token for token in ends if 0 <= token < tokenizer.vocab_size)
        if not known:
            raise GenerationError("structured output needs an end-of-sequence token, and this model names none")
        self._matcher = LLMatcher
        self._limits = LLParserLimits(verbose_errors=False)
        self._vocabulary = _Vocabulary(tokenizer, known[0], markers)
        self._tokenizer = LLTokenizer(self._vocabulary, eos_token=known)  # type: ignore[arg-type]
        self.ends = np.array(known)
        self.size = tokenizer.vocab_size

    def compile(self, grammar: str) -> MakeGrammar:
        """Compile a grammar in llguidance's form of Lark. JSON schemas in it have been checked (`checking.py`).

        Raises GenerationError with the library's words for a grammar that it does not take.
        """
        first = self._matcher(
            self._tokenizer, self._matcher.grammar_from_lark(grammar), log_level=0, limits=self._limits
        )
        # Some faults show with the first mask only, which also costs more than later ones.
        first.compute_bitmask()
        if first.is_error():
            raise GenerationError(f"the grammar of the reply cannot be used: {in_a_line(first.get_error())}")
        vocabulary = self._vocabulary
        return lambda: MatchedGrammar(first.deep_copy(), self.size, JsonRuns(vocabulary.tokens, vocabulary.first_bytes))


def in_a_line(message: str) -> str:
    """The library's words in a line, without the place in the grammar and the lines of it around."""
    words = _PLACE.sub("", _EXCERPT.split(message, maxsplit=1)[0])
    return error_line(ValueError(words), _MOST_REASON)


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end: int, markers: Iterable[int]):
        self._tokenizer = tokenizer
        self.eos_token_id = end
        self.special_token_ids = sorted({*tokenizer.special_ids.values(), *markers})
        self.tokens = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
        self.first_bytes = np.array([token[0] if token else 0 for token in self.tokens], np.uint8)

    def __call__(self, text: bytes | str) -> list[int]:
        plain = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(plain, special=False)
