"""A model of random weights with the widths of a large one, made in memory for measurements."""

from __future__ import annotations

import torch
from torch import Tensor

from ....formats.schemes import Scheme
from ....models.config import ModelConfig
from ....models.family import Block
from ....models.roles import Role
from ....models.rope import RopeTables, rope_tables
from ....models.tensors import expected_specs
from ....native.mapped import MappedFiles
from ...attention.kinds import attention_of
from ...memory.stored import Stored
from ...model import Model
from ...ops import LinearPart, Ops
from ...ranks.shares import WHOLE, Share
from ...weights import load_weights

DEEPSEEK_V3_LAYERS = {
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 32768,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""DeepSeek-V3's widths: one dense layer and one MoE layer, with 32 of its 256 experts and a quarter of its vocabulary.
2.5 GB of weights in W4A8."""


_QUANTIZED = (Role.ATTENTION, Role.INDEXER, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.ROUTED_EXPERT)


class RandomStore:
    """Random tensors of a config, as `npuq convert` quantizes them: experts in W4A8, other linears in W8A8.

    Every tensor has memory of its own. See `Store`.
    """

    def __init__(self, config: ModelConfig):
        self.files = MappedFiles()
        self._specs = expected_specs(config, ())
        self._generator = torch.Generator().manual_seed(0)
        self._codes: dict[int, Tensor] = {}

    def tensor(self, name: str, *shape: int, rows: range | None = None) -> Tensor:
        assert rows is None  # one process has all of the model
        if len(shape) == 1:  # a gain, or a router's bias, which must not favour one expert
            spec = self._specs[name]
            made = torch.zeros(shape) if spec.block is Block.ROUTER else torch.ones(shape)
            return made.to(torch.float32 if spec.block is Block.ROUTER else torch.bfloat16)
        made = torch.empty(shape, dtype=torch.bfloat16)
        return made.normal_(0, shape[-1] ** -0.5, generator=self._generator)

    def table(self, name: str, *shape: int, most: int) -> Tensor:
        return torch.randint(most, shape, generator=self._generator)

    def scheme(self, prefix: str) -> Scheme:
        return Scheme.W4A8 if self._specs[f"{prefix}.weight"].role is Role.ROUTED_EXPERT else Scheme.W8A8

    def form(self, name: str) -> Stored:
        prefix = name.removesuffix(".weight")
        linear = name != prefix and self._specs[name].role in _QUANTIZED
        return Stored(self.scheme(prefix), 1, False) if linear else Stored(Scheme.FLOAT, 2, False)

    def linear(self, prefix: str, outputs: int, inputs: int, share: Share = WHOLE) -> LinearPart:
        assert share == WHOLE
        scale = torch.full((outputs, 1), 1.0 / (100 * inputs**0.5))
        if self.scheme(prefix) is Scheme.W8A8:
            return LinearPart(prefix, Scheme.W8A8, self._random_bytes(outputs, inputs), scale)
        packed = self._random_bytes(outputs // 2, inputs)
        low, high = (packed << 4) >> 4, packed >> 4
        sums = torch.stack([low.sum(1, dtype=torch.int32), high.sum(1, dtype=torch.int32)], 1).flatten()
        return LinearPart(prefix, Scheme.W4A8, packed, 16 * scale, 8 * sums[:, None] * 16 * scale)

    def _random_bytes(self, rows: int, columns: int) -> Tensor:
        """int8 `[rows, columns]`: a copy of random bytes, made once a size."""
        if rows * columns not in self._codes:
            drawn = torch.randint(-128, 128, (rows * columns,), dtype=torch.int8, generator=self._generator)
            self._codes[rows * columns] = drawn
        return self._codes[rows * columns].view(rows, columns).clone()


def random_model(config: ModelConfig, ops: Ops) -> tuple[Model, RopeTables]:
    """Make the model, and its rope tables."""
    tables = rope_tables(config)
    attention = attention_of(config, tables.softmax_scale)
    return Model(config, ops, load_weights(RandomStore(config), config, ops, attention), attention), tables
