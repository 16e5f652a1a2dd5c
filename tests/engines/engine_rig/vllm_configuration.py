"""vLLM's configuration as its layers read it. Its own constructors would ask the device for its properties."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import torch
import vllm.config
from vllm.config import CompilationConfig, ModelConfig, MultiModalConfig
from vllm.config.compilation import CompilationMode
from vllm.config.kernel import KernelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.transformers_utils.config import get_config

from . import vllm_ascend_release as release


def vllm_configuration(directory: Path, tp: int, ep: int, mtp: bool) -> Any:
    """The configuration of one of `tp` ranks; with `mtp` of a server that drafts by the model's own MTP layer."""
    hf_config = get_config(str(directory), trust_remote_code=False)
    quant_config = release.QuantizationConfig()
    quant_config.maybe_update_config(str(directory), hf_config)
    model = Namespace(
        hf_config=hf_config,
        hf_text_config=getattr(hf_config, "text_config", hf_config),
        model=str(directory),
        dtype=torch.bfloat16,
        use_mla=True,
        is_deepseek_mla=True,
        enforce_eager=True,
        max_model_len=256,
        quantization="ascend",
        runner_type="generate",
        is_encoder_decoder=False,
        enable_return_routed_experts=False,
        head_dtype=torch.bfloat16,
        multimodal_config=MultiModalConfig(),
    )
    model.get_multimodal_config = lambda: model.multimodal_config
    # As `--quantization ascend` says it, against what config.json says.
    stated = getattr(hf_config, "quantization_config", None)
    model.model_arch_config = Namespace(quantization_config=stated)
    model._parse_quant_hf_config = lambda hf_config: stated
    ModelConfig._verify_quantization(model)
    parallel = _defaults(
        "ParallelConfig",
        tensor_parallel_size=tp,
        enable_expert_parallel=ep > 1,
        world_size=tp,
        world_size_across_dp=tp,
        use_sequence_parallel_moe=False,
        use_ubatching=False,
        is_moe_model=True,
    )
    # The draft is built under the target's configuration; only the draft's own part says that it is an MTP model.
    draft = SpeculativeConfig.hf_config_override(get_config(str(directory), trust_remote_code=False)) if mtp else None
    speculative = Namespace(
        draft_model_config=Namespace(hf_config=draft),
        num_speculative_tokens=1,
        method="mtp",
        parallel_drafting=False,
        use_eagle=lambda: True,  # as of any draft that reads the model's hidden states
    )
    native = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
    return Namespace(
        model_config=model,
        quant_config=quant_config,
        parallel_config=parallel,
        speculative_config=speculative if mtp else None,
        cache_config=_defaults("CacheConfig", block_size=128, enable_prefix_caching=False),
        scheduler_config=_defaults("SchedulerConfig", max_num_batched_tokens=256, max_num_seqs=8),
        # With indexer_kv_dtype "auto", its default, the caller's choice stands.
        attention_config=_defaults("AttentionConfig", resolve_indexer_kv_dtype=lambda default: default),
        compilation_config=CompilationConfig(custom_ops=["all"], mode=CompilationMode.NONE),
        kernel_config=KernelConfig(ir_op_priority=native),
        observability_config=Namespace(enable_layerwise_nvtx_tracing=False),
        load_config=Namespace(load_format="auto"),
        device_config=Namespace(device="cpu", device_type="cpu"),
        additional_config={},
        kv_transfer_config=None,
        lora_config=None,
        profiler_config=None,
        use_v2_model_runner=False,
    )


def _defaults(name: str, **stated: Any) -> Namespace:
    """The fields of a class of vLLM's configuration, with these values or their defaults. None of its checks run."""
    fields = {}
    for field in dataclasses.fields(getattr(vllm.config, name)):
        # Its classes are pydantic's: a default may stand in pydantic's own description of the field.
        default, factory = field.default, field.default_factory
        if hasattr(default, "is_required"):
            if default.is_required():
                continue
            default, factory = default.default, default.default_factory
        fields[field.name] = factory() if callable(factory) else default
    return Namespace(**fields | stated)
