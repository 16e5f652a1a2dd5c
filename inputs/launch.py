"""The place of this process among those that torchrun started, as the environment gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import RankError
from .printable import shown

MAX_RANKS = 1024


@dataclass(frozen=True)
class Launch:
    """A process of a launch. rank: its number of `size`. local_rank: its number among the `local_size` of its machine.

    address, port: where torchrun's store listens; rank 0 runs on the machine of that address.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launch:
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (all on one machine without it), MASTER_ADDR and
        MASTER_PORT; a process alone where RANK or WORLD_SIZE is not set, or WORLD_SIZE is 1.

        Raises RankError for a variable that is missing beside them, or out of range.
        """
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        size = _number(environment, "WORLD_SIZE", 1, MAX_RANKS)
        rank = _number(environment, "RANK", 0, size - 1)
        if size == 1:
            return cls()
        address = environment.get("MASTER_ADDR", "")
        if not address or not address.isprintable() or any(character.isspace() for character in address):
            raise _wrong("MASTER_ADDR", environment, "the name of a machine")
        return cls(
            rank,
            size,
            _number(environment, "LOCAL_RANK", 0, size - 1),
            _number(environment, "LOCAL_WORLD_SIZE", 1, size) if "LOCAL_WORLD_SIZE" in environment else size,
            address,
            _number(environment, "MASTER_PORT", 1, 65535),
        )


def _number(environment: Mapping[str, str], name: str, least: int, most: int) -> int:
    text = environment.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) <= 5 and least <= int(text) <= most):
        raise _wrong(name, environment, f"a whole number from {least} to {most}")
    return int(text)


def _wrong(name: str, environment: Mapping[str, str], wanted: str) -> RankError:
    found = f"is {shown(environment[name])}" if name in environment else "is not set"
    return RankError(
        f"the variable {name} {found}, and must be {wanted}: torchrun sets it; "
        "to run one process, unset RANK and WORLD_SIZE"
    )
