"""Claims on shards: of all processes on a shared file system, one at a time writes a shard.

A claim is a symbolic link, which every file system makes in one step together with its content, or refuses where its
name is there already. Its name is the shard and a number, its content the name of the claiming run; it is never
followed. A claim is not removed: whoever takes a shard over makes the one with the next number. So a process that was
taken for dead and comes back cannot claim again what another has by now.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ...errors import ConversionError

RUN_NAME: Final = re.compile(r"([0-9]{1,5})-of-([0-9]{1,5})-[0-9a-f]{16}\.jsonl")
"""Names of runs: rank, number of ranks, and a random part."""
_CLAIM: Final = re.compile(r"([0-9]{1,9})\.([0-9]{1,4})")
_MOST: Final = 9999
"""The largest number of a claim: each is looked up by its name, and a stranger's link must not name a billion."""


class Claims:
    """The folder of claims."""

    def __init__(self, folder: Path):
        self.folder = folder

    def all(self) -> dict[int, dict[int, str | None]]:
        """The claims of each shard by number: the run of each; None for what is no claim. Raises OSError."""
        found: dict[int, dict[int, str | None]] = {}
        for path in self.folder.iterdir():
            if match := _CLAIM.fullmatch(path.name):
                shard, number = int(match[1]), int(match[2])
                found.setdefault(shard, {})[number] = self.run(shard, number)
        return found

    def newest(self, shard: int, known: Mapping[int, str | None]) -> tuple[int, str | None]:
        """The number and the run of a shard's last claim, (0, None) without any.

        known: of `all`, which a file system may have kept from before: later claims are looked up by name.
        """
        number = max(known, default=0)
        run = known.get(number)
        while self._exists(shard, number + 1):
            number += 1
            run = self.run(shard, number)
        return number, run

    def take(self, shard: int, number: int, run: str) -> bool:
        """Make a shard's claim of that number; False where another run has made it. Raises OSError, and ConversionError
        for a number that is too large."""
        if number > _MOST:
            raise ConversionError(
                f"{self.folder}: a shard was claimed {_MOST} times; where no npuq runs, remove this folder and run "
                "the same command again"
            )
        try:
            self._path(shard, number).symlink_to(run)
        except FileExistsError:
            return False
        return True

    def _path(self, shard: int, number: int) -> Path:
        return self.folder / f"{shard}.{number}"

    def _exists(self, shard: int, number: int) -> bool:
        return os.path.lexists(self._path(shard, number))

    def run(self, shard: int, number: int) -> str | None:
        """The run of a claim; None where there is no claim of that number. Raises OSError."""
        try:
            content = str(self._path(shard, number).readlink())
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # no link
                return None
            raise
        return content if RUN_NAME.fullmatch(content) else None
