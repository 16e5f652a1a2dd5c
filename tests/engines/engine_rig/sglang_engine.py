"""SGLang's own construction and loading of a model, as one rank of many."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import sglang.srt.utils
import sglang.srt.utils.common
from torch import Tensor, nn

from .shims import Group

# torch.compile of the forward pass: without a graph compiler there is nothing to choose from.
sglang.srt.utils.common.get_compiler_backend = lambda *args, **kwargs: "eager"
sglang.srt.utils.get_compiler_backend = sglang.srt.utils.common.get_compiler_backend

from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.hardware_backend.npu import utils as npu_utils  # noqa: E402
from sglang.srt.hardware_backend.npu.quantization import linear_method_npu, moe_methods  # noqa: E402
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.model_loader.utils import get_model_architecture  # noqa: E402
from sglang.srt.models import registry  # noqa: E402, F401  (imports every model: before processes are forked)
from sglang.srt.runtime_context import get_context, get_parallel  # noqa: E402

from .nz import cast_where_it_fits  # noqa: E402
from .parameters import check_filled, poison  # noqa: E402

# The draft takes embedding and head from the model that it drafts for.
BORROWED_BY_DRAFT = ("embed_tokens", "lm_head")

# As its own tests on NPUs set it, and model cards of DeepSeek-V4 say it.
envs.SGLANG_OPT_FUSE_WQA_WKV.set(False)
# Its cast leaves CPU tensors alone; the rig's operators want what a device would have got.
npu_utils.npu_format_cast = cast_where_it_fits
linear_method_npu.npu_format_cast = cast_where_it_fits
moe_methods.npu_format_cast = cast_where_it_fits

# DeepSeek-V4's draft looks them up under names that no description has, and takes them as FLOAT, which they are.
_UNLISTED = ("in layer: model.e_proj", "in layer: model.h_proj")


class Complaints(logging.Handler):
    """SGLang only warns of a tensor that it has no parameter for, and of a scheme that it does not know."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.endswith(_UNLISTED):
            return
        if "not found in params_dict" in message or "Unsupported" in message:
            self.messages.append(message)


def detect(directory: Path) -> str | None:
    """The quantization that SGLang finds without any flag."""
    return ModelConfig(model_path=str(directory)).quantization


def build(directory: Path, weights: Iterable[tuple[str, Tensor]], tp: int, ep: int, rank: int, mtp: bool) -> nn.Module:
    """The model (or its MTP draft) of `rank`, loaded and processed. ValueError for a complaint of the loader."""
    complaints = Complaints()
    logging.getLogger("sglang").addHandler(complaints)
    fields: dict[str, object] = {"tp_size": tp, "ep_size": ep, "device": "npu", "dtype": "bfloat16"}
    fields |= {"model_path": str(directory), "disable_shared_experts_fusion": True}
    if mtp:
        fields |= {"speculative_draft_model_path": str(directory), "speculative_draft_model_quantization": "modelslim"}
    override = get_context().override_server_args(**fields)
    override.install()
    one, whole, moe_tp = Group(1, 0), Group(tp, rank), tp // ep
    ranks = {"tp_rank": rank, "attn_tp_rank": rank, "moe_tp_rank": rank % moe_tp, "moe_ep_rank": rank // moe_tp}
    ranks |= dict.fromkeys(("pp_rank", "attn_dp_rank", "attn_cp_rank", "moe_dp_rank"), 0)
    groups = {"tp_group": whole, "attn_tp_group": whole, "world_group": whole, "shared_experts_tp_group": whole}
    groups |= {"pp_group": one, "attn_cp_group": one}
    groups |= {"moe_tp_group": Group(moe_tp, rank % moe_tp), "moe_ep_group": Group(ep, rank // moe_tp)}
    try:
        with get_parallel().override(**ranks, **groups):
            config = ModelConfig(
                model_path=str(directory), is_draft_model=mtp, quantization="modelslim" if mtp else None
            )
            model_class, _ = get_model_architecture(config)
            model = model_class(config.hf_config, loader._get_quantization_config(config, LoadConfig()))
            poison(model)
            model.load_weights(iter(weights))
            check_filled(model, BORROWED_BY_DRAFT if mtp else ())
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if method is not None and hasattr(method, "process_weights_after_loading"):
                    method.process_weights_after_loading(module)
    finally:
        override.restore()
        logging.getLogger("sglang").removeHandler(complaints)
    if complaints.messages:
        raise ValueError(complaints.messages[0])
    return model
