"""Families of models, one file each: a table of tensors, and the defaults of config.json. `FAMILIES` lists them."""

from __future__ import annotations

from typing import Any

from ...errors import UnknownModelError
from ..config_reader import shown
from ..family import Family
from . import (
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    kimi_k25,
    qwen3_moe,
)

_MODULES = (
    deepseek_v2,
    deepseek_v3,
    deepseek_v32,
    deepseek_v4,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    kimi_k2,
    kimi_k25,
    qwen3_moe,
)
FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def is_known(model_type: Any) -> bool:
    """True for the `model_type` of a family."""
    return isinstance(model_type, str) and model_type in FAMILIES


def family_of(model_type: Any) -> Family:
    """The family of a config's `model_type`. UnknownModelError when there is none."""
    if not is_known(model_type):
        raise UnknownModelError(unknown_type(model_type), ())
    return FAMILIES[model_type]


def unknown_type(model_type: Any) -> str:
    """The message about an unknown `model_type`."""
    return f"config.json: model_type {shown(model_type)} is unknown; npuq knows {', '.join(sorted(FAMILIES))}"
