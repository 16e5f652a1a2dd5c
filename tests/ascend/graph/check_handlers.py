"""What the runtime uses of torch_npu's graphs, in the Python files of the torch_npu that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch_npu

PARTS = {
    "npu/graphs.py": (
        "auto_dispatch_capture=False",
        'capture_error_mode: str = "global"',
        "def update(self, cpu_update_input):",
        "self.graph_dispatch_mode = _GraphDispatchMode()",
        "self.graph_dispatch_records = []",
        "record.event.record(self.update_stream)",
    ),
    "npu/_npugraph_handlers/ifa_handler.py": (
        '"npu_fused_infer_attention_score.default"',
        '"npu_fused_infer_attention_score_v2.default"',
        '"actual_seq_lengths_kv"',
        '"actual_seq_kvlen"',
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_graphs_are_captured_as_the_runtime_does(name):
    text = (Path(torch_npu.__file__).parent / name).read_text(encoding="utf-8")
    assert [part for part in PARTS[name] if part not in text] == []
