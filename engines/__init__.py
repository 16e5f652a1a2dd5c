"""The requirements of engines (vLLM-Ascend, SGLang) on an artifact that they load."""

from .placement import check_placement, tested_releases

__all__ = ["check_placement", "tested_releases"]
