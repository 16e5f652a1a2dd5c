"""Cases of whole attention blocks."""

from __future__ import annotations

import torch

from ....formats.schemes import Scheme
from ...ops import (
    Activation,
    Decode,
    MlaConfig,
    MlaParts,
    Ops,
    Positions,
    Step,
)
from .data import (
    BLOCK,
    EPS,
    HEAD,
    HEADS,
    LATENT,
    ROPE,
    SCALE,
    Case,
    gain,
    random_rows,
    random_values,
    random_weight,
    rope_rows,
    stored_part,
    written_cache,
)


def mla_parts(scheme: Scheme, hidden: int, q_lora: int, heads: int) -> MlaParts:
    q_a_norm, kv_a_norm = ((1 + 0.1 * random_values(width, seed=width)).bfloat16() for width in (q_lora, LATENT))
    return MlaParts(
        q=None,
        q_a=stored_part(scheme, q_lora, hidden, seed=20, name="q_a"),
        q_a_norm=q_a_norm,
        q_b=stored_part(scheme, heads * (HEAD + ROPE), q_lora, seed=21, name="q_b"),
        kv_a=stored_part(scheme, LATENT + ROPE, hidden, seed=22, name="kv_a"),
        kv_a_norm=kv_a_norm,
        kv_b=random_weight(heads * 2 * HEAD, LATENT, seed=23),
        o=stored_part(scheme, hidden, heads * HEAD, seed=24, name="o"),
    )


def attention_layer(scheme: Scheme, hidden: int, q_lora: int, indexer: Scheme | None = None) -> Case:
    """Run all of decode attention: norm, projections (or the fused prolog), cache, attention, output.

    indexer: scheme of an indexer's linear that reads the latent of the queries too.
    """

    def case(ops: Ops) -> tuple[Activation, ...]:
        config = MlaConfig(HEADS, q_lora, LATENT, HEAD, ROPE, HEAD, EPS, SCALE)
        mla = ops.mla.load(mla_parts(scheme, hidden, q_lora, HEADS), config)
        cache = written_cache(ops, 20, first_block=1)
        slots = torch.tensor([BLOCK + 20, 2 * BLOCK]).to(ops.device)
        table = torch.tensor([[1], [2]], dtype=torch.int32).to(ops.device)
        decode = Decode(q_lens=(1, 2), kv_lens=(21, 1), block_table=table)
        step = Step(slots, Positions(slots, *rope_rows(ops, 2)), decode=decode, prefill=None, output_rows=None)
        x, residual = random_rows(ops, 2, hidden, seed=25), random_rows(ops, 2, hidden, seed=26)
        rows, total = ops.mla.norm(x, residual, gain(ops, hidden), EPS, mla)
        reader = None if indexer is None else ops.weights.linear_of([stored_part(indexer, HEAD, q_lora, seed=27)])
        absorbed, q_rope, q_latent = ops.mla.prolog_with_latent(rows, mla, cache, step, reader)
        attended = ops.mla.fused_infer_attention_paged(absorbed, q_rope, cache, decode, SCALE)
        outputs = (total, absorbed, q_rope, ops.mla.output(ops.mla.bring_out(attended, mla), mla))
        if reader is None or q_latent is None:
            return outputs
        return *outputs, ops.products.linear(q_latent, reader)

    return case
