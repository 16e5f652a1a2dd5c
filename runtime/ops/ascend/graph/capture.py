"""Graphs of torch_npu (`torch.npu.NPUGraph`), and the update of attention's lengths before its turn in a replay.

Attention takes the lengths of its sequences as lists of the host, so its kernels must be set up anew for each replay.
torch_npu does that (`auto_dispatch_capture`): while it captures, it puts every attention operator into a task group
behind an event. A replay stops at each such event until `NPUGraph.update` has set that group up and records the event.
So the replay starts first, and the host sets up the attention of later layers while earlier ones run.

The replay also resets the events, behind its waits. So the update of a next one must not begin before the replay has
ended: an event recorded before its reset would be lost, and the next replay would wait for ever.

Sources: `torch_npu/npu/graphs.py` and `_npugraph_handlers/` in the wheels 2.10.0.post7 and 2.13.0. SGLang updates its
graphs in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

KV_LENGTHS = ("actual_seq_lengths_kv", "actual_seq_kvlen")
"""The keys' lengths in `npu_fused_infer_attention_score` and in its second version. Those of queries never change."""


class NpuGraph:
    """One captured step. See `StepGraph`."""

    def __init__(self, graph: Any, output: Tensor, npu: Any, device: torch.device):
        self.output = output
        self._graph, self._npu, self._device = graph, npu, device
        self._end = npu.Event()  # of the last replay

    def replay(self, kv_lens: Sequence[int]) -> None:
        with self._npu.device(self._device):  # a thread begins with another one
            self._end.synchronize()  # at once, where the last step's logits have been read
            self._graph.replay()
            self._end.record()
            try:
                self._graph.update(cpu_update_input=[{name: list(kv_lens) for name in KV_LENGTHS}])
            except BaseException:
                self._release()
                raise

    def _release(self) -> None:
        """Let a replay run to its end whose update was interrupted: it would wait, and so would every later step."""
        mode = self._graph.graph_dispatch_mode
        for record in mode.graph_dispatch_records:
            record.event.record(mode.update_stream)
        self._npu.synchronize()
        for record in mode.graph_dispatch_records:  # else the next replay would not wait for its update
            record.event.reset(mode.update_stream)
        self._npu.synchronize()


class NpuGraphs:
    """Capture on one NPU. See `Graphs`. npu: the module `torch_npu.npu`."""

    def __init__(self, npu: Any, device: torch.device):
        self._npu, self._device = npu, device
        self._stream: Any = None
        self._pool: Any = None

    def capture(self, run: Callable[[], Tensor]) -> NpuGraph:
        npu = self._npu
        with npu.device(self._device):
            if self._stream is None:
                self._stream, self._pool = npu.Stream(), npu.graph_pool_handle()
            npu.synchronize()
            npu.empty_cache()
            graph = npu.NPUGraph()
            graph.auto_dispatch_capture = True
            # By hand, as `torch.npu.graph` does it: that leaves its stream and its mode in place if a capture fails.
            with npu.stream(self._stream), graph.graph_dispatch_mode:
                # Other threads of the process, a server's for instance, may use the device meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    output = run()
                except BaseException:
                    with suppress(Exception):  # the end of an invalid capture is an error too, of less interest
                        graph.capture_end()
                    raise
                graph.capture_end()
        return NpuGraph(graph, output, npu, self._device)
