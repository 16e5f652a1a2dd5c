"""Stand-ins for what torch_npu has in C++ of graphs, under its own Python code for capture and update.

The dispatch mode that puts attention into task groups, its handlers, and `NPUGraph.update` run as they are. Below
them, a captured call is recorded, an event makes a replay wait, and an update changes the arguments of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any
from unittest import mock

import torch
import torch_npu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch_npu.npu import graphs
from torch_npu.npu._npugraph_handlers import npugraph_handler

from npuq.runtime.ops.ascend.graph.capture import NpuGraphs

from .. import guard
from .operators import register
from .recording import Call, GraphError, Recorder, unowned

Entry = Call | Callable[["Graph"], bool]


class Stream:
    """A stream by name alone: everything runs in the order of the host, but for what waits."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def synchronize(self) -> None:
        device.synchronize()


class ExternalEvent:
    """A flag that a replay waits for. record: set it. reset: clear it."""

    def __init__(self) -> None:
        self.is_set = False

    def wait(self, stream: Stream) -> None:
        device.enqueue(lambda _: self.is_set)

    def reset(self, stream: Stream) -> None:
        def clear(_: Graph) -> bool:
            self.is_set = False
            return True

        device.enqueue(clear)

    def record(self, stream: Stream) -> None:
        self.is_set = True
        device.go_on()


class Event:
    """The end of what runs when it is recorded: of the graph, here."""

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        device.synchronize()


class Graph:
    """Stands for torch_npu.npu.NPUGraph; its `update` is torch_npu's own."""

    update = graphs.NPUGraph.update

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.recorder = Recorder(self.entries.append)
        self.graph_dispatch_mode = _UnderneathRecorded(graphs._GraphDispatchMode(), self.recorder)
        self.auto_dispatch_capture = False
        self.next = 0  # the entry that a running replay comes to
        self.replays = 0
        self._watching = ExitStack()
        self._done = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if device.capturing is not None:
            raise GraphError("a capture begins within another")
        if not self.auto_dispatch_capture or pool is None or capture_error_mode != "thread_local":
            raise GraphError("the runtime captures with torch_npu's mode, in one pool, beside other threads")
        device.capturing = self
        self._watching.enter_context(guard.watch())

    def capture_end(self) -> None:
        self._watching.close()
        device.capturing = None
        self.recorder.memory.restore()
        self.recorder.memory.spoil()
        self._done = True

    def replay(self) -> None:
        if not self._done:
            raise GraphError("a replay before the capture's end")
        if not device.current:
            raise GraphError("a replay on whatever device the thread has")
        if device.running is not None:
            raise GraphError("a replay before the last one has reset its events: what is recorded meanwhile is lost")
        self.recorder.memory.spoil()
        self.replays += 1
        self.next = 0
        device.running = self
        device.go_on()

    def go_on(self) -> None:
        """Run until the end, until an event that is not recorded, or until an error, which ends the replay."""
        waits = False
        try:
            with torch.inference_mode():
                while not waits and self.next < len(self.entries):
                    entry = self.entries[self.next]
                    if isinstance(entry, Call):
                        entry.run(self.recorder.memory)
                    else:
                        waits = not entry(self)
                    self.next += not waits
        finally:
            if not waits:
                device.running = None

    def check_nothing_left(self, *allowed: Tensor) -> None:
        """Raise GraphError if anything but the graph holds tensors that the capture has made, apart from `allowed`."""
        held = [tensor for tensor in self.recorder.left() if not any(tensor is each for each in allowed)]
        if held:
            raise GraphError(f"{len(held)} tensors of the graph's memory outlive the capture: {held[0].shape}")

    def reset(self) -> None:
        self.entries.clear()


class _UnderneathRecorded:
    """torch_npu's dispatch mode over the recorder, which then sees the calls that the mode makes."""

    def __init__(self, mode: Any, recorder: Recorder):
        self._mode, self._recorder = mode, recorder

    def __enter__(self) -> None:
        self._recorder.__enter__()
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        self._recorder.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mode, name)


