"""A second stream of the NPU, for work that does not wait for what runs beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class SideStream:
    """The stream. npu: the module `torch_npu.npu`.

    It is used in captured steps only: there a fork and a join cost nothing, while an eager step waits for the host,
    which has four calls more to make. Memory is safe without `record_stream`: the side begins after all earlier work
    of the main stream, and the main stream joins it before it frees or reads anything that the side used.
    """

    def __init__(self, npu: Any):
        self._npu = npu
        self._stream = npu.Stream()

    @property
    def active(self) -> bool:
        """True while a step is captured."""
        return bool(self._npu.is_current_stream_capturing())

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """Run `work` beside what follows on the main stream, until `join`: its result, not to be read before."""
        self._stream.wait_stream(self._npu.current_stream())
        with self._npu.stream(self._stream):
            return work()

    def join(self) -> None:
        """Let the main stream wait for the work."""
        self._npu.current_stream().wait_stream(self._stream)
