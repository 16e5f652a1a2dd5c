"""The chips that ranks run on: what the runtime and torch_npu would learn from the driver and from HCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

from torch_npu.op_plugin.meta import _meta_registrations

from npuq.runtime.ops.ascend.ranks import communicator
from npuq.runtime.ops.ascend.ranks.rules import LIMITS

from .. import emulate
from .communicators import DEFAULT_BUFFER, open_communicator

SOCS = {"A2": "Ascend910B1", "A3": "Ascend910_9391"}
NUMBERS = {"A2": 220, "A3": 250}  # torch_npu's own
NEVER = 10_000  # ranks


@dataclass(frozen=True)
class Chips:
    """Chips of a family. dispatches: experts' rows may be dispatched: on A2 in small groups too, as is documented where
    engines choose otherwise; False leaves A2 to that choice, and keeps A3 from it. buffer: HCCL's, MB."""

    family: str
    dispatches: bool = True
    buffer: int = DEFAULT_BUFFER

    @property
    def soc(self) -> str:
        return SOCS[self.family]


@contextmanager
def as_on_npus(chips: Chips, **rules: bool) -> Iterator[emulate.Rules]:
    """Let operators be made as on these chips."""
    limits = {name: value for name, value in LIMITS.items() if chips.family in name}
    if chips.dispatches:
        limits = {name: replace(value, least_ranks=2) for name, value in limits.items()}
    elif chips.family == "A3":
        limits = {name: replace(value, least_ranks=NEVER) for name, value in limits.items()}
    with (
        emulate.use_rules(family=chips.family, **rules) as used,
        mock.patch.object(communicator, "LIMITS", limits),
        mock.patch.object(communicator, "hccl_name", lambda: open_communicator(chips.buffer)),
        mock.patch.object(_meta_registrations, "get_soc_version", lambda: NUMBERS[chips.family]),
        mock.patch.dict("os.environ", {"HCCL_BUFFSIZE": str(chips.buffer)}),
    ):
        yield used
