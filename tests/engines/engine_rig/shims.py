"""What stands in while an engine's code runs here. Each entry has nothing to do with how weights are found or loaded.

The engines' own classes do everything that is tested: detection, scheme choice, parameters, name mapping, sharding, and
what is done to weights after loading.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch._inductor.compile_fx
import torch_npu
import transformers  # noqa: F401  (looks for optional packages: before the shims are there)
from torch import Tensor
from torch.overrides import TorchFunctionMode

# module → why a hollow one will do. Only these are replaced; any other missing module is an error.
MODULES: dict[str, dict[str, str]] = {
    "vllm-ascend": {
        "fla_npu": "kernels of linear attention",
        "openai_harmony": "the chat format of GPT-OSS",
        "vllm.v1.structured_output": "grammars for structured output",
    },
    "sglang": {
        "IPython": "display in notebooks",
        "acl": "CANN's Python interface: memory queries of a real device",
        "sgl_kernel_npu": "kernels of the forward pass; none runs here but the emulated ones of torch_npu",
        "torchair": "graph compilation of the forward pass",
        "torchvision": "image processors",
        "triton": "GPU kernels",
        "tvm_ffi": "loading of CUDA kernels",
    },
}


class _Hollow(type):
    """A class that has every attribute, and as a decorator changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else type.__call__(cls)

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__


class Anything(metaclass=_Hollow):
    """What a hollow module consists of."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else self


class _Module(types.ModuleType):
    __path__ = ()
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Mapping[str, str]):
        self.names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if any(name == hollow or name.startswith(f"{hollow}.") for hollow in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class OnCpu(TorchFunctionMode):
    """Where an engine asks for the device "npu", tensors are made on the CPU, where the rig's operators compute."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _cpu(value) for key, value in (kwargs or {}).items()}
        return func(*map(_cpu, args), **kwargs)


def _cpu(value: Any) -> Any:
    # vLLM's platform has no name of a device here.
    named = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] in ("npu", "")
    return torch.device("cpu") if named else value


def install(engine: str) -> None:
    """Put the shims of `engine` in place, for the rest of the process."""
    sys.meta_path.insert(0, _Finder(MODULES[engine]))
    if engine == "vllm-ascend":
        # Patches of torch's compiler, made for the torch release that vLLM pins.
        sys.modules["vllm.env_override"] = types.ModuleType("vllm.env_override")
    for module in (torch.npu, torch_npu.npu):  # type: ignore[attr-defined]
        module.is_available = lambda: True
        module.device_count = lambda: 16
        module.current_device = lambda: 0
    Tensor.npu = lambda self, *args, **kwargs: self  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)  # as the engines do while they build a bf16 model
    OnCpu().__enter__()


class Group:
    """A process group as the layers ask for it: its size and this rank's place. Ranks run one after another here."""

    def __init__(self, size: int, rank: int):
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, rank, rank, rank
        self.ranks = list(range(size))
        self.first_rank, self.last_rank = 0, size - 1
        self.is_first_rank, self.is_last_rank = rank == 0, rank == size - 1
        self.device_group = types.SimpleNamespace(size=lambda: size, rank=lambda: rank)
        self.cpu_group = self.device_group
        self.unique_name = "group"
