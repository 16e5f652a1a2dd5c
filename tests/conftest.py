"""Paths and settings that all tests share."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test module imports huggingface_hub, which reads these once: no test may reach a real hub, or the user's
# cache and token. tests/hub serves the endpoint; elsewhere nobody listens.
_home = tempfile.TemporaryDirectory(prefix="npuq-tests-hf-")
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_free.getsockname()[1]}"
os.environ["HF_HOME"] = _home.name
for _name in (
    *("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_SHARED_BLOBS", "HF_XET_CACHE"),
):
    os.environ.pop(_name, None)

# A script's job in the background inherits that SIGINT is ignored, and so would all processes that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Builders of small checkpoints in several rooms' tests.
sys.path.insert(0, str(Path(__file__).parent / "checkpoints"))
# The schemas of what --json prints.
sys.path.insert(0, str(Path(__file__).parent / "schemas"))

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(scope="session")
def example_fp8() -> Path:
    """The shipped trained checkpoint, as DeepSeek ships theirs: FP8 in 128×128 blocks."""
    return EXAMPLES / "tiny-deepseek-v3-fp8"


@pytest.fixture(scope="session")
def eval_text() -> Path:
    return EXAMPLES / "eval.txt"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from npuq.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call
