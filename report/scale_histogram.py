"""The distribution of an artifact's scales, role by role, in eighths of an octave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import to_float32
from ..errors import ArtifactError
from ..formats.checkpoint import Checkpoint
from ..formats.schemes import SCALE, WEIGHT
from ..progress import Progress, Silent, Task
from .linears import LinearFacts

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS_PER_OCTAVE = 8
# Every positive float32, the subnormal ones too, is within 2**-149 … 2**128.
_LOWEST, _HIGHEST = -149, 128


@dataclass(frozen=True)
class ScaleHistogram:
    """Output channels of a role and scheme by their scale: `counts[i]` of them have 2^(first + i/8) <= scale < 2^(first
    + (i+1)/8)."""

    role: str
    scheme: str
    first: float
    counts: tuple[int, ...]

    @property
    def channels(self) -> int:
        return sum(self.counts)


def scale_name(linear: LinearFacts) -> str:
    """The name of the tensor with one scale for each output channel."""
    return linear.name.removesuffix(WEIGHT) + SCALE


def scale_histograms(
    checkpoint: Checkpoint, linears: Sequence[LinearFacts], progress: Progress | None = None
) -> tuple[ScaleHistogram, ...]:
    """The histograms of all scales, largest role first, one linear's scales in memory at a time.

    Raises CheckpointError for a linear without scales, ArtifactError for a scale that is not positive and finite.
    """
    size = (_HIGHEST - _LOWEST) * BINS_PER_OCTAVE
    totals: dict[tuple[str, str], NDArray[np.int64]] = {}
    watch = progress or Silent()
    watch.start(Task("report", len(linears), "linears"))
    for linear in linears:
        name = scale_name(linear)
        scale = to_float32(checkpoint.read_array(name), checkpoint.info(name).dtype).reshape(-1)
        if not ((scale > 0) & np.isfinite(scale)).all():
            raise ArtifactError(
                f"{checkpoint.info(name).file}: tensor {name!r} has a scale that is not positive and finite; "
                "run npuq verify, or convert again"
            )
        bins = np.floor((np.log2(scale.astype(np.float64)) - _LOWEST) * BINS_PER_OCTAVE).astype(np.int64)
        total = totals.setdefault((linear.role, linear.scheme), np.zeros(size, np.int64))
        total += np.bincount(bins.clip(0, size - 1), minlength=size)
        watch.advance(1)
    found = [_trimmed(role, scheme, total) for (role, scheme), total in totals.items()]
    return tuple(sorted(found, key=lambda histogram: (-histogram.channels, histogram.role, histogram.scheme)))


def _trimmed(role: str, scheme: str, total: NDArray[np.int64]) -> ScaleHistogram:
    used = np.flatnonzero(total)
    first, last = int(used[0]), int(used[-1])
    counts = tuple(map(int, total[first : last + 1].tolist()))
    return ScaleHistogram(role, scheme, _LOWEST + first / BINS_PER_OCTAVE, counts)
