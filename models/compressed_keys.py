"""DeepSeek-V4's config.json in its two spellings: DeepSeek's keys, and those that transformers 5 saves.

transformers names a layer's kind where DeepSeek has a number: `layer_types` with `compress_rates` for
`compress_ratios`, `mlp_layer_types` for `num_hash_layers`, `partial_rotary_factor` for `qk_rope_head_dim`, and
`rope_parameters` of two objects, `main` and `compress`, for `rope_theta`, `compress_rope_theta` and `rope_scaling`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..errors import CheckpointError
from .attention import AttentionWidths
from .compressed_attention import SELECTING_RATIO
from .config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown
from .rope_config import Ropes, read_rope

_WINDOW, _SELECTED, _ALL = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_HASHED, _SCORED = "hash_moe", "moe"
_RATES: Final = {_SELECTED: SELECTING_RATIO, _ALL: 128}
_COMPRESS_THETA: Final = 160000.0


def deepseek_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config under DeepSeek's keys. CheckpointError where both spellings are there and disagree, and for a value
    that has no name in DeepSeek's."""
    read = ConfigReader(config)
    result = dict(config)
    layers = read.size("num_hidden_layers", most=MAX_LAYERS)
    found = {
        "compress_ratios": _ratios(config, read, layers),
        "num_hash_layers": _hash_layers(read, layers),
        "qk_rope_head_dim": _rotary(config, read),
        **_ropes(config),
    }
    for key, value in found.items():
        if value is None:
            continue
        stated = config.get(key)
        if stated is not None and key == "compress_ratios":  # of the drafts too
            stated = read.numbers(key, MAX_POSITIONS)[:layers]
        if stated is not None and stated != value:
            raise CheckpointError(
                f"config.json: {key} {shown(stated)} and transformers' keys, which give {shown(value)}, disagree: keep "
                "one of both spellings"
            )
        if stated is None:
            result[key] = value
    for key in ("rope_parameters", "partial_rotary_factor"):
        result.pop(key, None)
    return result


def read_ropes(config: Mapping[str, Any], attention: AttentionWidths) -> Ropes:
    """Read the rotary parameters under DeepSeek's keys: layers without compression have plain ones."""
    read = ConfigReader(config)
    theta = read.number("compress_rope_theta", _COMPRESS_THETA, 0.0)
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError("config.json: rope_scaling (or rope_parameters) must be an object")
    factor = scaling.get("attention_factor")
    if factor not in (None, 1) or scaling.get("rope_theta", theta) != theta:
        raise CheckpointError(
            "config.json: rope_scaling has an attention_factor or rope_theta of its own; DeepSeek-V4's loaders compute "
            "attention_factor 1 with compress_rope_theta: remove them"
        )
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in (None, "default", "yarn", "deepseek_yarn"):
        raise CheckpointError(
            f"config.json: rope type {shown(kind)}: DeepSeek-V4's layers with compressed entries have yarn, or default"
        )
    # DeepSeek's code does not scale cos and sin by YaRN's temperature.
    unscaled = {"attention_factor": 1.0} if isinstance(kind, str) and kind.endswith("yarn") else {}
    positions = {"max_position_embeddings": config.get("max_position_embeddings")}
    plain = {**positions, "rope_theta": config.get("rope_theta")}
    compressed = {**positions, "rope_scaling": {**scaling, **unscaled, "rope_theta": theta}}
    return Ropes(read_rope(plain, attention), read_rope(compressed, attention))


def _ratios(config: Mapping[str, Any], read: ConfigReader, layers: int) -> list[int] | None:
    kinds = read.words("layer_types")
    if kinds is None:
        return None
    rates = config.get("compress_rates")
    if rates is None:
        rates = {}
    if not isinstance(rates, Mapping):
        raise CheckpointError(f"config.json: compress_rates must be an object, not {shown(rates)}")
    numbers = ConfigReader(rates)
    ratio_of = {_WINDOW: 0, **{kind: numbers.size(kind, rate) for kind, rate in _RATES.items()}}
    _check_words("layer_types", kinds, layers, tuple(ratio_of))
    if ratio_of[_SELECTED] != SELECTING_RATIO or ratio_of[_ALL] == SELECTING_RATIO:
        raise CheckpointError(
            f"config.json: compress_rates {shown(dict(rates))}: {SELECTING_RATIO} is the rate of {_SELECTED} in "
            "DeepSeek's keys, and of no other kind"
        )
    return [ratio_of[kind] for kind in kinds]


def _hash_layers(read: ConfigReader, layers: int) -> int | None:
    kinds = read.words("mlp_layer_types")
    if kinds is None:
        return None
    hashed = kinds.count(_HASHED)
    _check_words("mlp_layer_types", kinds, layers, (_HASHED, _SCORED))
    if kinds != [_HASHED] * hashed + [_SCORED] * (layers - hashed):
        raise CheckpointError(
            f"config.json: mlp_layer_types must have its {_HASHED} layers first; engines read no other order"
        )
    return hashed


def _rotary(config: Mapping[str, Any], read: ConfigReader) -> int | None:
    if not read.has_value("partial_rotary_factor"):
        return None
    head = read.size("head_dim")
    width = read.number("partial_rotary_factor", None, 0.0, 1.0) * head
    if width < 1 or width != int(width):
        raise CheckpointError(
            f"config.json: partial_rotary_factor of head_dim {head} must be a whole number of channels, not {width:g}"
        )
    return int(width)


def _ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary keys of `rope_parameters`, which has one object for all layers or one for each kind of layers."""
    parameters = config.get("rope_parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_parameters must be an object")
    main, compressed = parameters.get("main"), parameters.get("compress")
    if main is None and compressed is None:
        return {"rope_scaling": _without(parameters, "rope_theta", "partial_rotary_factor")}
    if not isinstance(main, Mapping) or not isinstance(compressed, Mapping):
        raise CheckpointError("config.json: rope_parameters must have two objects, main and compress")
    if main.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"config.json: rope_parameters.main has rope type {shown(main['rope_type'])}; layers without compression "
            "have plain rotary embeddings"
        )
    for part in (main, compressed):
        factor = config.get("partial_rotary_factor")
        if part.get("partial_rotary_factor", factor) != factor:
            raise CheckpointError(
                "config.json: partial_rotary_factor differs between the config and its rope_parameters: keep one"
            )
    scaling = _without(compressed, "rope_theta", "partial_rotary_factor")
    plain = scaling.get("rope_type", scaling.get("type", "default")) == "default"
    return {
        "rope_theta": main.get("rope_theta"),
        "compress_rope_theta": compressed.get("rope_theta"),
        "rope_scaling": None if plain else scaling,
    }


def _without(parameters: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in keys}


def _check_words(key: str, words: list[str], layers: int, known: tuple[str, ...]) -> None:
    wrong = next((word for word in words if word not in known), None)
    if wrong is not None:
        raise CheckpointError(f"config.json: {key} has {shown(wrong)}; npuq knows {', '.join(known)}")
    if len(words) != layers:
        raise CheckpointError(
            f"config.json: {key} is for {len(words)} layers, and num_hidden_layers is {layers}; config.json is damaged "
            "or two models'"
        )
