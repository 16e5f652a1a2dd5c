"""Requirements of the Ascend backend: a torch_npu that fits torch, CANN, and a chip with the right operators.

Failures are one line (`BackendError`), where torch_npu itself would end in a traceback or abort the process.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

from ....errors import BackendError

INSTALL_HINT = "install torch's CPU build, then 'npuq[ascend]' with the torch_npu of its release (docs/ascend.md)"
# A release of torch_npu needs the same release of torch; `.postN` counts torch_npu's own corrections of it.
_CPU_BUILD = "pip install torch=={release}+cpu --index-url https://download.pytorch.org/whl/cpu"
_DEVICES = Path("/dev")

OPERATORS = (
    "npu_add_rms_norm",
    "npu_add_rms_norm_dynamic_quant",
    "npu_apply_rotary_pos_emb",
    "npu_attention_update",
    "npu_dequant_swiglu_quant",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_fused_infer_attention_score",
    "npu_fused_infer_attention_score_v2",
    "npu_grouped_matmul",
    "npu_grouped_matmul_swiglu_quant_v2",
    "npu_interleave_rope",
    "npu_kv_rmsnorm_rope_cache",
    "npu_lightning_indexer",
    "npu_mla_prolog_v3",
    "npu_moe_distribute_combine_v2",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_finalize_routing",
    "npu_moe_gating_top_k",
    "npu_moe_gating_top_k_softmax_v2",
    "npu_moe_init_routing_v2",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_rms_norm",
    "npu_rotary_mul",
    "npu_scatter_pa_kv_cache",
    "npu_sparse_flash_attention",
    "npu_swiglu",
    "npu_transpose_batchmatmul",
)
"""Every operator of torch_npu that the backend calls."""


@dataclass(frozen=True)
class Soc:
    """A family of chips, recognised by the driver's name for it, and the operators that it has.

    int4_experts: int8 × int4 grouped matmul. nz_mla: absorbed attention on a FRACTAL_NZ cache. mla: `interleave_rope`,
    `kv_rmsnorm_rope_cache` and attention with separate rope tensors. Sources: product tables of the operator
    documentation, and CANN's operator registrations.
    """

    family: str
    pattern: str
    int4_experts: bool
    nz_mla: bool
    mla: bool


SOCS = (
    Soc("Atlas A3 (Ascend 910C)", r"Ascend910_93", int4_experts=True, nz_mla=True, mla=True),
    Soc("Ascend 950 (A5)", r"Ascend(910_95|950)", int4_experts=False, nz_mla=False, mla=False),
    Soc("Atlas A2 (Ascend 910B)", r"Ascend910B", int4_experts=True, nz_mla=True, mla=True),
    Soc("Atlas 310P", r"Ascend310P", int4_experts=False, nz_mla=False, mla=False),
)


def soc_of(name: str) -> Soc:
    """Family of a device name such as "Ascend910B2". Raises BackendError for an unknown name."""
    for soc in SOCS:
        if re.match(soc.pattern, name, re.IGNORECASE):
            return soc
    raise BackendError(f"device {name!r} is not known; npuq runs on {supported_families()}")


def supported_families() -> str:
    """Names of the families that run every operator of the backend, for messages."""
    return " and ".join(soc.family for soc in SOCS if soc.mla and soc.int4_experts)


def require_soc(name: str) -> Soc:
    """Family of a device name. Raises BackendError for an unknown chip, and for one that lacks a required operator."""
    soc = soc_of(name)
    if not (soc.mla and soc.nz_mla and soc.int4_experts):
        raise BackendError(
            f"{soc.family} ({name}) has no int4 grouped matmul and no MLA attention on a FRACTAL_NZ cache; "
            f"npuq runs on {supported_families()}"
        )
    return soc


def release(version: str) -> str:
    """Release number, which torch and torch_npu share: "2.13.0+cpu" and "2.13.0.post1" → "2.13.0"."""
    match = re.match(r"\d+\.\d+\.\d+", version)
    return match.group() if match else version


def torch_npu_version() -> str | None:
    """Version of the installed torch_npu, read without importing it."""
    try:
        return metadata.version("torch_npu")
    except metadata.PackageNotFoundError:
        return None


def check_versions(torch_version: str, npu_version: str) -> None:
    """Raise BackendError unless torch_npu was built for this torch, with the same release number."""
    needed = release(npu_version)
    if release(torch_version) != needed:
        raise BackendError(
            f"torch_npu {npu_version} is built for torch {needed}, but torch {torch_version} is installed: "
            f"{_CPU_BUILD.format(release=needed)}, or pip install 'torch_npu=={release(torch_version)}.*'"
        )


def check_build(torch_version: str, accelerator: str | None) -> None:
    """Raise BackendError for a torch that is built for another accelerator ("CUDA 13.0"): torch_npu aborts beside it.

    Both register the same keys of the allocator's configuration, and the second registration ends the process
    ("Duplicated key 'pinned_reserve_segment_size_mb'").
    """
    if accelerator is not None:
        raise BackendError(
            f"torch {torch_version} is built for {accelerator}, and torch_npu ends every process that loads both; "
            f"install torch's CPU build: {_CPU_BUILD.format(release=release(torch_version))}"
        )


def accelerator_of_torch() -> str | None:
    """Accelerator that the installed torch is built for, such as "CUDA 13.0"; None for a CPU build."""
    import torch

    for name, attribute in (("CUDA", "cuda"), ("ROCm", "hip"), ("XPU", "xpu")):
        version = getattr(torch.version, attribute, None)
        if version is not None:
            return f"{name} {version}"
    return None


def check_installation() -> str:
    """Version of the installed torch_npu, which is not imported.

    Raises BackendError if it is missing, or if it does not fit the installed torch.
    """
    import torch

    version = torch_npu_version()
    if version is None or importlib.util.find_spec("torch_npu") is None:
        raise BackendError(f"the ascend backend needs torch_npu: {INSTALL_HINT}, on a machine with CANN")
    check_versions(torch.__version__, version)
    check_build(torch.__version__, accelerator_of_torch())
    return version


def import_torch_npu() -> ModuleType:
    """Import torch_npu. Raises BackendError if it is missing, does not fit torch, finds no CANN, or raises anything."""
    version = check_installation()
    try:
        return importlib.import_module("torch_npu")
    except ImportError as error:
        raise BackendError(explain_import_error(version, error)) from error
    except Exception as error:  # a RuntimeError of CANN, an OSError of a library that it opens itself, or else
        line = str(error).strip().splitlines()
        raise BackendError(f"torch_npu {version} does not start: {line[0] if line else repr(error)}") from error


def explain_import_error(version: str, error: ImportError) -> str:
    """Message for a torch_npu that does not load: nearly always CANN is missing or not on the library path."""
    library = re.search(r"lib\w+\.so[\w.]*", str(error))
    if library is None:
        return f"torch_npu {version} does not import: {error}"
    return (
        f"torch_npu {version} does not load: {library.group()} is not found; install CANN and source its set_env.sh "
        "(/usr/local/Ascend/cann/set_env.sh, before CANN 8.5 /usr/local/Ascend/ascend-toolkit/set_env.sh)"
    )


def has_npu_driver() -> bool:
    """True if the driver's device files are there. Each process and container that uses an NPU needs them."""
    return any(_DEVICES.glob("*davinci*"))


def npu_count() -> int:
    """Number of NPUs of this machine; 0 without a driver, and where torch_npu is not installed or cannot start.

    Without a driver torch_npu is not imported: a broken one must not end a process that computes on the CPU.
    """
    if not has_npu_driver() or torch_npu_version() is None:
        return 0
    try:
        return int(import_torch_npu().npu.device_count())
    except (BackendError, RuntimeError):
        return 0
