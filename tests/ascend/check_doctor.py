"""`npuq doctor` with the real torch_npu: every operator is there, and no device is."""

from __future__ import annotations

import pytest
import torch_npu

from npuq.errors import BackendError
from npuq.runtime.backend import make_ops
from npuq.runtime.diagnostics import doctor
from npuq.runtime.ops.ascend.support import OPERATORS


@pytest.fixture(scope="module")
def report() -> doctor.Diagnosis:
    """Examined once: it imports torch_npu in a process of its own."""
    return doctor.examine()


def test_operators_are_listed_with_their_schemas(report):
    assert report.torch_npu == torch_npu.__version__
    assert list(report.operators) == list(OPERATORS) and all(report.operators.values())
    assert "cache_mode" in report.operators["npu_kv_rmsnorm_rope_cache"]


def test_no_device_is_told_plainly(report):
    assert not report.ready and report.devices == ()
    assert report.problem == "no NPU is visible: check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"


def test_a_device_that_does_not_start_is_told_in_a_line(monkeypatch):
    def refuse(device):
        raise RuntimeError("SetPrecisionMode:NPU function error,\nerror code is 107001")

    monkeypatch.setattr(torch_npu.npu, "is_available", lambda: True)
    monkeypatch.setattr(torch_npu.npu, "set_device", refuse)
    with pytest.raises(BackendError, match="npu:7 cannot be used: SetPrecisionMode:NPU function error, error code"):
        make_ops("ascend", device="npu:7")
