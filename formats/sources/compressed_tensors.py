"""compressed-tensors, as llm-compressor saves it: symmetric int4 and int8 weights of one scale a channel, activations
quantized per token. Its `quantization_config` gives the format of each linear; formats without an npuq scheme are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...dtypes import FLOAT_CODES
from ...errors import CheckpointError
from ...inputs.patterns import Budget, Pattern
from ..checkpoint import CONFIG_NAME, Checkpoint
from ..schemes import SCALE, WEIGHT, Scheme
from .fp8 import is_beside_fp8
from .stored_linear import Codes, StoredLinear

METHOD = "compressed-tensors"
_PACKED, _SHAPE, _ZERO_POINT = "weight_packed", "weight_shape", "weight_zero_point"
_FORMATS = {"int-quantized", "naive-quantized", "pack-quantized"}
_MOST_GROUPS = 1000
# GPTQ's activation orders that do not permute stored channels; "static" is llm-compressor's default.
_STORED_IN_PLACE = ("weight", "static")


@dataclass(frozen=True)
class _Targets:
    """Modules by full name, by class name, or by a regular expression of a name's beginning (`re:…`, as re.match)."""

    names: frozenset[str]
    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, targets: list[Any], where: str, budget: Budget) -> _Targets:
        """Parse targets. CheckpointError for a malformed pattern."""
        texts = [str(target) for target in targets]
        expressions = [text.removeprefix("re:") for text in texts if text.startswith("re:")]
        return cls(frozenset(texts), tuple(Pattern(text, where, CheckpointError, budget) for text in expressions))

    def match(self, module: str) -> bool:
        """True where a module's name is targeted."""
        return any(pattern.matches(module) for pattern in self.patterns)


_NOTHING = _Targets(frozenset(), ())


@dataclass(frozen=True)
class _Group:
    """One of config_groups: its targets and their quantization."""

    targets: _Targets
    scheme: Scheme
    packed: bool


