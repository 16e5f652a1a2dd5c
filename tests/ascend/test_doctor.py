"""`npuq doctor` where there is no torch_npu, and with a driver that reports devices. Needs no torch_npu itself."""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from published import V3, V32, write_release

from npuq.cli.doctor import command
from npuq.errors import BackendError
from npuq.native.library import levels
from npuq.runtime.backend import make_ops
from npuq.runtime.diagnostics import doctor
from npuq.runtime.diagnostics.selftest.cases import CASES
from npuq.runtime.diagnostics.selftest.comparison import selftest
from npuq.runtime.ops.ascend import support as ascend_support


@dataclass
class FakeNpu:
    """What torch_npu.npu answers on a machine with these devices."""

    names: list[str]
    config: SimpleNamespace = field(default_factory=SimpleNamespace)

    def device_count(self) -> int:
        return len(self.names)

    def get_device_name(self, index: int) -> str:
        if self.names[index] == "held":
            raise RuntimeError("aclrtSetDevice failed,\nerror code 507033")
        return self.names[index]

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 60 << 30, 64 << 30


@pytest.fixture
def devices(monkeypatch):
    def plug(*names: str) -> None:
        fake = SimpleNamespace(npu=FakeNpu(list(names)))
        monkeypatch.setattr(ascend_support, "import_torch_npu", lambda: fake)
        monkeypatch.setattr(ascend_support, "check_installation", lambda: "2.13.0")
        monkeypatch.setattr("npuq.runtime.diagnostics.trial_import.trial_import", lambda *_: None)

    return plug


@pytest.fixture
def bare(monkeypatch):
    """A machine without torch_npu."""
    monkeypatch.setattr(ascend_support, "torch_npu_version", lambda: None)


def test_without_an_npu_it_says_so_and_exits_0(bare):
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    assert "No Ascend NPU can be used here" in result.output and "npuq[ascend]" in result.output


@pytest.mark.parametrize("built", [True, False])
def test_what_computes_on_the_cpu(built, bare, monkeypatch):
    if not built:
        monkeypatch.setattr("npuq.native.library.levels", tuple)
        monkeypatch.setattr("npuq.native.library.LIBRARY", Path("/nowhere"))
    said = "native kernels (" if built else "torch (native kernels were not built: install a C compiler"
    if built and not levels():
        pytest.skip("no native kernels here")
    text = CliRunner().invoke(command, [])
    assert f"cpu        {said}" in text.output and text.exit_code == 0
    assert json.loads(CliRunner().invoke(command, ["--json"]).stdout)["kernels"].startswith(said)


def test_json_is_one_document(bare):
    result = CliRunner().invoke(command, ["--json"])
    report = json.loads(result.stdout)
    assert report["ready"] is False and report["torch"] == torch.__version__ and report["devices"] == []


def test_a_machine_with_an_a2_is_ready(devices):
    devices("Ascend910B2", "Ascend910B2")
    report = doctor.examine()
    assert report.ready and report.problem is None
    assert [device.family for device in report.devices] == ["Atlas A2 (Ascend 910B)"] * 2
    assert report.devices[0].free_memory_bytes == 60 << 30
    # This torch has none of the operators: each is told as missing.
    assert set(report.operators) == set(ascend_support.OPERATORS)


def test_chips_that_cannot_and_devices_that_do_not_answer_are_told(devices):
    devices("Ascend310P3", "held")
    report = doctor.examine()
    assert not report.ready
    assert "int4 grouped matmul" in report.devices[0].problem
    assert report.devices[1].problem == "aclrtSetDevice failed, error code 507033"
    assert report.problem == report.devices[0].problem


def test_a_driver_that_does_not_answer_is_told(devices, monkeypatch):
    def refuse(self):
        raise RuntimeError("aclrtGetDeviceCount failed,\nerror code 507899")

    devices("Ascend910B2")
    monkeypatch.setattr(FakeNpu, "device_count", refuse)
    report = doctor.examine()
    assert not report.ready and report.devices == () and doctor.npu_memories() == []
    assert report.problem == "torch_npu cannot count the NPUs: aclrtGetDeviceCount failed, error code 507899"


def test_no_device_is_told(devices):
    devices()
    assert "npu-smi" in doctor.examine().problem


def test_the_shipped_model_fits(bare, example_fp8):
    result = CliRunner().invoke(command, [str(example_fp8)])
    assert result.exit_code == 0 and "would run on an NPU" in result.output


def test_sparse_attention_fits(bare, tmp_path):
    write_release(tmp_path / "v32", V32 | {"num_hidden_layers": 4, "index_topk": 4096})
    result = CliRunner().invoke(command, [str(tmp_path / "v32")])
    assert result.exit_code == 0 and "would run on an NPU" in result.output


def test_a_model_too_large_for_one_npu_is_told_what_holds_it(bare, devices, tmp_path):
    """The memory of the machine's NPUs decides; without any, NPUs of 64 GB."""
    source = tmp_path / "v3"
    write_release(source, V3 | {"num_hidden_layers": 14, "n_routed_experts": 64})
    result = CliRunner().invoke(command, [str(source)])
    assert result.exit_code == 0
    assert "would run on 2 NPUs of 64 GB: torchrun --nproc-per-node 2" in result.output
    devices(*["Ascend910B2"] * 2)
    fit = doctor.examine(source).model
    assert (fit.runs, fit.devices, fit.layout, fit.device_bytes) == (True, 2, "ep=2,tp=2", 64 << 30)
    devices("Ascend910B2")
    result = CliRunner().invoke(command, [str(source), "--json"])
    model = json.loads(result.stdout)["model"]
    assert result.exit_code == 1 and not model["runs"] and model["layout"] is None
    (problem,) = model["problems"]
    assert "the model needs" in problem and "2 such devices hold it" in problem
    assert "61.8 GB of 68.7 GB are usable" in problem


