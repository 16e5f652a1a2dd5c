"""A torch_npu that cannot be imported: every command that needs no NPU works, and `npuq doctor` says what is wrong.

Such a torch_npu is what pip installs beside the CUDA build of torch: torch imports it by itself, and it aborts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from npuq.cli.doctor import command
from npuq.errors import BackendError
from npuq.runtime.diagnostics import trial_import
from npuq.runtime.ops.ascend import support

RELEASE = support.release(torch.__version__)
FAULTS = {
    "abort": """
import os, sys
sys.stderr.write("terminate called after throwing an instance of 'c10::ValueError'\\n  what():  Duplicated key 'k'\\n")
sys.stderr.flush()
os.abort()
""",
    "raise": "raise ImportError('libhccl.so: cannot open shared object file: No such file or directory')",
    "no permission": "raise PermissionError(13, 'Permission denied', '/usr/local/Ascend/cann/opp')",
    "hang": "import time\ntime.sleep(3600)",
}


def install(folder: Path, fault: str) -> Path:
    """A torch_npu of torch's release that torch finds and loads by itself, and that fails."""
    (folder / "torch_npu").mkdir(parents=True)
    (folder / "torch_npu" / "__init__.py").write_text(FAULTS[fault] + "\ndef _autoload():\n    pass\n")
    metadata = folder / f"torch_npu-{RELEASE}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_npu\nVersion: {RELEASE}\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return folder


def python(packages: Path, *args: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Python with a folder of packages before all others, and with torch's own choice of what it loads."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    environment |= {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


# Each command in turn in one process: one that imported torch_npu would end it, or never end.
COMMANDS = """
import json, sys
from npuq.cli.main import main
codes = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["npuq", *arguments]
    try:
        main()
        codes[arguments[0]] = 0
    except SystemExit as end:
        codes[arguments[0]] = end.code
print(json.dumps(codes))
"""


def exit_codes(packages: Path, *commands: list[str]) -> dict[str, int]:
    done = python(packages, "-c", COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stdout + done.stderr
    codes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return codes


def test_no_command_without_an_npu_needs_a_torch_npu_that_works(tmp_path, example_fp8):
    packages = install(tmp_path / "packages", "abort")
    assert python(packages, "-c", "import torch").returncode == -6  # the fault is one
    artifact, text = str(tmp_path / "artifact"), tmp_path / "text"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about.")
    commands = [
        ["convert", str(example_fp8), artifact, "--method", "minmax", "--progress", "none"],
        ["verify", artifact],
        ["inspect", artifact],
        ["report", artifact],
        ["generate", artifact, "--prompt", "Call me", "--max-new-tokens", "1"],
        ["evaluate", artifact, "--text", str(text), "--context", "16"],
        ["doctor"],
    ]
    assert exit_codes(packages, *commands) == {arguments[0]: 0 for arguments in commands}
    # No token, and no name of a repository: an error in a line, before any hub is asked.
    hub = [["push", artifact, "somebody/model"], ["pull", "a/b/c", str(tmp_path / "pulled")]]
    assert exit_codes(packages, *hub) == {"push": 1, "pull": 1}


@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_a_torch_npu_that_raises_or_hangs_is_left_alone(tmp_path, example_fp8, fault):
    packages = install(tmp_path, fault)
    if fault == "raise":
        assert "Failed to load the backend extension" in python(packages, "-c", "import torch").stderr
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            python(packages, "-c", "import torch_npu", timeout=1)
    assert exit_codes(packages, ["inspect", str(example_fp8)], ["generate", str(example_fp8), "--help"]) == {
        "inspect": 0,
        "generate": 0,
    }


@pytest.mark.parametrize(
    "fault,said",
    [
        (
            "abort",
            f"torch_npu {RELEASE} ends the process that imports it (Aborted: Duplicated key 'k'); install",
        ),
        ("raise", "libhccl.so is not found; install CANN and source its set_env.sh"),
        ("no permission", f"torch_npu {RELEASE} does not start: [Errno 13] Permission denied: '/usr/local/Ascend"),
        ("hang", f"torch_npu {RELEASE} hangs when it is imported (stopped after 2 s): check the driver"),
    ],
)
def test_doctor_tries_the_import_in_a_child(tmp_path, monkeypatch, fault, said):
    monkeypatch.syspath_prepend(install(tmp_path, fault))
    monkeypatch.setattr(trial_import, "SECONDS", 2.0 if fault == "hang" else 600.0)
    result = CliRunner().invoke(command, ["--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and not report["ready"] and said in report["problem"]
    assert report["torch_npu"] == RELEASE and report["operators"] == {}


def test_a_torch_for_cuda_is_refused_before_torch_npu_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, "abort"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", f"{RELEASE}+cu130")
    with pytest.raises(BackendError) as error:
        support.import_torch_npu()
    assert str(error.value) == (
        f"torch {RELEASE}+cu130 is built for CUDA 13.0, and torch_npu ends every process that loads both; install "
        f"torch's CPU build: pip install torch=={RELEASE}+cpu --index-url https://download.pytorch.org/whl/cpu"
    )


def test_without_a_driver_torch_npu_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path / "packages", "raise"))
    asked = []
    monkeypatch.setattr(support, "import_torch_npu", lambda: asked.append(True))
    monkeypatch.setattr(support, "_DEVICES", tmp_path)
    assert support.npu_count() == 0 and not asked
    (tmp_path / "davinci_manager").touch()
    with pytest.raises(AttributeError):  # of None, which stands for torch_npu here
        support.npu_count()
    assert asked
