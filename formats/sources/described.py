"""Linears described by `quant_model_description.json`: npuq's artifacts, and ModelSlim's."""

from __future__ import annotations

from collections.abc import Mapping

from ...dtypes import FLOAT_CODES
from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..schemes import BIAS, DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, OFFSET, QUANT_BIAS, SCALE, WEIGHT, Scheme
from .stored_linear import Codes, StoredLinear

# The tensors of each scheme beside `P.weight`: the accepted dtypes, and True where the tensor may be missing, because
# ModelSlim leaves it out or it follows from the others.
_BESIDE: Mapping[Scheme, Mapping[str, tuple[tuple[str, ...], bool]]] = {
    Scheme.W4A8: {SCALE: (FLOAT_CODES, False), OFFSET: (FLOAT_CODES, True), BIAS: (FLOAT_CODES, True)},
    Scheme.W8A8: {SCALE: (FLOAT_CODES, False), OFFSET: (FLOAT_CODES, True)},
    Scheme.W8A8_STATIC: {
        SCALE: (FLOAT_CODES, True),
        OFFSET: (FLOAT_CODES, True),
        INPUT_SCALE: (FLOAT_CODES, False),
        INPUT_OFFSET: (FLOAT_CODES, False),
        DEQ_SCALE: (("F32", "I64"), False),
        QUANT_BIAS: (("I32",), False),
    },
}


def described_linears(checkpoint: Checkpoint, types: Mapping[str, Scheme]) -> dict[str, StoredLinear]:
    """Find the quantized linears of a checkpoint with the description `types`, in headers alone.

    Raises CheckpointError for a linear whose scheme's tensors are missing, of another dtype or shape, or described with
    another scheme.
    """
    return {
        name: described_linear(checkpoint, types, name)
        for name, scheme in types.items()
        if scheme is not Scheme.FLOAT and name.endswith(f".{WEIGHT}") and name in checkpoint.tensors
    }


def described_linear(
    checkpoint: Checkpoint, types: Mapping[str, Scheme], name: str, shape: tuple[int, int] | None = None
) -> StoredLinear:
    """Find one linear that `types` describes as quantized; `shape` is its shape by config.json.

    Errors as of `described_linears`; also CheckpointError where the linear is missing or has another shape.
    """
    info, scheme = checkpoint.info(name), types[name]
    if info.dtype != "I8" or len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is described as {scheme.value} and stored as {info.dtype} {list(info.shape)}"
        )
    rows, inputs = info.shape
    packed = scheme is Scheme.W4A8
    outputs = 2 * rows if packed else rows
    if shape is not None and shape != (outputs, inputs):
        raise CheckpointError(
            f"{info.file}: tensor {name!r} is {info.dtype} {list(info.shape)}, {outputs} outputs of {inputs} inputs in "
            f"{scheme.value}; config.json says {list(shape)}"
        )
    tensors, prefix, known = {WEIGHT: name}, name.removesuffix(WEIGHT), checkpoint.tensors
    for suffix, (dtypes, optional) in _BESIDE[scheme].items():
        part = prefix + suffix
        found = known.get(part)
        if found is None:
            if not optional:
                raise CheckpointError(
                    f"{info.file}: tensor {part!r} is missing: {scheme.value} needs it; fetch all shards"
                )
            continue
        if found.dtype not in dtypes or not _fits(suffix, found.shape, outputs, inputs):
            raise CheckpointError(
                f"{found.file}: tensor {part!r} is {found.dtype} {list(found.shape)}, which {scheme.value} of "
                f"{outputs} outputs cannot have; npuq reads one scale a channel"
            )
        if types.get(part, scheme) is not scheme:
            raise CheckpointError(
                f"{found.file}: tensor {part!r} is described as {types[part].value}, its weight as {scheme.value}"
            )
        tensors[suffix] = part
    return StoredLinear(
        checkpoint, name, scheme, (outputs, inputs), Codes.INT4_OUTPUTS if packed else Codes.INT8, tensors
    )


def _fits(suffix: str, shape: tuple[int, ...], outputs: int, inputs: int) -> bool:
    if suffix in (INPUT_SCALE, INPUT_OFFSET):
        return shape in ((1,), ())
    if suffix == BIAS:
        return len(shape) == 2 and shape[0] == outputs and shape[1] > 0 and inputs % shape[1] == 0
    return shape in ((outputs,), (outputs, 1))
