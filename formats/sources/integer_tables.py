"""Tables of integers in a checkpoint: they belong where the family's table has them, and floats do not."""

from __future__ import annotations

from collections.abc import Mapping

from ...dtypes import INTEGER_CODES
from ...errors import CheckpointError
from ...models.roles import Role
from ...models.tensors import Spec
from .weights import Weight


def check_tables(specs: Mapping[str, Spec], weights: Mapping[str, Weight]) -> None:
    """Raise CheckpointError for integers where the model has floats, and for floats where it has integers."""
    for name, spec in specs.items():
        if spec.role is Role.OTHER:  # copied as it is
            continue
        dtype = weights[name].dtype
        wanted = spec.kept_dtype if spec.kept_dtype in INTEGER_CODES else None
        if dtype != wanted if wanted else dtype in INTEGER_CODES:
            raise CheckpointError(
                f"{weights[name].file}: tensor {name!r} is {dtype}; it must be {wanted or 'of floats'}: fetch that "
                "shard again"
            )
