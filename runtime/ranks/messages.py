"""Messages of rank 0 to its followers: the chunks of a step, or the end, as one row of whole numbers.

A message is `[model, chunks, length, …]`, then for each chunk `start, flags, tokens, blocks` and as many token ids and
blocks. `model` is a model's number in the order of loading, or STOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch

from ..step import Chunk
from .group import Group

STOP: Final = -1
_HEADER: Final = 3
_FIRST: Final = 1024
"""Numbers of the first broadcast: all of most messages. What does not fit comes in a second one."""


@dataclass(frozen=True)
class Message:
    """A step of one model, or the end where `model` is STOP."""

    model: int
    chunks: tuple[Chunk, ...] = ()


def send(message: Message, group: Group) -> None:
    """Send a message to all followers, who `receive` it."""
    numbers = list(_encoded(message))
    numbers[2:2] = [len(numbers) + 1]
    numbers += [0] * (_FIRST - len(numbers))
    group.broadcast(torch.tensor(numbers[:_FIRST], dtype=torch.int64))
    if len(numbers) > _FIRST:
        group.broadcast(torch.tensor(numbers[_FIRST:], dtype=torch.int64))


def receive(group: Group) -> Message:
    """Wait for the next message of rank 0."""
    numbers: list[int] = group.broadcast(torch.empty(_FIRST, dtype=torch.int64)).tolist()
    model, chunks, length = numbers[:_HEADER]
    if length > _FIRST:
        numbers += group.broadcast(torch.empty(length - _FIRST, dtype=torch.int64)).tolist()
    rest = iter(numbers[_HEADER:length])
    return Message(model, tuple(_chunk(rest) for _ in range(chunks)))


def _encoded(message: Message) -> Iterator[int]:
    yield from (message.model, len(message.chunks))
    for chunk in message.chunks:
        flags = chunk.last_row | chunk.all_rows << 1 | chunk.absorbed << 2
        yield from (chunk.start, flags, len(chunk.token_ids), len(chunk.blocks))
        yield from chunk.token_ids
        yield from chunk.blocks


def _chunk(numbers: Iterator[int]) -> Chunk:
    start, flags, tokens, blocks = islice(numbers, 4)
    return Chunk(
        list(islice(numbers, tokens)),
        start,
        list(islice(numbers, blocks)),
        last_row=bool(flags & 1),
        all_rows=bool(flags & 2),
        absorbed=bool(flags & 4),
    )
