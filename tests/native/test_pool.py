"""The pool: calls from several Python threads, a fork, more threads than work, and what cannot be started."""

from __future__ import annotations

import mmap
import os
import threading
import time

import pytest
import torch

from npuq.native.binding import Pool
from npuq.runtime.ops.native import NativeOps

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")


def test_calls_from_several_threads_take_turns() -> None:
    ops = NativeOps(threads=3)
    inputs = [torch.randn(50, 300) for _ in range(4)]
    expected = [ops.norms.dynamic_quant(x).codes for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(200):
            if not torch.equal(ops.norms.dynamic_quant(inputs[index]).codes, expected[index]):
                wrong.append(index)  # noqa: PERF401 - a failure, not a list being made

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_child_works_alone() -> None:
    """Threads do not survive a fork: the child must neither wait for them nor hang."""
    ops = NativeOps(threads=4)
    x = torch.randn(64, 512)
    expected = ops.norms.dynamic_quant(x).codes
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.norms.dynamic_quant(x).codes, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_pools_come_and_go() -> None:
    for threads in (1, 2, 7, 2, 1) * 5:
        ops = NativeOps(threads=threads)
        assert ops.norms.dynamic_quant(torch.ones(3, 5)).codes.eq(127).all()


def test_weights_that_followed_may_be_gone() -> None:
    """Waiting threads fetch what followed a product the last time, in memory that may have been unmapped since."""
    ops = NativeOps(threads=3)
    x = torch.randn(1, 1024)
    lasting = ops.weights.float_linear([torch.randn(512, 1024)])
    memory = mmap.mmap(-1, 512 * 1024 * 4)
    passing = ops.weights.float_linear([torch.frombuffer(memory, dtype=torch.float32).view(512, 1024)])
    expected = ops.products.linear(x, lasting)
    for _ in range(50):
        ops.products.linear(x, passing)
        ops.products.linear(x, lasting)
    del passing
    memory.close()
    for _ in range(50):
        assert torch.equal(ops.products.linear(x, lasting), expected)
        time.sleep(1e-4)  # as long as threads wait before they sleep


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no native kernels for 'sve9'"):
        Pool(1, "sve9")
    with pytest.raises(RuntimeError, match="cannot start 0 threads"):
        Pool(0)


def test_the_library_says_what_it_is() -> None:
    from npuq.native import library

    assert library.description() == f"native kernels ({LEVELS[-1]})"
    assert LEVELS[0] == "portable"
