"""Assignments: the scheme and method that a recipe gives each tensor of a checkpoint. Refused where no loader could
load the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...engines.requirements import violations
from ...errors import RecipeError
from ...formats.schemes import Scheme
from ...models.tensors import Spec
from ...quant.scales import Method
from ...recipes.recipe import Recipe


@dataclass(frozen=True)
class Assignment:
    """The scheme and method of one tensor; `rule` is the 1-based number of the rule that gave the scheme, 0: none."""

    scheme: Scheme
    method: Method
    rule: int


def check_source(recipe: Recipe, quantized: bool) -> None:
    """Raise RecipeError for a recipe that the source cannot follow: quantized weights can only keep their schemes."""
    if quantized and not recipe.stored:
        raise RecipeError(
            f"recipe {recipe.name!r} is for a float checkpoint, and this one is quantized already: leave --recipe out "
            "to keep its codes, or convert the float checkpoint"
        )
    if recipe.stored and not quantized:
        raise RecipeError(f"recipe {recipe.name!r} keeps the schemes of the source, and this one is not quantized")


def resolve(
    recipe: Recipe,
    specs: Mapping[str, Spec],
    decoder_layers: int,
    stored: Mapping[str, Scheme] | None = None,
) -> dict[str, Assignment]:
    """The scheme and method of every tensor, before the engines' requirements are checked (`check_recipe`).

    decoder_layers: those of the model, from which a recipe's "last 7" counts back. stored: the schemes of a quantized
    source.
    """
    if recipe.stored and stored is not None:
        return {name: Assignment(stored[name], recipe.method, 0) for name in specs}
    return {name: _assign(recipe, spec, decoder_layers) for name, spec in specs.items()}


def _assign(recipe: Recipe, spec: Spec, decoder_layers: int) -> Assignment:
    scheme, method, number = None, None, 0
    for position, rule in enumerate(recipe.rules, start=1):
        if (scheme is not None or rule.scheme is None) and (method is not None or rule.method is None):
            continue
        if not rule.matches(spec, decoder_layers):
            continue
        if scheme is None and rule.scheme is not None:
            scheme, number = rule.scheme, position
        method = method or rule.method
    return Assignment(scheme or Scheme.FLOAT, method or recipe.method, number)


def check_recipe(recipe: Recipe, specs: Mapping[str, Spec], assignments: Mapping[str, Assignment]) -> None:
    """Raise RecipeError, naming tensor and rule, when no loader of the recipe's target could load the result."""
    for violation in violations(specs, lambda name: assignments[name].scheme, recipe.target):
        if recipe.stored:
            raise RecipeError(f"the source has {violation}; quantize the float checkpoint again, or convert that one")
        number = assignments[violation.spec.name].rule
        raise RecipeError(f"recipe {recipe.name!r}, {f'rule {number}' if number else 'no rule'}: {violation}")
