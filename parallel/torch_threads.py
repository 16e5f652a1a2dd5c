"""How many threads torch's own operators take: one, where this package has threads of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def one_torch_thread() -> None:
    """To be called in each thread within `single_threaded_torch`: until one asks, BLAS there takes all cores."""
    torch.set_num_threads(1)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One torch thread within: the parallelism is somebody else's."""
    before = torch.get_num_threads()
    one_torch_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)
