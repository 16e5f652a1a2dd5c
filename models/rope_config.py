"""The rotary part of config.json with DeepSeek's own keys (`rope_scaling` and `rope_theta`) or transformers 5's
(`rope_parameters`), and the checks that its tables have a meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ..errors import CheckpointError
from .attention import AttentionWidths
from .config_reader import MAX_POSITIONS, ConfigReader, shown

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")

# Other names of rope types in configs and engines.
_ALIASES = {"deepseek_yarn": "yarn"}
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# cos and sin together, float32: two million positions of 64 rotary channels.
MAX_TABLE_BYTES: Final = 1 << 29
_MAX_FACTOR: Final = 1e6
_MAX_THETA: Final = 1e12
# A temperature of YaRN is 0.1 · mscale · ln(factor) + 1; published values of mscale are at most 1.
_MAX_MSCALE: Final = 100.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding parameters under transformers' names; `dim` is the rotary channels of a head. `mscale` and
    `mscale_all_dim` are None where the config has neither."""

    rope_type: str
    theta: float
    dim: int
    max_position: int
    factor: float = 1.0
    original_max_position: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    truncate: bool = True

    @property
    def positions(self) -> int:
        """The tables' number of positions: max_position_embeddings, but `factor` times that for dynamic NTK."""
        return int(self.max_position * self.factor) if self.rope_type == "dynamic" else self.max_position


class Ropes(NamedTuple):
    """The rotary parameters of a model. compressed: those of layers that attend to compressed tokens; None where all
    layers have `rope`."""

    rope: RopeConfig
    compressed: RopeConfig | None = None


def read_one_rope(config: Mapping[str, Any], attention: AttentionWidths) -> Ropes:
    """Read the rotary parameters of a model whose layers have the same, as `read_rope`."""
    return Ropes(read_rope(config, attention))


def rotary_fraction(config: Mapping[str, Any]) -> Any:
    """The value of `partial_rotary_factor`, beside the rotary parameters or in them; None without one.

    CheckpointError where both places have it, with different values: loaders differ on which counts.
    """
    places = [
        config,
        *(found for key in ("rope_scaling", "rope_parameters") if isinstance(found := config.get(key), Mapping)),
    ]
    values = [place["partial_rotary_factor"] for place in places if place.get("partial_rotary_factor") is not None]
    if any(value != values[0] for value in values):
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {' and '.join(map(shown, values))} at two places: keep one"
        )
    return values[0] if values else None


def read_rope(config: Mapping[str, Any], attention: AttentionWidths) -> RopeConfig:
    """Read and check the rotary part of a config; CheckpointError names the key that is missing, malformed or unknown.

    With keys of both kinds, `rope_scaling` wins, as in transformers.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise CheckpointError("config.json: rope_scaling (or rope_parameters) must be an object")
    rope_type = _rope_type(parameters)
    missing = [key for key in _REQUIRED[rope_type] if parameters.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json: rope type {rope_type!r} needs {', '.join(missing)}")
    beside = {key: config.get(key) for key in ("max_position_embeddings",)}
    # DeepSeek's rope_theta is a key beside the object, transformers' a key in it.
    inside = {key: value for key, value in parameters.items() if value is not None}
    read = ConfigReader({"rope_theta": config.get("rope_theta"), **inside, **beside})
    rope = RopeConfig(
        rope_type=rope_type,
        theta=read.number("rope_theta", 10000.0, 0.0, _MAX_THETA),
        dim=attention.rotary_dim,
        max_position=read.size("max_position_embeddings", most=MAX_POSITIONS),
        factor=read.number("factor", 1.0, 1.0, _MAX_FACTOR),
        original_max_position=(
            None
            if parameters.get("original_max_position_embeddings") is None
            else read.size("original_max_position_embeddings", most=MAX_POSITIONS)
        ),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        mscale=_mscale(read, parameters, "mscale"),
        mscale_all_dim=_mscale(read, parameters, "mscale_all_dim"),
        attention_factor=(
            None if parameters.get("attention_factor") is None else read.number("attention_factor", None, 0.0, 100.0)
        ),
        low_freq_factor=read.number("low_freq_factor", 1.0),
        high_freq_factor=read.number("high_freq_factor", 4.0),
        truncate=read.flag("truncate", True),
    )
    _check(rope, config, parameters)
    if not attention.rotary_temperature and (rope.mscale is not None or rope.mscale_all_dim is not None):
        raise CheckpointError(
            "config.json: mscale and mscale_all_dim are read for DeepSeek's models alone; elsewhere loaders differ on "
            "them: remove them"
        )
    return rope


def _rope_type(parameters: Mapping[str, Any]) -> str:
    names = [parameters[key] for key in ("rope_type", "type") if parameters.get(key)] or ["default"]
    kinds = [_ALIASES.get(name, name) if isinstance(name, str) else name for name in names]
    for kind in kinds:
        if kind not in ROPE_TYPES:
            raise CheckpointError(
                f"config.json: rope type {shown(kind)} is unknown; npuq knows {', '.join(ROPE_TYPES)}"
            )
    if len(set(kinds)) > 1:
        raise CheckpointError(f"config.json: rope_type is {kinds[0]!r} and type {kinds[1]!r}: which is meant? Keep one")
    return str(kinds[0])


def _mscale(read: ConfigReader, parameters: Mapping[str, Any], key: str) -> float | None:
    return None if parameters.get(key) is None else read.number(key, None, 0.0, _MAX_MSCALE)


def _check(rope: RopeConfig, config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Refuse parameters whose tables have no meaning, differ between loaders, or exceed any memory."""
    for key in ("beta_fast", "beta_slow"):
        if getattr(rope, key) <= 0:
            raise CheckpointError(f"config.json: rope {key} must be above 0, not {getattr(rope, key)}")
    if rope.theta <= 1:
        raise CheckpointError(f"config.json: rope_theta must be above 1, not {rope.theta}")
    if rope.dim % 2:
        raise CheckpointError(f"config.json: a head has {rope.dim} rotary channels, which is odd; rotary needs pairs")
    if rope.rope_type == "llama3" and not 0 < rope.low_freq_factor < rope.high_freq_factor:
        raise CheckpointError("config.json: rope high_freq_factor must be above low_freq_factor, and both above 0")
    if rope.rope_type == "dynamic" and rope.dim == 2:
        raise CheckpointError("config.json: dynamic rope needs more than two rotary dimensions")
    if 4 * rope.dim * rope.positions > MAX_TABLE_BYTES:
        raise CheckpointError(
            f"config.json: {rope.positions} positions (max_position_embeddings, times factor under dynamic rope) of "
            f"{rope.dim} rotary channels make tables of {4 * rope.dim * rope.positions / 2**20:.0f} MiB; npuq makes "
            f"them up to {MAX_TABLE_BYTES >> 20}"
        )
    outside = config.get("original_max_position_embeddings")
    if rope.rope_type in ("yarn", "llama3") and outside not in (None, rope.original_max_position):
        raise CheckpointError(
            f"config.json: original_max_position_embeddings is {shown(outside)}, and in the rope parameters "
            f"{rope.original_max_position}: loaders differ on which counts; keep one"
        )
