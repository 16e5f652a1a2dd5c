"""The calibration in a manifest: the tokens that reached each expert, and the fallbacks of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ArtifactError
from ..formats.artifact import MANIFEST_NAME

KEY = "calibration"
FALLBACKS = ("blended", "data-free")


@dataclass(frozen=True)
class LayerCoverage:
    """The coverage and errors of one layer.

    expert_tokens: tokens routed to each expert (empty in a dense layer). fallbacks: those of experts with too few
    tokens for a Hessian of their own. The relative errors of the layer's output and of its latent in an int8 KV cache
    are None where they were not measured. smoothing: strength by place (empty without).
    """

    layer: int
    expert_tokens: tuple[int, ...]
    fallbacks: Mapping[int, str]
    output_error: float | None
    kv_cache_error: float | None
    smoothing: Mapping[str, float]


@dataclass(frozen=True)
class Coverage:
    """The calibration set and its reach."""

    name: str
    sha256: str
    samples: int
    sequence_length: int
    tokens: int
    layers: tuple[LayerCoverage, ...]


def read_coverage(manifest: Mapping[str, Any]) -> Coverage | None:
    """The manifest's `calibration`; None without one. Raises ArtifactError when it is damaged."""
    stored = manifest.get(KEY)
    if stored is None:
        return None
    try:
        layers = tuple(
            _layer(int(number), layer) for number, layer in sorted(stored["layers"].items(), key=lambda i: int(i[0]))
        )
        return Coverage(
            name=str(stored["name"]),
            sha256=str(stored["sha256"]),
            samples=int(stored["samples"]),
            sequence_length=int(stored["sequence_length"]),
            tokens=int(stored["tokens"]),
            layers=layers,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{MANIFEST_NAME}: {KEY!r} is damaged ({error!r}); convert again") from error


def _layer(number: int, stored: Mapping[str, Any]) -> LayerCoverage:
    tokens = tuple(int(count) for count in stored.get("expert_tokens") or ())
    fallbacks = {int(expert): str(kind) for expert, kind in (stored.get("fallbacks") or {}).items()}
    errors = {key: stored.get(key) for key in ("output_error", "kv_cache_error")}
    smoothing = {str(name): float(strength) for name, strength in (stored.get("smoothing") or {}).items()}
    if any(count < 0 for count in tokens) or any(not 0 <= expert < len(tokens) for expert in fallbacks):
        raise ValueError(f"layer {number}: a count below 0, or a fallback of an expert that is not there")
    if unknown := set(fallbacks.values()) - set(FALLBACKS):
        raise ValueError(f"layer {number}: fallback {min(unknown)!r}")
    if wrong := [key for key, error in errors.items() if error is not None and not math.isfinite(error)]:
        raise ValueError(f"layer {number}: {wrong[0]} {errors[wrong[0]]}")
    if not all(map(math.isfinite, smoothing.values())):
        raise ValueError(f"layer {number}: a strength that is not finite")
    output, kv_cache = (None if error is None else float(error) for error in errors.values())
    return LayerCoverage(number, tokens, fallbacks, output, kv_cache, smoothing)