@pytest.mark.parametrize(
    "change,said",
    [
        ({"num_attention_heads": 256}, "256 attention heads"),
        ({"norm_topk_prob": False}, "no router that scores by sigmoid"),
        ({"kv_lora_rank": 256}, "kv_lora_rank 256"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": "deepseek_v32", "index_head_dim": 64}, "index_head_dim 64 (must be 128)"),
        ({"model_type": "deepseek_v32", "index_n_heads": 65}, "index_n_heads 65 (at most 64)"),
        ({"model_type": "deepseek_v32", "index_topk": 2500}, "index_topk 2500 (must be at most 2048, or one of 3072"),
        ({"model_type": "deepseek_v32", "kv_lora_rank": 256}, "kv_lora_rank 256"),
    ],
)
def test_a_model_that_does_not_fit_is_told_why_and_exits_1(bare, example_fp8, tmp_path, change, said):
    shutil.copytree(example_fp8, tmp_path, dirs_exist_ok=True)
    config = json.loads((example_fp8 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    result = CliRunner().invoke(command, [str(tmp_path), "--json"])
    fit = json.loads(result.stdout)["model"]
    assert result.exit_code == 1 and not fit["runs"]
    assert any(said in problem for problem in fit["problems"])


def test_a_directory_that_is_no_model_is_told(bare, tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1 and "cannot run on an NPU" in result.output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selftest_of_the_cpu_set_passes(dtype):
    results = list(selftest(make_ops("cpu", dtype)))
    assert [result for result in results if not result.passed] == []
    assert len(results) == len(CASES)


def test_selftest_reports_and_fails_on_a_wrong_operator(bare, monkeypatch):
    cpu = type(make_ops("cpu").norms)
    right = cpu.swiglu
    monkeypatch.setattr(cpu, "swiglu", lambda self, x: right(self, x) * 1.01)
    result = CliRunner().invoke(command, ["--selftest", "--json"])
    operators = {entry["operator"]: entry["passed"] for entry in json.loads(result.stdout)["selftest"]["operators"]}
    assert result.exit_code == 1
    assert operators["swiglu"] is False and operators["linear W8A8"] is True


def test_selftest_in_words(bare):
    result = CliRunner().invoke(command, ["--selftest"])
    assert result.exit_code == 0
    assert f"{len(CASES)} of {len(CASES)} agree" in result.output


def test_versions_are_read_from_the_files_that_cann_leaves(tmp_path):
    path = tmp_path / "version.cfg"
    for text, version in [
        ("# version: 1.0\nruntime_running_version=[8.5.0.T63:8.5.0]\n", "8.5.0.T63"),
        ("Version=25.0.rc1.1\nascendhal_version=7.35.23\n", "25.0.rc1.1"),
        ("nothing\n", "unknown"),
    ]:
        path.write_text(text)
        assert doctor._first_version((str(tmp_path / "absent"), str(path))) == version
    assert doctor._first_version((str(Path(tmp_path / "absent")),)) is None


def test_cann_is_where_its_script_says_before_the_default_folders(tmp_path):
    home = tmp_path / "cann-9.1.0"
    info = home / f"{platform.machine()}-linux" / "ascend_toolkit_install.info"
    info.parent.mkdir(parents=True)
    # As CANN 8.5 writes it.
    info.write_text("package_name=Ascend-cann-toolkit\nversion=9.1.0\ninnerversion=V100R001C25SPC001B212\n")
    files = doctor.cann_version_files({"ASCEND_HOME_PATH": str(home)})
    assert doctor._first_version(files) == "9.1.0"
    folders = list(dict.fromkeys(file.split("/Ascend/")[1].split("/")[0] for file in files if "/Ascend/" in file))
    assert folders == ["cann", "ascend-toolkit", "latest"]
    assert doctor.cann_version_files({})[0].startswith("/usr/local/Ascend/cann/")
    assert doctor._first_version(doctor.cann_version_files({"ASCEND_HOME_PATH": "/" + "long" * 100})) is None


def test_a_device_that_is_no_npu_is_refused(monkeypatch):
    from npuq.runtime.ops.ascend import operators as ascend

    monkeypatch.setattr(ascend, "import_torch_npu", lambda: SimpleNamespace())
    with pytest.raises(BackendError, match="cpu is not an NPU"):
        ascend.AscendOps(device="cpu")
    with pytest.raises(BackendError, match="device 'gpu:x' is none"):
        ascend.AscendOps(device="gpu:x")
    with pytest.raises(BackendError, match="'nz' nor 'nd'"):
        ascend.AscendOps(kv_layout="NZ")
    with pytest.raises(BackendError, match="bfloat16 or float16, not float32"):
        ascend.AscendOps(dtype=torch.float32)


def test_nd_pages_are_for_the_ascend_backend_only():
    with pytest.raises(BackendError, match="'nz' layout, not in 'nd'"):
        make_ops("cpu", kv_layout="nd")


def test_a_machine_without_torch_npu_runs_on_the_cpu(bare):
    assert make_ops("auto").name == "cpu"


def test_auto_takes_the_npu_where_one_is(devices, monkeypatch):
    devices("Ascend910B2")
    monkeypatch.setattr(ascend_support, "torch_npu_version", lambda: "2.13.0")
    monkeypatch.setattr(ascend_support, "has_npu_driver", lambda: True)
    assert ascend_support.npu_count() == 1
