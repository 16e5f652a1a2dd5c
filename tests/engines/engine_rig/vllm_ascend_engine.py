"""vLLM's own DeepSeek model with vLLM-Ascend's layers and quantization, built and loaded as one rank of many."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import torch
import vllm_ascend.ascend_config
import vllm_ascend.distributed.parallel_state as ascend_state
import vllm_ascend.ops.fused_moe.fused_moe_0_23_0 as ascend_moe
import vllm_ascend.utils
from torch import Tensor, nn
from vllm.config import CompilationConfig
from vllm.config import vllm as vllm_config_module
from vllm.config.compilation import CompilationMode
from vllm.config.kernel import KernelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.distributed import parallel_state
from vllm.transformers_utils.config import get_config
from vllm_ascend.ops.mla import AscendMultiHeadLatentAttention
from vllm_ascend.quantization.modelslim_config import AscendModelSlimConfig
from vllm_ascend.quantization.utils import detect_quantization_method

from .nz import cast_where_it_fits
from .parameters import check_filled, poison
from .shims import Group

# Attention has no weights of its own but the linears that it is given; communication is not part of loading.
AscendMultiHeadLatentAttention.__init__ = lambda self, *args, **kwargs: nn.Module.__init__(self)
ascend_moe.setup_moe_comm_method = lambda config: None

# vLLM gives its draft the embedding and the head of the model that it drafts for, whatever was loaded.
BORROWED_BY_DRAFT = ("embed_tokens", "shared_head.head")


def detect(directory: Path) -> str | None:
    """The quantization that vLLM-Ascend finds without any flag."""
    return detect_quantization_method(str(directory))


def build(directory: Path, weights: Iterable[tuple[str, Tensor]], tp: int, ep: int, rank: int, mtp: bool) -> nn.Module:
    """The model (or its MTP draft) of `rank`, loaded and processed. Expert parallelism spans all ranks, as in vLLM."""
    if ep not in (1, tp):
        raise ValueError(f"vLLM spreads experts over all {tp} ranks or over none, not {ep}")
    _join(tp, ep, rank)
    config = _config(directory, tp, ep, mtp)
    vllm_config_module._current_vllm_config = config
    vllm_ascend.ascend_config.init_ascend_config(config)
    vllm_ascend.utils.register_ascend_customop(config)
    from vllm.model_executor.models.deepseek_mtp import DeepSeekMTP
    from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM

    model = (DeepSeekMTP if mtp else DeepseekV3ForCausalLM)(vllm_config=config)
    poison(model)
    model.load_weights(iter(weights))
    check_filled(model, BORROWED_BY_DRAFT if mtp else ())
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
    return model


def moe_scheme(directory: Path, tp: int) -> object:
    """The scheme for W4A8 experts as one of `tp` ranks makes it, before any weight."""
    from vllm_ascend.quantization.methods.w4a8 import AscendW4A8DynamicFusedMoEMethod

    _join(tp, 1, 0)
    vllm_config_module._current_vllm_config = _config(directory, tp, 1, False)
    vllm_ascend.ascend_config.init_ascend_config(vllm_config_module._current_vllm_config)
    return AscendW4A8DynamicFusedMoEMethod()


def _join(tp: int, ep: int, rank: int) -> None:
    whole, one = Group(tp, rank), Group(1, 0)
    parallel_state._TP = parallel_state._WORLD = whole
    parallel_state._EP = whole if ep > 1 else one
    for name in ("_PP", "_DP", "_PCP", "_DCP"):
        setattr(parallel_state, name, one)
    ascend_state._MC2 = Group(tp, rank)
    del ascend_state._MC2.device_group  # the schemes then do without the name of its HCCL communicator


def _config(directory: Path, tp: int, ep: int, mtp: bool) -> Any:
    """What the layers read of vLLM's configuration. Its own classes would ask the device for its properties."""
    hf_config = get_config(str(directory), trust_remote_code=False)
    quant_config = AscendModelSlimConfig()
    quant_config.maybe_update_config(str(directory), hf_config)
    model = Namespace(
        hf_config=hf_config,
        hf_text_config=hf_config,
        model=str(directory),
        dtype=torch.bfloat16,
        use_mla=True,
        is_deepseek_mla=True,
        enforce_eager=True,
        max_model_len=256,
        quantization="ascend",
        runner_type="generate",
        is_encoder_decoder=False,
    )
    parallel = Namespace(
        tensor_parallel_size=tp,
        enable_expert_parallel=ep > 1,
        world_size=tp,
        world_size_across_dp=tp,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        data_parallel_size_local=1,
        data_parallel_rank=0,
        prefill_context_parallel_size=1,
        decode_context_parallel_size=1,
        use_sequence_parallel_moe=False,
        eplb_config=Namespace(num_redundant_experts=0),
        enable_eplb=False,
        enable_dbo=False,
        use_ubatching=False,
        expert_placement_strategy="linear",
        all2all_backend="allgather_reducescatter",
        is_moe_model=True,
    )
    # The draft is built under the target's configuration; only the draft's own part says that it is an MTP model.
    draft = SpeculativeConfig.hf_config_override(get_config(str(directory), trust_remote_code=False)) if mtp else None
    speculative = Namespace(draft_model_config=Namespace(hf_config=draft), num_speculative_tokens=1, method="mtp")
    native = {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
    return Namespace(
        model_config=model,
        quant_config=quant_config,
        parallel_config=parallel,
        speculative_config=speculative if mtp else None,
        cache_config=Namespace(cache_dtype="auto", block_size=128, enable_prefix_caching=False),
        scheduler_config=Namespace(max_num_batched_tokens=256, max_num_seqs=8, enable_chunked_prefill=True),
        compilation_config=CompilationConfig(custom_ops=["all"], mode=CompilationMode.NONE),
        kernel_config=KernelConfig(ir_op_priority=native),
        observability_config=Namespace(enable_layerwise_nvtx_tracing=False),
        load_config=Namespace(load_format="auto"),
        device_config=Namespace(device="cpu", device_type="cpu"),
        additional_config={},
        kv_transfer_config=None,
        lora_config=None,
        profiler_config=None,
    )


vllm_ascend.utils.torch_npu.npu_format_cast = cast_where_it_fits
