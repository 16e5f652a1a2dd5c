"""The runtime's calls against the oldest and the newest torch_npu that they fit, read out of their wheels.

Neither is imported: each release needs its own release of torch, of which PyPI has CUDA builds alone, and torch_npu
aborts beside such a build. The rig runs the release between them.
"""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ascend_rig.install import CACHE, TORCH_NPU
from ascend_rig.schemas import fit_table, schemas_of_wheel

LISTING = json.loads((Path(__file__).parents[1] / "schemas.json").read_text())
ENDS = ("2.10.0.post7", "2.14.0")


def wheel(version: str) -> Path:
    """The wheel, downloaded once a checkout."""
    folder = CACHE / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers may arrive together
        found = list(folder.glob(f"torch_npu-{version}-*.whl"))
        if not found:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            subprocess.run([*command, "--dest", str(folder), f"torch_npu=={version}"], check=True)
            found = list(folder.glob(f"torch_npu-{version}-*.whl"))
    return found[0]


# What the runtime uses of torch_npu's graphs, in its Python files.
GRAPHS = {
    "torch_npu/npu/graphs.py": (
        "auto_dispatch_capture=False",
        'capture_error_mode: str = "global"',
        "def update(self, cpu_update_input):",
        "self.graph_dispatch_mode = _GraphDispatchMode()",
        "self.graph_dispatch_records = []",
        "record.event.record(self.update_stream)",
    ),
    "torch_npu/npu/_npugraph_handlers/ifa_handler.py": (
        '"npu_fused_infer_attention_score.default"',
        '"npu_fused_infer_attention_score_v2.default"',
        '"actual_seq_lengths_kv"',
        '"actual_seq_kvlen"',
    ),
}

in_wheels = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or sys.version_info[:2] != (3, 11),
    reason="torch_npu's wheels for CPython 3.11 on Linux x86-64 are read",
)


@in_wheels
@pytest.mark.parametrize("version", ENDS)
def test_the_wheel_captures_graphs_as_the_runtime_does(version):
    with zipfile.ZipFile(wheel(version)) as archive:
        for name, parts in GRAPHS.items():
            text = archive.read(name).decode()
            assert [part for part in parts if part not in text] == []


@in_wheels
@pytest.mark.parametrize("version", ENDS)
def test_the_wheel_has_the_schemas_that_the_calls_fit(version):
    schemas = schemas_of_wheel(wheel(version), LISTING["calls"])
    assert schemas == LISTING["versions"][version]
    table = fit_table(LISTING["calls"], {TORCH_NPU: LISTING["versions"][TORCH_NPU], version: schemas}, TORCH_NPU)
    assert table[version] == []
