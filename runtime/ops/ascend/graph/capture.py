"""Graphs of torch_npu (`torch.npu.NPUGraph`), and the update of attention's lengths before its turn in a replay.

Attention takes the lengths of its sequences as lists of the host, so its kernels must be set up anew for each replay.
torch_npu does that (`auto_dispatch_capture`): while it captures, it puts every attention operator into a task group
behind an event. A replay stops at each such event until `NPUGraph.update` has set that group up and records the event.
So the replay starts first, and the host sets up the attention of later layers while earlier ones run.

Sources: `torch_npu/npu/graphs.py` and `_npugraph_handlers/` in the wheels 2.10.0.post7 and 2.13.0. SGLang updates its
graphs in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

KV_LENGTHS = ("actual_seq_lengths_kv", "actual_seq_kvlen")
"""The keys' lengths in `npu_fused_infer_attention_score` and in its second version. Those of queries never change."""


class NpuGraph:
    """One captured step. See `StepGraph`."""

    def __init__(self, graph: Any, output: Tensor, npu: Any):
        self.output = output
        self._graph, self._npu = graph, npu

    def replay(self, kv_lens: Sequence[int]) -> None:
        self._graph.replay()
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
    """Capture on the current NPU. See `Graphs`. npu: the module `torch_npu.npu`."""

    def __init__(self, npu: Any):
        self._npu = npu
        self._pool: Any = None

    def capture(self, run: Callable[[], Tensor]) -> NpuGraph:
        if self._pool is None:
            self._pool = self._npu.graph_pool_handle()
        graph = self._npu.NPUGraph()
        # Other threads of the process, a server's for instance, may use the device meanwhile.
        with self._npu.graph(graph, pool=self._pool, auto_dispatch_capture=True, capture_error_mode="thread_local"):
            output = run()
        return NpuGraph(graph, output, self._npu)
