"""Sizes that torch_npu's documentation of its attention operators allows, and the form of a call that fits a model's.

Sources: op-plugin's pages of npu_fused_infer_attention_score and its second version (Atlas A2 and A3),
npu_mla_prolog_v3, npu_lightning_indexer, npu_sparse_flash_attention and npu_apply_rotary_pos_emb.
"""

from __future__ import annotations

from enum import Enum

import torch.nn.functional as F
from torch import Tensor

from .....errors import BackendError
from .....models.mla import Mla as MlaWidths

LATENT_DIM, ROPE_DIM = 512, 64  # of absorbed attention
MAX_ABSORBED_HEADS = 128
ROPE_BESIDE_DIMS = (128, 64, 128)  # qk_nope, qk_rope and v with rotary channels as arguments of their own
MAX_JOINED_DIM, JOINED_DIM_STEP = 512, 16
INT8_BLOCK_SIZE = 128  # of pages that attention in full int8 reads
MOST_QUERIES = 16  # of a sequence in one call of absorbed attention
MOST_UPDATES = 16  # partial results that one `npu_attention_update` of CANN before 2026 merges
PROLOG_HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
PROLOG_Q_LORA = (1536, 2048)
PROLOG_NOPE = (128, 192)
INDEX_DIM, MAX_INDEX_HEADS = 128, 64
GROUPED_DIM = 128  # of heads in "TND" without rotary arguments
MAX_HEADS, MAX_GROUP, MAX_KV_CHANNELS = 256, 64, 65535
ROTARY_DIMS = (64, 128)  # of npu_apply_rotary_pos_emb
MOST_SELECTED = 2048
MORE_SELECTED = tuple(range(3072, 8193, 1024))  # counts above MOST_SELECTED


class PrefillForm(Enum):
    """How decompressed keys and values go into `npu_fused_infer_attention_score`.

    ROPE_BESIDE: rotary channels as arguments of their own, all sequences in one call ("TND").
    JOINED: rotary channels behind the others, one call a sequence ("BSND").
    """

    ROPE_BESIDE = "rope beside"
    JOINED = "joined"


def prefill_form(nope: int, rope: int, value: int) -> PrefillForm | None:
    """The form for heads of `nope` + `rope` channels in queries and keys and `value` in values; None: no form fits.

    Without rotary arguments keys and values must have one shape.
    """
    if (nope, rope, value) == ROPE_BESIDE_DIMS:
        return PrefillForm.ROPE_BESIDE
    if nope + rope == value <= MAX_JOINED_DIM and value % JOINED_DIM_STEP == 0:
        return PrefillForm.JOINED
    return None


def absorbed_heads(heads: int) -> int:
    """The number of query heads in a call of absorbed attention for a model's `heads`: the next power of two."""
    return 1 << (heads - 1).bit_length()


def pad_heads(query: Tensor, heads: int) -> Tensor:
    """Append heads of zeros: `[T, N, D]` → `[T, heads, D]`; the same tensor where N is `heads`."""
    missing = heads - query.shape[1]
    return F.pad(query, (0, 0, 0, missing)) if missing else query


def takes_prolog(hidden: int, config: MlaWidths) -> bool:
    """True for sizes that `npu_mla_prolog_v3` takes, whose heads are those of absorbed attention."""
    return (
        hidden in PROLOG_HIDDEN
        and config.q_lora_rank in PROLOG_Q_LORA
        and config.qk_nope_head_dim in PROLOG_NOPE
        and config.heads == absorbed_heads(config.heads)
    )


def check_mla(name: str, config: MlaWidths) -> None:
    """Raise BackendError for attention sizes that the NPU's operators do not take."""
    fixed = {
        "kv_lora_rank": (config.kv_lora_rank, LATENT_DIM),
        "qk_rope_head_dim": (config.qk_rope_head_dim, ROPE_DIM),
    }
    wrong = [f"{key} {value} (must be {wanted})" for key, (value, wanted) in fixed.items() if value != wanted]
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if prefill_form(nope, rope, value) is None:
        wrong.append(
            f"qk_nope_head_dim {nope} with v_head_dim {value} (must be 128 with 128, or v_head_dim the sum of "
            f"qk_nope_head_dim and qk_rope_head_dim, a multiple of {JOINED_DIM_STEP} up to {MAX_JOINED_DIM})"
        )
    if config.heads > MAX_ABSORBED_HEADS:
        wrong.append(f"{config.heads} attention heads (at most {MAX_ABSORBED_HEADS})")
    if wrong:
        raise BackendError(f"{name}: the NPU's attention operators do not take {', '.join(wrong)}")


def check_gqa(name: str, heads: int, kv_heads: int, head_dim: int) -> None:
    """Raise BackendError for sizes of grouped-query attention that the NPU's operators do not take."""
    wrong = []
    if head_dim != GROUPED_DIM:
        wrong.append(f"head_dim {head_dim} (must be {GROUPED_DIM})")
    if heads > MAX_HEADS:
        wrong.append(f"{heads} attention heads (at most {MAX_HEADS})")
    if heads > MAX_GROUP * kv_heads:
        wrong.append(f"{heads} heads on {kv_heads} of keys and values (at most {MAX_GROUP} on one)")
    if kv_heads * head_dim > MAX_KV_CHANNELS:
        wrong.append(f"{kv_heads * head_dim} channels of keys (at most {MAX_KV_CHANNELS})")
    if wrong:
        raise BackendError(f"{name}: the NPU's attention operators do not take {', '.join(wrong)}")


def check_indexer(name: str, heads: int, head_dim: int, topk: int) -> None:
    """Raise BackendError for sizes that the NPU's lightning indexer does not take."""
    wrong = []
    if head_dim != INDEX_DIM:
        wrong.append(f"index_head_dim {head_dim} (must be {INDEX_DIM})")
    if heads > MAX_INDEX_HEADS:
        wrong.append(f"index_n_heads {heads} (at most {MAX_INDEX_HEADS})")
    if topk > MOST_SELECTED and topk not in MORE_SELECTED:
        counts = ", ".join(map(str, MORE_SELECTED))
        wrong.append(f"index_topk {topk} (must be at most {MOST_SELECTED}, or one of {counts})")
    if wrong:
        raise BackendError(f"{name}: the NPU's lightning indexer does not take {', '.join(wrong)}")
