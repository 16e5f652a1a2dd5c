"""Names to choose among, which the command line offers and the runtime checks. Here, because they need no torch."""

from __future__ import annotations

from typing import Final

BACKENDS: Final = ("auto", "cpu", "reference", "ascend")
KV_CACHE_DTYPES: Final = ("auto", "int8")
HUBS: Final = ("huggingface", "modelscope")

CHAT_ARGUMENTS: Final = frozenset({"messages", "system", "tools", "documents", "chat_template"})
"""What a chat template is given by arguments of their own, and so not among its other variables."""
