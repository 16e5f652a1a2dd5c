"""The widths of manifold-constrained hyper-connections (DeepSeek-V4): a residual of several streams.

A block reads a weighted sum of the streams. Its output is added to each of them with a weight, and the streams are
mixed by a doubly stochastic matrix. All weights are computed from the streams, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from .config_reader import ConfigReader

_MAX_STREAMS: Final = 64
_MAX_ITERATIONS: Final = 1000


@dataclass(frozen=True)
class HyperConnections:
    """The streams of the residual, under Hugging Face's names.

    hc_mult: streams. hc_sinkhorn_iters: rounds that make the mixing matrix doubly stochastic. hc_eps: the addend of
    its entries and of the weights.
    """

    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float

    @classmethod
    def read(cls, read: ConfigReader) -> HyperConnections:
        """Read the keys with DeepSeek-V4's defaults; CheckpointError names a key that is malformed."""
        return cls(
            hc_mult=read.size("hc_mult", 4, most=_MAX_STREAMS),
            hc_sinkhorn_iters=read.size("hc_sinkhorn_iters", 20, most=_MAX_ITERATIONS),
            hc_eps=read.number("hc_eps", 1e-6, 0.0, 1.0),
        )

    def sizes(self, hidden: int) -> dict[str, int]:
        """Words of a table's shapes: the streams side by side, and the weights that are computed from them."""
        return {
            "streams": self.hc_mult,
            "flat_streams": self.hc_mult * hidden,
            "stream_weights": (2 + self.hc_mult) * self.hc_mult,
            "one": 1,
            "three": 3,
        }


class HyperConnectionsReader(Protocol):
    """Reads the streams of a family's residual from config.json: a column of the family."""

    def read(self, read: ConfigReader) -> HyperConnections:
        """Read the keys; CheckpointError names a key that is malformed."""
