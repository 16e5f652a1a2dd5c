"""What an artifact's weights are compared with: the source's, rewritten as the conversion rewrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..formats.sources.rewritten import rewritten
from ..formats.sources.rotated import rotated
from ..formats.sources.weights import WeightSource
from ..models.inventory import take_inventory
from ..models.tensors import Spec
from ..recipes.recipe import Transform
from .structure import Layout


class Original:
    """The float weights behind an artifact.

    A rotation is computed again. Smoothing depends on calibration: the decoder layers it touched have nothing to be
    compared with (`skipped` tensors of them).
    """

    def __init__(self, layout: Layout, source: WeightSource | None, manifest: Mapping[str, Any]):
        transforms = manifest.get("transforms") or ()
        self._source = source
        self._smoothed = Transform.SMOOTH in transforms
        self._layers = layout.config.num_hidden_layers
        if source is not None and Transform.ROTATE in transforms:
            inventory = take_inventory(layout.config, source.weights)
            self._source = rewritten(source, rotated(layout.config, inventory))
        self.skipped = 0
        if source is not None:
            self.skipped = sum(self._is_smoothed(spec) for spec in layout.specs.values())

    def of(self, spec: Spec) -> WeightSource | None:
        """The source to compare a tensor with; None where there is none, or nothing to compare."""
        return None if self._is_smoothed(spec) else self._source

    def _is_smoothed(self, spec: Spec) -> bool:
        return self._smoothed and spec.layer is not None and spec.layer < self._layers
