"""vLLM's own DeepSeek model with vLLM-Ascend's layers and quantization, built and loaded as one rank of many."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import torch
import vllm_ascend.ascend_config
import vllm_ascend.distributed.parallel_state as ascend_state
import vllm_ascend.utils
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import vllm as vllm_config_module
from vllm.distributed import parallel_state
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import configure_quant_config
from vllm.model_executor.models import kimi_k25
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm_ascend.models import register_model
from vllm_ascend.ops.mla import AscendMultiHeadLatentAttention
from vllm_ascend.quantization.utils import detect_quantization_method

from . import vllm_ascend_release as release
from .nz import cast_where_it_fits
from .parameters import check_filled, poison
from .shims import Group
from .vllm_configuration import vllm_configuration

register_model()

# Attention has no weights of its own but the linears that it is given; communication is not part of loading.
for attention in (AscendMultiHeadLatentAttention, Attention):
    attention.__init__ = lambda self, *args, **kwargs: nn.Module.__init__(self)
release.moe.setup_moe_comm_method = lambda config: None

# Classes look among their arguments for a VllmConfig, to tell the quantization of their names and fused modules.
SupportsQuant._find_quant_config = staticmethod(lambda *args, **kwargs: kwargs["vllm_config"].quant_config)
# vLLM finds no platform here. vLLM-Ascend's is out of vLLM's tree, so that layers choose none of vLLM's kernels, and
# vision towers are moved to its device.
type(current_platform).is_out_of_tree = lambda self: True
type(current_platform).current_device = staticmethod(lambda: "cpu")

kimi_k25.init_vllm_registered_model = lambda *args, **kwargs: _construct_inner(*args, **kwargs)

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
    config = vllm_configuration(directory, tp, ep, mtp)
    vllm_config_module._current_vllm_config = config
    vllm_ascend.ascend_config.init_ascend_config(config)
    vllm_ascend.utils.register_ascend_customop(config)
    model = _construct(config, config.model_config.hf_config)
    if mtp:
        # The draft comes second in a server, and inherits what the model has told the quantization of fused modules.
        model = _construct(config, config.speculative_config.draft_model_config.hf_config)
    poison(model)
    model.load_weights(iter(weights))
    check_filled(model, BORROWED_BY_DRAFT if mtp else ())
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(module)
        if hasattr(module, "kv_b_proj"):
            _absorb(module.kv_b_proj)
    return model


def _absorb(kv_b_proj: nn.Module) -> None:
    """Attention takes this linear apart, and first asserts that it is not quantized."""
    from vllm_ascend.attention.mla_v1 import AscendMLAImpl  # not earlier: a circle of imports in 0.23

    with suppress(AttributeError):  # behind the assertion: no other part of attention is here
        AscendMLAImpl.process_weights_after_loading(Namespace(kv_b_proj=kv_b_proj), torch.bfloat16)


def _construct(config: Any, hf_config: PretrainedConfig, prefix: str = "") -> nn.Module:
    """An empty model of the class that the registry has for the architecture."""
    registered = ModelRegistry.models.get((hf_config.architectures or [""])[0])
    if registered is None:
        raise ValueError(f"no model class for the architectures {hf_config.architectures}")
    model_class = registered.load_model_cls()
    configure_quant_config(config.quant_config, model_class)
    return model_class(vllm_config=config, prefix=prefix)


def _construct_inner(vllm_config: Any, hf_config: PretrainedConfig, prefix: str, architectures: list[str]) -> nn.Module:
    """The text model in a vision model, whose configuration is the whole model's with the text model's hf_config."""
    hf_config = deepcopy(hf_config)
    hf_config.architectures = architectures
    model = Namespace(**{**vars(vllm_config.model_config), "hf_config": hf_config})
    inner = Namespace(**{**vars(vllm_config), "model_config": model})
    vllm_config_module._current_vllm_config = inner
    try:
        return _construct(inner, hf_config, prefix)
    finally:
        vllm_config_module._current_vllm_config = vllm_config


def moe_scheme(directory: Path, tp: int) -> object:
    """The scheme for W4A8 experts as one of `tp` ranks makes it, before any weight."""
    _join(tp, 1, 0)
    vllm_config_module._current_vllm_config = vllm_configuration(directory, tp, 1, False)
    vllm_ascend.ascend_config.init_ascend_config(vllm_config_module._current_vllm_config)
    return release.W4A8Experts()


def _join(tp: int, ep: int, rank: int) -> None:
    whole, one = Group(tp, rank), Group(1, 0)
    parallel_state._TP = parallel_state._WORLD = whole
    parallel_state._EP = whole if ep > 1 else one
    for name in ("_PP", "_DP", "_PCP", "_DCP"):
        setattr(parallel_state, name, one)
    ascend_state._MC2 = Group(tp, rank)
    del ascend_state._MC2.device_group  # the schemes then do without the name of its HCCL communicator


vllm_ascend.utils.torch_npu.npu_format_cast = cast_where_it_fits
