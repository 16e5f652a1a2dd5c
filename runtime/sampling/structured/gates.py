"""Where in a reply a grammar begins: after its reasoning, or with its first tool call."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..grammar import Grammar


class AfterReasoning:
    """A grammar for what follows the marker that ends reasoning. The reasoning is free, but does not end the reply.

    begin, end: token ids of the markers. inside: the reply begins within reasoning. may_begin: its first token may
    begin it. ends: end-of-sequence tokens. size: of the vocabulary.
    """

    def __init__(
        self,
        grammar: Grammar,
        begin: int,
        end: int,
        *,
        inside: bool,
        may_begin: bool,
        ends: NDArray[np.int64],
        size: int,
    ):
        self._grammar = grammar
        self._begin, self._end = begin, end
        self._inside, self._may_begin = inside, may_begin
        self._free = np.ones(size, np.bool_)
        self._free[ends] = False

    def mask(self) -> NDArray[np.bool_] | None:
        if self._inside:
            return self._free
        mask = self._grammar.mask()
        if self._may_begin and mask is not None:
            mask = mask.copy()
            mask[self._begin] = True
        return mask

    def accept(self, token: int) -> None:
        if self._inside:
            self._inside = token != self._end
        elif self._may_begin and token == self._begin:
            self._inside = True
        else:
            self._grammar.accept(token)
        self._may_begin = False


class OnceCalled:
    """A grammar for what begins with a marker of tool calls; before it, and without one, the reply is free."""

    def __init__(self, grammar: Grammar, marker: int):
        self._grammar = grammar
        self._marker = marker
        self._called = False

    def mask(self) -> NDArray[np.bool_] | None:
        return self._grammar.mask() if self._called else None

    def accept(self, token: int) -> None:
        self._called = self._called or token == self._marker
        if self._called:
            self._grammar.accept(token)
