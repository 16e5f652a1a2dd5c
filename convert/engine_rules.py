"""What the loaders of an artifact demand of a recipe, checked against the tensors it was resolved for.

Read from the model loaders of vLLM-Ascend and SGLang (August 2026): a recipe that breaks one of these would convert for
hours into something that no engine loads, or worse, loads wrongly. Refused before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from ..errors import RecipeError
from ..quant.schemes import Scheme
from .architecture import QUANTIZABLE, ROUTED, Inventory, Role, Spec
from .recipe import Assignment, Recipe, Target


def check_engine_rules(recipe: Recipe, inventory: Inventory, assignments: Mapping[str, Assignment]) -> None:
    """Raise RecipeError, naming tensor and rule, when no loader of the recipe's target could load the result."""
    for name, spec in inventory.specs.items():
        _check_tensor(recipe, spec, assignments[name])
    _check_fused(recipe, inventory, assignments)
    _check_experts_alike(recipe, inventory, assignments)


def _check_tensor(recipe: Recipe, spec: Spec, given: Assignment) -> None:
    if given.scheme is not Scheme.FLOAT and spec.role not in QUANTIZABLE:
        _refuse(recipe, spec, given, f"the role {spec.role} must stay FLOAT in every loader")
    if given.scheme is Scheme.W4A8 and spec.role is not Role.ROUTED_EXPERT:
        _refuse(
            recipe, spec, given, "W4A8_DYNAMIC exists only for the main model's routed experts; use W8A8_DYNAMIC here"
        )
    if given.scheme is Scheme.FLOAT and spec.role in ROUTED and recipe.target is Target.ENGINES:
        _refuse(recipe, spec, given, "engines refuse FLOAT routed experts; give them a scheme, or set 'target: npuq'")


def _check_fused(recipe: Recipe, inventory: Inventory, assignments: Mapping[str, Assignment]) -> None:
    """Projections that loaders fuse into one parameter (gate|up, q_a|kv_a) must share a scheme."""
    leader_of = {member: group[0] for group in inventory.fused for member in group[1:]}
    for name, spec in inventory.specs.items():
        prefix, projection, suffix = _split(name)
        leader = f"{prefix}{leader_of.get(projection)}{suffix}"
        if projection not in leader_of or leader not in assignments:
            continue
        if assignments[name].scheme is not assignments[leader].scheme:
            group = ", ".join(next(group for group in inventory.fused if projection in group))
            _refuse(
                recipe,
                spec,
                assignments[name],
                f"{leader!r} is {assignments[leader].scheme.value}; engines fuse {group}: give them one scheme",
            )


def _check_experts_alike(recipe: Recipe, inventory: Inventory, assignments: Mapping[str, Assignment]) -> None:
    """All projections of all routed experts of a layer are one grouped matmul each: one scheme a layer."""
    first: dict[int | None, Spec] = {}
    for name, spec in inventory.specs.items():
        if spec.role not in ROUTED:
            continue
        leader = first.setdefault(spec.layer, spec)
        if assignments[name].scheme is not assignments[leader.name].scheme:
            _refuse(
                recipe,
                spec,
                assignments[name],
                f"{leader.name!r} is {assignments[leader.name].scheme.value}; all experts of a layer need one scheme",
            )


def _split(name: str) -> tuple[str, str, str]:
    """`model.layers.0.mlp.gate_proj.weight` → (`model.layers.0.mlp.`, `gate_proj`, `.weight`)."""
    head, _, leaf = name.rpartition(".")
    prefix, dot, projection = head.rpartition(".")
    return prefix + dot, projection, "." + leaf


def _refuse(recipe: Recipe, spec: Spec, given: Assignment, why: str) -> NoReturn:
    rule = f"rule {given.rule}" if given.rule else "no rule"
    raise RecipeError(f"recipe {recipe.name!r}, {rule}: {given.scheme.value} for {spec.name!r}: {why}")
