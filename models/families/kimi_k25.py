"""Kimi-K2.5 and K2.6: Kimi-K2 as the text model of a vision model, whose tower and projector stay as they are."""

from __future__ import annotations

from dataclasses import replace

from . import deepseek_v3, kimi_k2

FAMILY = replace(
    kimi_k2.FAMILY,
    model_type="kimi_k25",
    architecture="KimiK25ForConditionalGeneration",
    prefix="language_model.",
    # transformers saves the second, and has no class for the first.
    text_types=(kimi_k2.FAMILY.model_type, deepseek_v3.FAMILY.model_type),
    passthrough=("vision_tower.*", "mm_projector.*"),
    # NVIDIA's NVFP4 checkpoints.
    renamed=("language_model.layers.",),
)
