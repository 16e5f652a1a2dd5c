"""What the engines that load an artifact (vLLM-Ascend, SGLang) demand of it."""

from .placement import check_placement

__all__ = ["check_placement"]