def is_compressed(config: Mapping[str, Any]) -> bool:
    """True where the text model's keys of config.json declare compressed-tensors weights."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def compressed_linears(checkpoint: Checkpoint) -> tuple[dict[str, StoredLinear], frozenset[str]]:
    """Find the quantized linears in headers and config.json alone; returns them and the names of redundant tensors.

    Raises CheckpointError for weights that are grouped, asymmetric, reordered or of another width, for activations that
    are not quantized per token, and for a tensor that its group does not have.
    """
    where = checkpoint.directory / CONFIG_NAME
    linears, ignored = {}, set()
    # Float weights may have scales too: the config counts where there are codes.
    scales = [name for name in checkpoint.tensors if _is_of_codes(checkpoint, name)]
    claim = checkpoint.text_config["quantization_config"]
    groups, ignore = _read_config(where, claim) if scales else ([], _NOTHING)
    for name in scales:
        info, module = checkpoint.tensors[name], name.rpartition(".")[0]
        group = _group_of(groups, module)
        if group is None or module in ignore.names or ignore.match(module):
            raise CheckpointError(f"{info.file}: tensor {name!r} is a scale, but {where} does not quantize {module!r}")
        linears[f"{module}.{WEIGHT}"] = _linear(checkpoint, module, group)
        ignored |= {f"{module}.{_SHAPE}", f"{module}.{_ZERO_POINT}"} & checkpoint.tensors.keys()
    return linears, frozenset(ignored)


def _is_of_codes(checkpoint: Checkpoint, name: str) -> bool:
    """True for the scale of a linear that compressed-tensors quantized to integers."""
    return name.endswith(f".{SCALE}") and not is_beside_fp8(checkpoint.tensors, name)


def _linear(checkpoint: Checkpoint, module: str, group: _Group) -> StoredLinear:
    weight = f"{module}.{_PACKED if group.packed else WEIGHT}"
    scale = checkpoint.tensors[f"{module}.{SCALE}"]
    info = checkpoint.tensors.get(weight)
    if info is None:
        raise CheckpointError(f"{scale.file}: {scale.name!r} has no {weight!r} in any shard; fetch all shards")
    dtype = "I32" if group.packed else "I8"
    if info.dtype != dtype or len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: tensor {weight!r} is {info.dtype} {list(info.shape)}, not {dtype} rows of codes"
        )
    outputs, words = info.shape
    if scale.dtype not in FLOAT_CODES or scale.shape not in ((outputs, 1), (outputs,)):
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}; npuq reads one scale for each "
            f"of {outputs} channels: quantize with strategy 'channel'"
        )
    if group.packed:
        codes, inputs = Codes.INT4_INPUTS, 8 * words
    else:
        codes, inputs = Codes.INT4_BYTES if group.scheme is Scheme.W4A8 else Codes.INT8, words
    tensors = {WEIGHT: weight, SCALE: scale.name}
    return StoredLinear(checkpoint, f"{module}.{WEIGHT}", group.scheme, (outputs, inputs), codes, tensors)


def _read_config(where: object, quantization: Mapping[str, Any]) -> tuple[list[_Group], _Targets]:
    groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
    if not isinstance(groups, Mapping) or not 0 < len(groups) <= _MOST_GROUPS or not isinstance(ignore, list):
        raise CheckpointError(
            f"{where}: quantization_config has no config_groups (or too many), or an ignore that is no list"
        )
    if quantization.get("kv_cache_scheme"):
        raise CheckpointError(f"{where}: kv_cache_scheme: npuq has no quantized cache; quantize the weights alone")
    sparsity = quantization.get("sparsity_config") or {}
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparsity_config: compressed sparse weights are not read; save them dense")
    if quantization.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config: rotations at run time are not supported; quantize without")
    default, budget = quantization.get("format"), Budget()
    read = [_read_group(f"{where}: {name}", group, default, budget) for name, group in groups.items()]
    return read, _Targets.of(ignore, f"{where}: quantization_config: ignore", budget)


def _read_group(where: str, group: Any, default_format: Any, budget: Budget) -> _Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise CheckpointError(f"{where}: needs targets and weights")
    for problem in (*_weight_problems(weights), *_activation_problems(group)):
        raise CheckpointError(f"{where}: {problem}")
    bits, form = weights["num_bits"], group.get("format") or default_format
    if not isinstance(form, str) or form not in _FORMATS:
        raise CheckpointError(f"{where}: format {form!r} is not read; npuq reads {', '.join(sorted(_FORMATS))}")
    packed = form == "pack-quantized"
    if packed and bits != 4:
        raise CheckpointError(f"{where}: packed weights of {bits} bits are not read; save them int-quantized")
    return _Group(_Targets.of(targets, where, budget), Scheme.W4A8 if bits == 4 else Scheme.W8A8, packed)


def _weight_problems(weights: Mapping[str, Any]) -> Iterator[str]:
    if weights.get("type", "int") != "int" or weights.get("num_bits") not in (4, 8):
        yield f"weights of {weights.get('num_bits')} bits, type {weights.get('type')!r}: npuq reads int of 4 and 8 bits"
    if not weights.get("symmetric", True):
        yield "asymmetric weights are not read; quantize with symmetric: true"
    if weights.get("actorder") and weights["actorder"] not in _STORED_IN_PLACE:
        yield f"actorder {weights['actorder']!r} reorders input channels, which no Ascend operator does; turn it off"
    if weights.get("strategy") != "channel" or weights.get("group_size") not in (None, -1):
        size = f" of {weights['group_size']}" if weights.get("group_size") else ""
        yield f"weights by {weights.get('strategy')}{size}: only one scale a channel is read: use strategy 'channel'"


def _activation_problems(group: Mapping[str, Any]) -> Iterator[str]:
    inputs = group.get("input_activations")
    if not isinstance(inputs, Mapping):
        yield "activations stay float (weight-only): the artifact's operators quantize them; use a W4A8 or W8A8 scheme"
        return
    per_token = inputs.get("dynamic") is True and inputs.get("strategy") == "token"
    if (
        inputs.get("type", "int") != "int"
        or inputs.get("num_bits") != 8
        or not per_token
        or not inputs.get("symmetric", True)
    ):
        yield "activations must be int8, symmetric, dynamic and per token"
    if group.get("output_activations"):
        yield "output_activations are not read"


def _group_of(groups: list[_Group], module: str) -> _Group | None:
    """The group of a module: by name, then by pattern, then by class, in compressed-tensors' own order."""
    tests: tuple[Callable[[_Group], bool], ...] = (
        lambda group: module in group.targets.names,
        lambda group: group.targets.match(module),
        lambda group: "Linear" in group.targets.names,
    )
    return next((group for test in tests for group in groups if test(group)), None)
