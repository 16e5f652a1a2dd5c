"""Where the release of vLLM-Ascend that is on the path keeps the classes that the rig names."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("vllm_ascend.quantization.configs") is None:  # 0.23
    import vllm_ascend.ops.fused_moe.fused_moe_0_23_0 as moe
    from vllm_ascend.quantization.methods.w4a8 import AscendW4A8DynamicFusedMoEMethod as W4A8Experts
    from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig as QuantizationConfig

    # It builds an indexer in every layer.
    UNLOADABLE = ("glm-5.2",)
else:
    import vllm_ascend.ops.fused_moe.fused_moe as moe
    from vllm_ascend.quantization.configs.modelslim_config import AscendModelSlimConfig as QuantizationConfig
    from vllm_ascend.quantization.methods.w4a8.w4a8 import AscendW4A8DynamicFusedMoEMethod as W4A8Experts

    UNLOADABLE = ()

__all__ = ["UNLOADABLE", "QuantizationConfig", "W4A8Experts", "moe"]
