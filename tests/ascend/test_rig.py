"""Sets the rig up and runs the checks in it: all of them with one torch_npu, and with the oldest and the newest the
checks of schemas and of every operator."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest
from ascend_rig.install import ENDS, TORCH_NPU, prepare, run_python

HERE = Path(__file__).parent
CHECKS = {str(path.relative_to(HERE)) for path in HERE.rglob("check_*.py")}
# Long ones and those that share ranks, each in a process beside others'. The rest is one more process: torch and
# torch_npu take seconds to start.
ALONE = {
    "generation": ("check_generation.py",),
    "sparse": ("check_sparse.py",),
    "mutations": ("check_mutations.py", "check_sparse_mutations.py", "check_grouped_mutations.py"),
    **{name: tuple(sorted(each for each in CHECKS if each.startswith(f"{name}/"))) for name in ("graph", "ranks")},
}
TOGETHER = tuple(sorted(CHECKS - {name for group in ALONE.values() for name in group}))
GROUPS = {**ALONE, "operators": TOGETHER}
# Every call of the runtime, and every operator's self-test in all dtypes and layouts.
AT_THE_ENDS = (
    "check_schemas.py",
    "check_doctor.py",
    "graph/check_handlers.py",
    "check_selftest.py::test_the_ascend_set_passes",
)

TOOLS = ("gcc", "nm", "readelf")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux"
    or platform.machine() != "x86_64"
    or not (3, 10) <= sys.version_info[:2] <= (3, 13)
    or not all(map(shutil.which, TOOLS)),
    reason=f"the Ascend rig needs Linux on x86-64, Python 3.10 to 3.13 and {', '.join(TOOLS)}",
)


def run_checks(names: tuple[str, ...], version: str = TORCH_NPU) -> None:
    off = [option for plugin in ("xdist", "cacheprovider", "warnings") for option in ("-p", f"no:{plugin}")]
    options = [*off, "-p", "ascend_rig.fixtures", "-o", "python_files=check_*.py"]
    files = [str(HERE / name) for name in names]
    done = run_python("-m", "pytest", *options, *files, environment=prepare(version))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("group", GROUPS)
def test_checks_inside_the_rig(group):
    run_checks(GROUPS[group])


@pytest.mark.parametrize("version", ENDS)
def test_the_oldest_and_the_newest_torch_npu(version):
    run_checks(AT_THE_ENDS, version)


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
