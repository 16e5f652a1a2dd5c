"""A model's config.json, read once into typed fields, with DeepSeek's own keys or transformers 5's.

Every backend computes every accepted config, with the results of transformers or the engines. All other configs are
refused here, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..dtypes import FLOAT_CODES, torch_dtype, torch_name
from ..errors import CheckpointError
from .attention import AttentionWidths
from .block_draft import BlockDraft
from .config_reader import MAX_EXPERTS, MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown
from .families import FAMILIES, family_of
from .family import Block, Family
from .hyper_connections import HyperConnections
from .moe import Moe
from .rope_config import RopeConfig, rotary_fraction
from .rope_frequencies import check_computable

if TYPE_CHECKING:
    import torch

TEXT_CONFIG = "text_config"
_DTYPES = {torch_name(code): code for code in FLOAT_CODES}

# Keys of the text model that may also stand at the top, where a nested config leaves them out.
_INHERITED = ("dtype", "torch_dtype", "eos_token_id", "quantization_config")

# Other names of keys, as transformers reads them.
_ALIASES = {
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "num_nextn_predict_layers": ("num_mtp_layers",),
}


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that conversion and the runtime need, under Hugging Face's names.

    intermediate_size: channels of a dense feed-forward block; 0 in a family without. compressed_rope: the rotary
    parameters of layers that attend to compressed tokens; None where all layers have `rope`. hyper_connections: the
    streams of the residual; None for a plain one. block_draft: the draft that the multi-token-prediction layers are
    together; None where each drafts by itself.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    vocab_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    dtype_code: str
    attention: AttentionWidths
    moe: Moe | None
    rope: RopeConfig
    compressed_rope: RopeConfig | None = None
    hyper_connections: HyperConnections | None = None
    block_draft: BlockDraft | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read and check a config; CheckpointError names the key that is missing, malformed or unknown."""
        family = family_of(config.get("model_type"))
        config = family.deepseek_keys(text_config(config))
        read = ConfigReader({**_without_aliases(config), "partial_rotary_factor": rotary_fraction(config)})
        attention = family.attention.read(read)
        ropes = family.ropes(config, attention)
        drafts = read.count("num_nextn_predict_layers", 0, most=MAX_LAYERS)
        draft = None if family.block_draft is None else family.block_draft.read(read)
        result = cls(
            model_type=family.model_type,
            hidden_size=read.size("hidden_size"),
            intermediate_size=read.size("intermediate_size") if family.entries(Block.DENSE) else 0,
            num_hidden_layers=read.size("num_hidden_layers", most=MAX_LAYERS),
            num_nextn_predict_layers=drafts if draft is None else draft.layers,
            vocab_size=read.size("vocab_size"),
            rms_norm_eps=read.number("rms_norm_eps", family.rms_norm_eps, 0.0, 1.0),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            max_position_embeddings=read.size("max_position_embeddings", most=MAX_POSITIONS),
            dtype_code=model_code(config),
            attention=attention,
            moe=None if family.moe is None else family.moe.read(read),
            rope=ropes.rope,
            compressed_rope=ropes.compressed,
            hyper_connections=None if family.hyper_connections is None else family.hyper_connections.read(read),
            block_draft=draft,
        )
        # No backend computes another value: refuse it rather than run another model.
        for key, value in family.fixed.items():
            read.fixed(key, value)
        result._check()
        for rope in filter(None, ropes):
            check_computable(rope)
        return result

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of float weights, whose safetensors code is `dtype_code`."""
        return torch_dtype(self.dtype_code)

    @property
    def rope_pairs(self) -> int:
        """Columns of the rotary tables, one a pair of channels; 0 where layers differ in their rotation, and compute
        it."""
        return self.rope.dim // 2 if self.compressed_rope is None else 0

    @property
    def family(self) -> Family:
        """The table of its tensors."""
        return family_of(self.model_type)

    def name(self, block: Block, part: str, layer: int | None = None, expert: int | None = None) -> str:
        """The checkpoint's name of a part. KeyError for one that the family does not have."""
        return self.family.scope(self.num_hidden_layers, layer, expert) + self.family.entry(block, part).name

    def layer_of(self, name: str) -> int | None:
        """The layer number of a tensor's name; multi-token-prediction layers count on from the decoder layers. None
        outside the layers."""
        return self.family.layer_of(name, self.num_hidden_layers)

    def moe_at(self, layer: int) -> Moe | None:
        """The MoE config of a decoder or MTP layer; None where its feed-forward block is dense."""
        return self.moe if self.moe is not None and self.moe.has_experts(layer) else None

    @property
    def n_routed_experts(self) -> int:
        """Routed experts of an MoE layer; 0 in a model without."""
        return 0 if self.moe is None else self.moe.n_routed_experts

    def moe_keys(self) -> Mapping[str, Any]:
        """The experts' keys that an artifact's config.json states, with their values; none without experts."""
        reader = self.family.moe
        return {} if self.moe is None or reader is None else reader.stated(self.moe)

    def _check(self) -> None:
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if layers * self.n_routed_experts > MAX_EXPERTS:
            raise CheckpointError(
                f"config.json: {layers} layers of {self.n_routed_experts} experts are more than any model has; npuq "
                f"reads up to {MAX_EXPERTS} together"
            )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the text model: those of `text_config` where the family nests them, else the config itself.

    A nested config that leaves out a dtype, the end-of-sequence ids or its quantization has those of the top; nothing
    else is inherited. CheckpointError for a nested config that is missing, or of another family's text model.
    """
    family = _known(config)
    if family is None or not family.text_types:
        return config
    text = config.get(TEXT_CONFIG)
    if not isinstance(text, Mapping):
        raise CheckpointError(
            f"config.json: model_type {family.model_type!r} needs an object {TEXT_CONFIG}, not {shown(text)}"
        )
    text_type = text.get("model_type", family.text_types[0])
    if text_type not in family.text_types:
        raise CheckpointError(
            f"config.json: the text model of a {family.model_type} is {' or '.join(family.text_types)}, not "
            f"{shown(text_type)}"
        )
    inherited = {key: config[key] for key in _INHERITED if text.get(key) is None and config.get(key) is not None}
    return {**text, **inherited}


def with_text_keys(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `changes` among the text model's keys, where its family has them."""
    family = _known(config)
    if family is None or not family.text_types:
        return {**config, **changes}
    return {**config, TEXT_CONFIG: {**config[TEXT_CONFIG], **changes}}


def _known(config: Mapping[str, Any]) -> Family | None:
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def _without_aliases(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config under DeepSeek's keys. CheckpointError where two keys of one field have different values."""
    result = dict(config)
    for key, others in _ALIASES.items():
        for other in others:
            value = config.get(other)
            if value is None:
                continue
            if result.get(key) not in (None, value):
                raise CheckpointError(
                    f"config.json: {key} is {shown(result[key])} and {other} {shown(value)}, two names of one number: "
                    "keep the right one"
                )
            result[key] = value
    return result


def model_code(config: Mapping[str, Any]) -> str:
    """The safetensors code of the config's dtype of float weights (`torch_dtype`, or transformers 5's `dtype`); BF16 by
    default."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    code = _DTYPES.get(str(name).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"config.json: dtype {shown(name)} is unknown; npuq knows {', '.join(_DTYPES)}")
    return code
