"""The thread count of torch's own operators: one, where this package starts threads of its own.

torch is not imported for this: work that never uses it does not pay for its import.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..deferred import is_imported, torch


def one_torch_thread() -> None:
    """Set this thread's count to one. Each new thread within `single_threaded_torch` must call it before it computes
    with torch: BLAS takes all cores until then."""
    torch.set_num_threads(1)


def one_thread_of_imported_torch() -> None:
    """As `one_torch_thread`, but nothing where torch is not imported."""
    if is_imported():
        one_torch_thread()


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Limit torch to one thread within the context, whose caller runs threads itself.

    Where torch is first imported within the context, only threads that call `one_torch_thread` are limited.
    """
    before = None
    if is_imported():
        before = torch.get_num_threads()
        one_torch_thread()
    try:
        yield
    finally:
        if is_imported():
            # Threads that set their own count set that of MKL for all.
            torch.set_num_threads(before or torch.get_num_threads())