class _Updating(TorchDispatchMode):
    """Between begin and end of an update, a call is not run: its arguments go to the recorded one."""

    def __init__(self, call: Call):
        super().__init__()
        self._call = call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not self._call.function:
            raise GraphError(f"{func} in the update of {self._call.function}")
        self._call.update(args, kwargs or {})
        return tuple((kwargs or {})["out"])


class Device:
    """The one device: what captures, what runs, and what an update changes.

    lags: it is so slow that a graph runs only when the host waits for it.
    """

    def __init__(self) -> None:
        self.capturing: Graph | None = None
        self.running: Graph | None = None
        self.graphs: list[Graph] = []
        self.lags = False
        self.current: list[torch.device] = []
        self._group: int | None = None
        self._updating: _Updating | None = None

    def new_graph(self) -> Graph:
        self.graphs.append(Graph())
        return self.graphs[-1]

    def enqueue(self, entry: Callable[[Graph], bool]) -> None:
        if self.capturing is not None:
            self.capturing.entries.append(entry)
        elif self.running is not None or not entry(Graph.__new__(Graph)):
            raise GraphError("an event is waited for, or reset, while a graph runs")

    def go_on(self) -> None:
        if self.running is not None and not self.lags:
            self.running.go_on()

    def synchronize(self) -> None:
        if self.running is not None:
            self.running.go_on()
        if self.running is not None:
            raise GraphError("the host waits for a graph that waits for an event")

    def group_begin(self, stream: Stream) -> None:
        assert self.capturing is not None
        self._group = len(self.capturing.entries)

    def group_end(self, stream: Stream) -> Call:
        assert self.capturing is not None and self._group is not None
        calls = self.capturing.entries[self._group :]
        self._group = None
        if len(calls) != 1 or not isinstance(calls[0], Call):
            raise GraphError(f"a task group of {len(calls)} operators")
        return calls[0]

    def update_begin(self, stream: Stream, handle: Call) -> None:
        self._updating = _Updating(handle)
        self._updating.__enter__()

    def update_end(self, stream: Stream) -> None:
        assert self._updating is not None
        self._updating.__exit__(None, None, None)
        self._updating = None


device = Device()


@contextmanager
def emulated() -> Iterator[Device]:
    """torch_npu's graphs on the stand-ins, for CPU tensors."""
    device.__init__()  # type: ignore[misc]
    current = Stream()

    @contextmanager
    def entering(stream: Stream) -> Iterator[None]:
        yield

    @contextmanager
    def on_device(which: torch.device) -> Iterator[None]:
        device.current.append(which)
        yield
        device.current.pop()

    on_npu = {
        "NPUGraph": device.new_graph,
        "Stream": Stream,
        "Event": Event,
        "ExternalEvent": ExternalEvent,
        "stream": entering,
        "current_stream": lambda *_: current,
        "device": on_device,
        "synchronize": device.synchronize,
        "empty_cache": lambda: None,
        "graph_pool_handle": object,
    }
    # Named by torch_npu's own, so that a name that is not there is noticed.
    in_graphs = {
        "_graph_task_group_begin": device.group_begin,
        "_graph_task_group_end": device.group_end,
        "_graph_task_update_begin": device.update_begin,
        "_graph_task_update_end": device.update_end,
        "deepcopy": _copy,
    }
    with ExitStack() as stack:
        stack.callback(register()._destroy)
        for module, changes in ((torch_npu.npu, on_npu), (graphs, in_graphs), (npugraph_handler, {"deepcopy": _copy})):
            for name, value in changes.items():
                stack.enter_context(mock.patch.object(module, name, value))
        stack.enter_context(mock.patch.object(graphs._GraphDispatchMode, "update_stream", Stream()))
        yield device
        device.synchronize()


def npu_graphs() -> NpuGraphs:
    """The runtime's capture, on the stand-ins."""
    return NpuGraphs(torch_npu.npu, torch.device("cpu"))


def _copy(value: Any) -> Any:
    """What torch_npu keeps of an argument to call the operator again: the tensors of an NPU without owning their memory
    (`TensorWeakRef`), and copies of all else. Here all tensors are the NPU's."""
    return unowned(value) if isinstance(value, Tensor) else deepcopy(value)
