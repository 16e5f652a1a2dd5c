"""Pytest plugin of the checks that run inside the rig: the emulation, and the models they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch_npu  # noqa: F401

from . import (
    emulate,
    models,
    ops_attention,
    ops_attention_int8,
    ops_grouped,
    ops_matmul,
    ops_norm,
    ops_routing,
    ops_sparse,
)
from .ranks import ops_exchange, pool

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
# Importing them fills the register.
SEMANTICS = (
    ops_norm,
    ops_matmul,
    ops_routing,
    ops_attention,
    ops_attention_int8,
    ops_sparse,
    ops_grouped,
    ops_exchange,
)

Artifacts = Callable[[str], Path]


@pytest.fixture(scope="session", autouse=True)
def emulation() -> Iterator[None]:
    """torch.ops.npu.* computes on CPU tensors while the checks run."""
    torch.set_num_threads(1)
    library = emulate.register()
    yield
    library._destroy()


@pytest.fixture(scope="session")
def ranks() -> Iterator[pool.Pool]:
    """Four processes of the rig."""
    with pool.started(4) as processes:
        yield processes


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """A model by name: "example", "kimi-k2.5", or one of `configs`.

    It is in W4A8; with "-w8a8" or "-float" appended, in that; with "-float-index-q" or "-float-latents" appended, by
    that recipe of `models.FLOAT_RECIPES`; with "-static" appended, its 8-bit linears have a static input scale; with
    "-int8-cache" appended, it has scales for an int8 KV cache.
    """
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("models")
    configs = {
        "v2-lite": models.V2_LITE,
        "kimi": models.KIMI,
        "prolog": models.PROLOG,
        "glm-flash": models.GLM_FLASH,
        "twenty-heads": models.TWENTY_HEADS,
        "prolog-but-heads": models.PROLOG_BUT_HEADS,
        "v32": models.V32,
        "v32-prolog": models.V32_PROLOG,
        "glm-dsa": models.GLM_DSA,
        "glm-dsa-prolog": models.GLM_DSA_PROLOG,
        "glm-dsa-six-heads": models.GLM_DSA_SIX_HEADS,
        "qwen3": models.QWEN3,
        "glm4": models.GLM4,
    }

    def make(name: str) -> Path:
        if name not in made:
            base = name.removesuffix("-float").removesuffix("-w8a8")
            mixed = next((recipe for recipe in models.FLOAT_RECIPES if name.endswith(f"-{recipe}")), None)
            if name.endswith("-int8-cache"):
                made[name] = models.add_cache_scales(make(name.removesuffix("-int8-cache")), folder / name)
            elif name.endswith("-static"):
                made[name] = models.make_static(make(name.removesuffix("-static")), folder / name)
            elif mixed is not None:
                recipe = models.write_recipe(folder / f"{name}.yaml", models.FLOAT_RECIPES[mixed])
                made[name] = models.quantize(make(f"{name.removesuffix(mixed)}float"), folder / name, recipe)
            elif name == "kimi-k2.5-float":
                made[name] = models.write_k25(folder / name)
            elif name.endswith("-float"):
                made[name] = EXAMPLE if base == "example" else models.write_checkpoint(folder / name, configs[base])
            else:
                scheme = "w8a8" if name.endswith("-w8a8") else "w4a8"
                made[name] = models.quantize(make(f"{base}-float"), folder / name, scheme)
        return made[name]

    return make
