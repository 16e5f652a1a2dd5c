"""Sets the rig up and runs the checks in it; each file of checks is one test here, and so is each folder of them."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from ascend_rig.install import TORCH_NPU, prepare, run_python

HERE = Path(__file__).parent
FOLDERS = {path.parent.name for path in HERE.glob("*/check_*.py")}
CHECKS = [*sorted(path.name for path in HERE.glob("check_*.py")), *sorted(FOLDERS)]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not torch.__version__.startswith(TORCH_NPU),
    reason=f"the rig needs Linux on x86-64 and torch {TORCH_NPU}, for which torch_npu {TORCH_NPU} is built",
)


@pytest.mark.parametrize("name", CHECKS)
def test_checks_inside_the_rig(name):
    options = ["-p", "ascend_rig.fixtures", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "python_files=check_*.py"]
    done = run_python("-m", "pytest", *options, str(HERE / name))
    assert done.returncode == 0, done.stdout + done.stderr


PROBE = """
from npuq.errors import BackendError
from npuq.runtime.ops.ascend.support import import_torch_npu
try:
    import_torch_npu()
except BackendError as error:
    print(error)
"""


def test_missing_cann_is_told_in_a_line():
    """torch_npu without the stand-ins: what a user sees who has not installed CANN or not sourced its script."""
    done = run_python("-c", PROBE, environment={**prepare(), "LD_LIBRARY_PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "CANN" in done.stdout and "set_env.sh" in done.stdout
    assert "libhccl.so" in done.stdout or "libascendcl.so" in done.stdout
    assert done.stdout.count("\n") == 1


def test_without_torch_npu_the_backend_says_how_to_get_it():
    done = run_python("-c", PROBE, environment={})
    assert "npuq[ascend]" in done.stdout


def test_a_machine_without_an_npu_is_told_so():
    code = "from npuq.runtime.backend import make_ops\nmake_ops('ascend')"
    done = run_python("-c", code)
    assert "BackendError: torch_npu finds no NPU" in done.stderr.splitlines()[-1]
