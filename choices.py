"""Choices that the command line offers and the runtime checks, in a module without torch."""

from __future__ import annotations

from typing import Final

BACKENDS: Final = ("auto", "cpu", "reference", "ascend")
KV_CACHE_DTYPES: Final = ("auto", "int8")
HUBS: Final = ("huggingface", "modelscope")
COMPUTE_DTYPES: Final = ("float32", "bfloat16")
ENGINES: Final = ("vllm-ascend", "sglang")
RECIPES: Final = ("w4a8", "w8a8", "float")
METHODS: Final = ("minmax", "mse", "gptq", "smooth", "rotate", "rotate+smooth+gptq", "auto")
"""The methods that a shell completes; others are chains of these."""
PROGRESS_FORMS: Final = ("auto", "bar", "lines", "json", "none")

REASONING_FORMATS: Final = ("auto", "none", "deepseek", "kimi")
TOOL_FORMATS: Final = ("auto", "none", "deepseek-v3", "deepseek-v31", "kimi-k2", "glm-4.5", "qwen3")

TEMPLATE_ARGUMENTS: Final = frozenset({"messages", "system", "tools", "documents", "chat_template"})
"""Names reserved among a chat template's variables: each is an argument of its own."""
