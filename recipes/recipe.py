"""A recipe: the scheme and method of each weight, and the target that must be able to load the artifact.

A recipe is YAML: `name`, `target` (`engines` for vLLM-Ascend and SGLang, `npuq` for our own runtime only), `method`,
and `rules`, each with conditions (`roles`, `layers` such as "0-3,7" or "last 7", `names` with * and ?) and settings
(`scheme`, `method`). The recipe's `method` may be a chain: `rotate`, `smooth` or both before the method that finds
codes, as in `rotate+smooth+gptq`, or `auto`. For each setting of a tensor the first matching rule that gives it wins; a
tensor without a matching rule stays float.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import yaml

from ..errors import RecipeError
from ..formats.schemes import Scheme
from ..inputs.patterns import Globs
from ..models.roles import QUANTIZABLE, Role
from ..models.tensors import Spec
from ..quant.scales import Method

STORED = "stored"
AUTO = "auto"


class Transform(str, Enum):
    """A change to a model before quantization that keeps its function."""

    ROTATE = "rotate"
    SMOOTH = "smooth"

    __str__ = str.__str__


class Target(str, Enum):
    """The loaders that an artifact is for; `engines` includes npuq's own runtime."""

    ENGINES = "engines"
    NPUQ = "npuq"

    __str__ = str.__str__


@dataclass(frozen=True)
class LayerRange:
    """The layers from `first` to `last`; with `from_end` counted back from the last decoder layer, which is 1."""

    first: int
    last: int
    from_end: bool = False

    def holds(self, layer: int, decoder_layers: int) -> bool:
        """True for a layer of the range, in a model of so many decoder layers."""
        return self.first <= (decoder_layers - layer if self.from_end else layer) <= self.last

    def __str__(self) -> str:
        if self.from_end:
            return f"last {self.last}"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Rule:
    """Conditions that all must hold (empty: no condition), and the settings for the tensors that meet them."""

    roles: tuple[Role, ...] = ()
    layers: tuple[LayerRange, ...] = ()
    names: tuple[str, ...] = ()
    scheme: Scheme | None = None
    method: Method | None = None

    def matches(self, spec: Spec, decoder_layers: int) -> bool:
        """True where the rule applies to this tensor of a model of so many decoder layers.

        A rule that names neither roles nor tensors applies to quantizable linears only, so that "layers 0-3 in W8A8"
        leaves their norms alone.
        """
        if self.roles or not self.names:
            allowed: Iterable[Role] = self.roles or QUANTIZABLE
            if spec.role not in allowed:
                return False
        if self.layers and not self._holds(spec.layer, decoder_layers):
            return False
        return not self.names or self._globs.matches(spec.name)

    def _holds(self, layer: int | None, decoder_layers: int) -> bool:
        return layer is not None and any(some.holds(layer, decoder_layers) for some in self.layers)

    @cached_property
    def _globs(self) -> Globs:
        return Globs(self.names, "recipe", RecipeError)


@dataclass(frozen=True)
class Recipe:
    """A recipe as read: `method` is the default of rules without their own.

    With `stored` there are no rules: every weight keeps the scheme, codes and scales of the source.
    """

    name: str
    target: Target
    method: Method
    rules: tuple[Rule, ...]
    stored: bool = False
    transforms: tuple[Transform, ...] = ()
    auto: bool = False  # each layer is smoothed or not by trial

    @property
    def rotate(self) -> bool:
        return Transform.ROTATE in self.transforms

    @property
    def smooth(self) -> bool:
        return Transform.SMOOTH in self.transforms

    def scheme_of(self, spec: Spec, decoder_layers: int) -> Scheme:
        """The scheme that the rules give a tensor of a float checkpoint of so many decoder layers."""
        found = (rule.scheme for rule in self.rules if rule.scheme and rule.matches(spec, decoder_layers))
        return next(found, Scheme.FLOAT)

    @property
    def chain(self) -> str:
        """The method with its transforms, as `--method` takes it."""
        return AUTO if self.auto else "+".join([*map(str, self.transforms), self.method.value])

    def to_yaml(self) -> str:
        """The recipe in full, in a form that `load_recipe` reads back; the same recipe always gives the same text."""
        if self.stored:
            content: dict[str, Any] = {"name": self.name, "target": self.target.value, "schemes": STORED}
            return yaml.safe_dump(content, sort_keys=False, width=120)
        rules = []
        for rule in self.rules:
            entry: dict[str, Any] = {}
            if rule.roles:
                entry["roles"] = [str(role) for role in rule.roles]
            if rule.layers:
                entry["layers"] = ",".join(map(str, rule.layers))
            if rule.names:
                entry["names"] = list(rule.names)
            if rule.scheme is not None:
                entry["scheme"] = "W8A8_STATIC" if rule.scheme is Scheme.W8A8_STATIC else rule.scheme.value
            if rule.method is not None:
                entry["method"] = rule.method.value
            rules.append(entry)
        content = {"name": self.name, "target": self.target.value, "method": self.chain, "rules": rules}
        return yaml.safe_dump(content, sort_keys=False, width=120)
