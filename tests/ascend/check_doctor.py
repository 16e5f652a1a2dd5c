"""`npuq doctor` with the real torch_npu: every operator is there, and no device is."""

from __future__ import annotations

import torch_npu

from npuq.runtime.diagnostics import doctor
from npuq.runtime.ops.ascend.support import OPERATORS


def test_operators_are_listed_with_their_schemas():
    report = doctor.examine()
    assert report.torch_npu == torch_npu.__version__
    assert list(report.operators) == list(OPERATORS) and all(report.operators.values())
    assert "cache_mode" in report.operators["npu_kv_rmsnorm_rope_cache"]


def test_no_device_is_told_plainly():
    report = doctor.examine()
    assert not report.ready and report.devices == ()
    assert report.problem == "no NPU is visible: check `npu-smi info` and ASCEND_RT_VISIBLE_DEVICES"
