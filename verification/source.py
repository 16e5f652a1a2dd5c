"""Stage *source*: the checkpoint that an artifact was made from, as the conversion rewrote it, and the errors against
it, which must be those of the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..formats.sources.draft_heads import with_heads
from ..formats.sources.rewritten import rewritten
from ..formats.sources.rotated import rotated
from ..formats.sources.weights import WeightSource
from ..models.inventory import take_inventory
from ..models.tensors import Spec
from ..recipes.recipe import STORED, Transform
from .subject import Subject
from .weight_errors import LinearError

# The manifest's error was summed from exact integers, this one in floating point. Where codes leave almost no error,
# what the fixed point leaves off a row (`quant.scales.ScaledRows`) is as large.
_ERROR_TOLERANCE = 1e-3
_ERROR_FLOOR = 1e-5


class Original:
    """The float weights behind an artifact.

    A rotation is computed again. Smoothing depends on calibration: smoothed decoder layers cannot be compared, and
    `notes` name them.
    """

    def __init__(self, subject: Subject, source: WeightSource | None):
        transforms = (subject.manifest or {}).get("transforms") or ()
        self._source = source
        self._smoothed = Transform.SMOOTH in transforms
        self._layers = subject.config.num_hidden_layers
        self.notes: tuple[str, ...] = ()
        if source is None:
            return
        if Transform.ROTATE in transforms:
            source = with_heads(source, subject.config)
            inventory = take_inventory(subject.config, source.weights)
            self._source = rewritten(source, rotated(subject.config, inventory))
        if skipped := sum(self._is_smoothed(spec) for spec in subject.specs.values()):
            self.notes = (
                f"{skipped} tensors were smoothed: they are no longer the source's, weight by weight; "
                "npuq evaluate --source compares what the models compute",
            )

    def of(self, spec: Spec) -> WeightSource | None:
        """The source to compare a weight with; None without a source, and for a smoothed weight."""
        return None if self._is_smoothed(spec) else self._source

    def _is_smoothed(self, spec: Spec) -> bool:
        return self._smoothed and spec.layer is not None and spec.layer < self._layers


def source_problems(subject: Subject, errors: Iterable[LinearError]) -> Iterator[str]:
    """A line for each linear that was made from other weights: its error differs from the manifest's."""
    linears = (subject.manifest or {}).get("linears")
    if not isinstance(linears, dict):
        return
    for error in errors:
        # Codes were copied: the float checkpoint behind them is as good a source, with an error of its own.
        if linears.get(error.name, {}).get("method") == STORED:
            continue
        promised = linears.get(error.name, {}).get("relative_error", error.relative_error)
        if abs(error.relative_error - promised) > _ERROR_TOLERANCE * (promised + error.relative_error) + _ERROR_FLOOR:
            yield (
                f"tensor {error.name!r}: its error against the source is {error.relative_error:.3%}, the manifest has "
                f"{promised:.3%}: it was made from other weights"
            )
