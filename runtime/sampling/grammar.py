"""The hook for structured output: a grammar that says which tokens may come next."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Grammar(Protocol):
    """The grammar of one sequence, in the state after its tokens so far.

    Both methods raise GenerationError for a state that cannot go on; the sequence then ends with "error".
    """

    def mask(self) -> NDArray[np.bool_] | None:
        """The tokens allowed next, bool `[vocab]`; None allows all. A shorter mask allows none of the tokens behind it.

        End-of-sequence tokens are allowed where the text may end. A mask without any token is a dead end.
        """

    def accept(self, token: int) -> None:
        """Go on to the state after a token, one that the mask allowed."""
