"""Which rewrites rotate a model: every weight by its place, so that what the model computes stays the same.

The residual stream has one rotation; the value heads and the q_a latent have rotations of their own (QuaRot's offline
part). How a weight is read rewritten is `rewritten.py`'s affair.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...models.architecture import Role
from ...models.config import ModelConfig
from ...models.inventory import Inventory
from ...quant.rotation import Rotation, rotation
from .rewritten import Rewrite


def rotated(config: ModelConfig, inventory: Inventory) -> dict[str, Rewrite]:
    """The rewrites that rotate a model. A tied head is a weight of its own by now: the final norm is folded into it."""
    # What the architecture does not know is copied as it is, even under a name that other models have.
    known = {name for name, spec in inventory.specs.items() if spec.role is not Role.OTHER}
    return {name: change for name, change in _rewrites(config, inventory) if name in known}


def _rewrites(config: ModelConfig, inventory: Inventory) -> Iterator[tuple[str, Rewrite]]:
    stream = rotation(config.hidden_size)
    norm = "model.norm.weight"
    yield "model.embed_tokens.weight", Rewrite(inputs=stream)
    yield "lm_head.weight", Rewrite(gain=((norm,),), inputs=stream)
    yield norm, Rewrite(ones=True)
    for layer in (*range(config.num_hidden_layers), *inventory.mtp_layers):
        prefix = f"model.layers.{layer}."
        yield from _attention(config, prefix)
        yield from _feed_forward(config, inventory, prefix, layer)
    for layer in inventory.mtp_layers:
        yield from _mtp(f"model.layers.{layer}.", norm, stream)


def _attention(config: ModelConfig, prefix: str) -> Iterator[tuple[str, Rewrite]]:
    stream, values = rotation(config.hidden_size), rotation(config.v_head_dim)
    norm, attention = f"{prefix}input_layernorm.weight", f"{prefix}self_attn."
    reads = Rewrite(gain=((norm,),), inputs=stream)
    yield norm, Rewrite(ones=True)
    yield f"{attention}q_proj.weight", reads
    yield f"{attention}kv_a_proj_with_mqa.weight", reads
    if config.q_lora_rank is not None:
        latent, q_norm = rotation(config.q_lora_rank), f"{attention}q_a_layernorm.weight"
        yield f"{attention}q_a_proj.weight", Rewrite(gain=((norm,),), inputs=stream, outputs=latent)
        yield q_norm, Rewrite(ones=True)
        yield f"{attention}q_b_proj.weight", Rewrite(gain=((q_norm,),), inputs=latent)
    head = (config.qk_nope_head_dim + config.v_head_dim, config.qk_nope_head_dim)
    yield f"{attention}kv_b_proj.weight", Rewrite(outputs=values, heads=head)
    yield f"{attention}o_proj.weight", Rewrite(inputs=values, outputs=stream)


def _feed_forward(config: ModelConfig, inventory: Inventory, prefix: str, layer: int) -> Iterator[tuple[str, Rewrite]]:
    stream, norm = rotation(config.hidden_size), f"{prefix}post_attention_layernorm.weight"
    reads, writes = Rewrite(gain=((norm,),), inputs=stream), Rewrite(outputs=stream)
    yield norm, Rewrite(ones=True)
    blocks = [f"{prefix}mlp."]
    if config.is_moe_layer(layer):
        yield f"{prefix}mlp.gate.weight", reads
        experts = range(config.n_routed_experts)
        blocks = [f"{prefix}mlp.shared_experts.", *(f"{prefix}mlp.experts.{expert}." for expert in experts)]
    for block in blocks:
        yield f"{block}gate_proj.weight", reads
        yield f"{block}up_proj.weight", reads
        yield f"{block}down_proj.weight", writes


def _mtp(prefix: str, final_norm: str, stream: Rotation) -> Iterator[tuple[str, Rewrite]]:
    """A multi-token-prediction layer reads the embedding and the main model's normed output, both rotated by now.

    That output has lost the final norm's gain, which goes into eh_proj after hnorm's: exact but for one positive factor
    a token on that half, since hnorm measures a vector without the gain.
    """
    embedding_norm, hidden_norm, head_norm = (
        f"{prefix}{name}.weight" for name in ("enorm", "hnorm", "shared_head.norm")
    )
    for norm in (embedding_norm, hidden_norm, head_norm):
        yield norm, Rewrite(ones=True)
    gain = ((embedding_norm,), (hidden_norm, final_norm))
    yield f"{prefix}eh_proj.weight", Rewrite(gain=gain, inputs=stream, outputs=stream)
    yield f"{prefix}embed_tokens.weight", Rewrite(inputs=stream)
    yield f"{prefix}shared_head.head.weight", Rewrite(gain=((head_norm,),), inputs=stream)
