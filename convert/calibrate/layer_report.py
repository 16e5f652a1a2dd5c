"""The measurements of calibration in a decoder layer: for the manifest, and for the state that a later run continues
from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...deferred import torch
from ...errors import ConversionError
from ...inputs.forms import Each, Form, Items, Keys, check_form, is_count, is_number, is_text
from .layers.kv_cache import LatentScale

if TYPE_CHECKING:
    from torch import Tensor

_REQUIRED: dict[str, Form] = {
    "expert_tokens": Items(is_count),
    "fallbacks": Each(is_text),
    "output_error": is_number,
    "linear_errors": Each(is_number),
}
_KV_CACHE: dict[str, Form] = {
    "kv_cache_error": is_number,
    "kv_cache_scale": Items(lambda value: type(value) is float and value > 0),
}
_TRIALS = Keys({"smooth": is_number, "not": is_number}, frozenset({"smooth", "not"}))
_FORM = Keys(
    {
        **_REQUIRED,
        **_KV_CACHE,
        "smoothing": Each(is_number),
        "smooth": lambda value: type(value) is bool,
        "trials": _TRIALS,
    },
    frozenset(_REQUIRED),
)


@dataclass(frozen=True)
class Trials:
    """Relative errors at a layer's output, with smoothing and without, on the first samples."""

    smooth: float
    plain: float

    @property
    def prefer_smoothing(self) -> bool:
        """True where smoothing leaves no larger error."""
        return self.smooth <= self.plain


@dataclass(frozen=True)
class Choice:
    """The choice of `auto` for a layer: smoothing or not, and the trials that decided; None where time allowed none."""

    smooth: bool
    trials: Trials | None


@dataclass(frozen=True)
class LayerReport:
    """One layer, quantized on calibration text.

    expert_tokens: tokens routed to each expert, none in a dense layer. fallbacks: expert index → the fallback for a
    Hessian of its own tokens. output_error: ‖quantized − float‖ / ‖float‖ of the hidden states after the layer.
    linear_errors: tensor name → relative error of a linear's output. kv_cache: the scales of an int8 cache of the
    latent, and their error; None where attention cannot have such a cache. smoothing: strength by place; None without
    smoothing. choice: only of `auto`.
    """

    expert_tokens: tuple[int, ...]
    fallbacks: Mapping[str, str]
    output_error: float
    linear_errors: Mapping[str, float]
    kv_cache: LatentScale | None
    smoothing: Mapping[str, float] | None = None
    choice: Choice | None = None

    def manifest_entry(self) -> dict[str, Any]:
        """The layer's entry in the manifest. KV scales and errors of linears are kept elsewhere."""
        entry: dict[str, Any] = {}
        if self.choice is not None:
            entry["smooth"] = self.choice.smooth
            if self.choice.trials is not None:
                entry["trials"] = {"smooth": self.choice.trials.smooth, "not": self.choice.trials.plain}
        entry["expert_tokens"] = list(self.expert_tokens)
        entry["fallbacks"] = dict(self.fallbacks)
        entry["output_error"] = self.output_error
        if self.kv_cache is not None:
            entry["kv_cache_error"] = self.kv_cache.error
        if self.smoothing is not None:
            entry["smoothing"] = dict(self.smoothing)
        return entry

    def as_json(self) -> dict[str, Any]:
        """All fields, as `from_json` reads them."""
        entry = {**self.manifest_entry(), "linear_errors": dict(self.linear_errors)}
        return entry if self.kv_cache is None else {**entry, "kv_cache_scale": self.kv_cache.scale.tolist()}

    @classmethod
    def from_json(cls, value: Any) -> LayerReport:
        """Restore a report from `as_json`, to the bit. Raises ConversionError for any other value."""
        check_form(value, _FORM, "the report of a calibrated layer", ConversionError)
        choice = None
        if "smooth" in value:
            trials = value.get("trials")
            choice = Choice(value["smooth"], None if trials is None else Trials(trials["smooth"], trials["not"]))
        return cls(
            expert_tokens=tuple(value["expert_tokens"]),
            fallbacks=value["fallbacks"],
            output_error=value["output_error"],
            linear_errors=value["linear_errors"],
            kv_cache=_kv_cache(value),
            smoothing=value.get("smoothing"),
            choice=choice,
        )


def _kv_cache(value: Mapping[str, Any]) -> LatentScale | None:
    """The scales of an int8 cache and their error, which come together. ConversionError for one without the other."""
    scale, error = value.get("kv_cache_scale"), value.get("kv_cache_error")
    if (scale is None) != (error is None):
        raise ConversionError("the report of a calibrated layer has one of kv_cache_scale and kv_cache_error alone")
    return None if scale is None or error is None else LatentScale(_tensor(scale), error)


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)
