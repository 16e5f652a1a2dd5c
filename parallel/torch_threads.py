"""The thread count of torch's own operators: one, where this package starts threads of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def one_torch_thread() -> None:
    """Set this thread's count to one. Each new thread within `single_threaded_torch` must call it: BLAS takes all cores
    until then."""
    torch.set_num_threads(1)


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Limit torch to one thread within the context, whose caller runs threads itself."""
    before = torch.get_num_threads()
    one_torch_thread()
    try:
        yield
    finally:
        torch.set_num_threads(before)
