"""Kimi-K2: DeepSeek-V3's tensors and keys under a model_type of its own."""

from __future__ import annotations

from dataclasses import replace

from . import deepseek_v3

FAMILY = replace(deepseek_v3.FAMILY, model_type="kimi_k2")
