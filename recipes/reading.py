"""Reading of recipes, by name, from a YAML file, or from an artifact, with every check; errors suggest the nearest
valid word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from enum import Enum
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from ..choices import RECIPES
from ..errors import RecipeError
from ..formats.artifact import RECIPE_NAME
from ..formats.schemes import Scheme
from ..inputs.files import inside, read_given_text, read_text
from ..inputs.yaml_text import MOST_CHARACTERS, parse_yaml
from ..models.roles import Role
from ..quant.scales import Method
from .recipe import AUTO, STORED, LayerRange, Recipe, Rule, Target, Transform

_RECIPE_KEYS = ("name", "target", "method", "rules", "schemes")
_MOST_BYTES = 4 * MOST_CHARACTERS
_MOST_RULES = 1000
_RULE_KEYS = ("roles", "layers", "names", "scheme", "method")


def load_recipe(recipe: str | Path, method: str | None = None) -> Recipe:
    """Read a recipe by name (w4a8, w8a8, float) or from a YAML file; `method` replaces its method.

    Raises RecipeError for a missing or malformed file and for unknown keys and values, with the nearest valid one.
    """
    if str(recipe) in (*RECIPES, STORED):
        text = (files(__package__) / f"{recipe}.yaml").read_text(encoding="utf-8")
        where = f"recipe {recipe}"
    else:
        path = Path(recipe)
        if path.suffix not in (".yaml", ".yml") and not path.exists():
            raise RecipeError(f"no recipe named {str(recipe)!r}{_nearest(str(recipe), RECIPES)}; or give a .yaml file")
        if not path.exists():
            raise RecipeError(f"{path}: no such recipe file; named recipes are {', '.join(RECIPES)}")
        text, where = read_given_text(path, RecipeError, _MOST_BYTES), str(path)
    parsed = _parse(text, where)
    if method is not None and parsed.stored:
        raise RecipeError(f"{where}: keeps the scales of a quantized source: there is none to find; leave --method out")
    if method is not None:
        base, transforms = parse_chain(method, "--method")
        return replace(parsed, method=base, transforms=transforms, auto=method == AUTO)
    return parsed


def artifact_recipe(directory: Path) -> Recipe:
    """The recipe in an artifact. Raises RecipeError when its file is missing or damaged."""
    path = inside(directory, RECIPE_NAME, RecipeError)
    return _parse(read_text(path, RecipeError, _MOST_BYTES), str(path))


def _parse(text: str, where: str) -> Recipe:
    content = parse_yaml(text, where, RecipeError)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a recipe is a mapping with {', '.join(_RECIPE_KEYS)}")
    _check_keys(content, _RECIPE_KEYS, where)
    stored = content.get("schemes") == STORED
    if "schemes" in content and (not stored or content.keys() & {"rules", "method"}):
        raise RecipeError(f"{where}: 'schemes' can only be {STORED!r}, and then nothing is left for rules or a method")
    rules = [] if stored else content.get("rules")
    if not isinstance(rules, list):
        raise RecipeError(f"{where}: 'rules' must be a list (empty: everything stays float)")
    if len(rules) > _MOST_RULES:
        raise RecipeError(f"{where}: {len(rules)} rules; npuq reads {_MOST_RULES} at most: name several tensors in one")
    name = content.get("name", Path(where).stem)
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise RecipeError(f"{where}: 'name' must be a line of text")
    # Stored codes come with scales: no search is needed.
    method, transforms = parse_chain("minmax" if stored else content.get("method", "mse"), where)
    return Recipe(
        name=name,
        target=_member(Target, content.get("target", "engines"), "target", where),
        method=method,
        transforms=transforms,
        auto=content.get("method") == AUTO,
        rules=tuple(_parse_rule(rule, f"{where}, rule {number}") for number, rule in enumerate(rules, start=1)),
        stored=stored,
    )


def _parse_rule(rule: Any, where: str) -> Rule:
    if not isinstance(rule, dict):
        raise RecipeError(f"{where}: a rule is a mapping with {', '.join(_RULE_KEYS)}")
    _check_keys(rule, _RULE_KEYS, where)
    if rule.get("scheme") is None and rule.get("method") is None:
        raise RecipeError(f"{where}: gives neither a scheme nor a method")
    return Rule(
        roles=tuple(_member(Role, role, "role", where) for role in _strings(rule.get("roles"), "roles", where)),
        layers=_ranges(rule.get("layers"), where),
        names=_strings(rule.get("names"), "names", where),
        scheme=None if rule.get("scheme") is None else _scheme(rule["scheme"], where),
        method=None if rule.get("method") is None else _member(Method, rule["method"], "method", where),
    )


def _check_keys(content: Mapping[Any, Any], valid: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in valid:
            raise RecipeError(f"{where}: unknown key {key!r}{_nearest(str(key), valid)}")


def _strings(value: Any, key: str, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if values is None:
        return ()
    if not isinstance(values, list) or not values or not all(isinstance(item, str) and item for item in values):
        raise RecipeError(f"{where}: {key!r} must be text or a list of texts")
    return tuple(values)


def _ranges(value: Any, where: str) -> tuple[LayerRange, ...]:
    if value is None:
        return ()
    parts = value if isinstance(value, list) else str(value).split(",")
    ranges = []
    for part in parts:
        found = _range(str(part))
        if found is None:
            raise RecipeError(
                f"{where}: layers {value!r} is not a list of layers and ranges such as 0-3,7 or first 5, last 7"
            )
        ranges.append(found)
    return tuple(ranges)


def _range(part: str) -> LayerRange | None:
    """The layers of `7`, `0-3`, `first 5` or `last 7`; None for anything else."""
    found = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part, re.ASCII)
    if found is not None:
        first, last = int(found[1]), int(found[2] or found[1])
        return LayerRange(first, last) if first <= last else None
    found = re.fullmatch(r"\s*(first|last)\s+(\d{1,6})\s*", part, re.ASCII)
    if found is None or int(found[2]) < 1:
        return None
    count = int(found[2])
    return LayerRange(0, count - 1) if found[1] == "first" else LayerRange(1, count, from_end=True)


def parse_chain(value: Any, where: str) -> tuple[Method, tuple[Transform, ...]]:
    """Parse `rotate+smooth+gptq`: transforms, each at most once, then the method that finds codes (mse without one).
    `auto` is all of them, smoothing by trial. Raises RecipeError for anything else; `where` names its place."""
    words = str(value).split("+")
    if words == [AUTO]:
        return Method.GPTQ, tuple(Transform)
    transforms = list(Transform)
    if words[-1] in [str(transform) for transform in transforms]:
        words.append(Method.MSE.value)
    if AUTO in words:
        raise RecipeError(f"{where}: method {value!r}: {AUTO!r} is a whole chain and stands alone")
    if words[-1] not in [str(method.value) for method in Method]:
        valid = [*(str(method.value) for method in Method), *map(str, transforms), AUTO]
        raise RecipeError(f"{where}: unknown method {words[-1]!r}{_nearest(words[-1], valid)}")
    method = Method(words[-1])
    if early := [word for word in words[:-1] if word in [str(each.value) for each in Method]]:
        raise RecipeError(f"{where}: method {value!r}: {early[0]!r} can only be the last of a chain")
    found = [_member(Transform, word, "transform", where) for word in words[:-1]]
    if len(set(found)) < len(found):
        raise RecipeError(f"{where}: method {value!r} names a transform twice")
    return method, tuple(sorted(found, key=transforms.index))


def _scheme(value: Any, where: str) -> Scheme:
    """Parse a scheme: its full name or the name without `_DYNAMIC`, in any case; static W8A8 is W8A8_STATIC."""
    # In artifacts the static scheme has the short name of the dynamic one.
    short: dict[str, Scheme] = {"W8A8_STATIC": Scheme.W8A8_STATIC}
    short |= {scheme.value.removesuffix("_DYNAMIC"): scheme for scheme in Scheme if scheme is not Scheme.W8A8_STATIC}
    word = str(value).upper().removesuffix("_DYNAMIC")
    found = short.get(word)
    if found is None:
        raise RecipeError(f"{where}: unknown scheme {value!r}{_nearest(word, short)}")
    return found


Member = TypeVar("Member", bound=Enum)


def _member(kind: type[Member], value: Any, what: str, where: str) -> Member:
    try:
        return kind(value)
    except ValueError:
        valid = tuple(str(member.value) for member in kind)
        raise RecipeError(f"{where}: unknown {what} {value!r}{_nearest(str(value), valid)}") from None


def _nearest(word: str, valid: Iterable[str]) -> str:
    words = [str(word) for word in valid]
    close = get_close_matches(word, words, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(words)}"
