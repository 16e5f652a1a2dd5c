"""Opened directories of safetensors files, sources and artifacts alike: every tensor's name, dtype, shape, file and
byte range is checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..deferred import torch
from ..dtypes import array_dtype
from ..errors import CheckpointError
from ..inputs.files import FileStamp, inside, is_inside
from ..inputs.json_text import read_object
from ..inputs.names import FileName
from ..models.config import model_code, text_config
from ..models.config_reader import shown
from ..models.families import FAMILIES, is_known
from ..models.recognition import read_as
from ..native.mapped import MappedFiles
from .safetensors import TensorInfo
from .storage import LocalFiles, Storage, Window

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

# In npuq's own folder (artifact.py), until a conversion is finished.
JOURNAL_NAME = "npuq/progress.jsonl"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# ASCII digits alone: layer numbers have no others.
_DIGITS = re.compile(r"([0-9]+)")


class Checkpoint:
    """An opened directory of safetensors files. Reading is thread-safe; close it, or use it as a context manager.

    tensors: in natural name order (layer 2 before layer 10), in any order of shards. files: the maps behind views; call
    `files.check()` before results computed with views are used. stamps: one a shard, taken when its header was read;
    none on a hub, where a commit pins the files. stated: config.json as it is stored, where `read_as` replaced
    `config`. window: set for a remote checkpoint, whose tensors can be read after their announcement and until their
    release. weight_map: the shard of each tensor that the index lists; None without an index.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        shards: Sequence[Path],
        storage: Storage,
        window: Window | None = None,
        stamps: Sequence[FileStamp] = (),
        weight_map: Mapping[str, FileName] | None = None,
    ):
        self.directory = directory
        self.config = config
        self.stated: Mapping[str, Any] | None = None
        self.tensors = tensors
        self.shards = tuple(shards)
        self.stamps = tuple(stamps)
        self.window = window
        self.weight_map = weight_map
        self.files = MappedFiles()
        self._storage = storage

    def read_as(self, family: str | None) -> None:
        """Read config.json as that of a family, where it states a model_type that npuq does not know; None leaves it
        as it is. To be called before anything else reads `config`.

        Raises CheckpointError for an unknown family, and for a config that is of another known one.
        """
        read = config_as(self.directory, self.config, family)
        if read is not self.config:
            self.stated, self.config = self.config, read

    @cached_property
    def model_code(self) -> str:
        """The safetensors code of the model's dtype in config.json. CheckpointError for one that is not float."""
        return model_code(self.text_config)

    @cached_property
    def text_config(self) -> Mapping[str, Any]:
        """The text model's keys of config.json. CheckpointError where its family nests them, and they are missing."""
        return text_config(self.config)

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Open a checkpoint or artifact directory and check its structure.

        Raises CheckpointError, naming the file or tensor, for: no directory, no or malformed config.json, pickle
        weights, an index that names a shard outside the directory, a missing shard or a tensor that its shard does
        not have, and everything `read_header` refuses (truncated or malformed shards).
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        if (directory / JOURNAL_NAME).exists() and not (directory / CONFIG_NAME).exists():
            raise CheckpointError(
                f"{directory}: an unfinished conversion; run the same `npuq convert` again, it continues"
            )
        config = read_config(directory)
        weight_map = read_weight_map(directory)
        shards: list[str] = [] if weight_map is None else sorted(set(weight_map.values()))
        if weight_map is None:
            shards.append(single_file(directory, [path.name for path in directory.iterdir()]))
        paths = {shard: inside(directory, shard) for shard in shards}
        storage = LocalFiles()
        headers = {shard: storage.read_header(path) for shard, path in paths.items()}
        tensors = collect_tensors(directory, weight_map, headers)
        stamps = [storage.stamps[path] for path in paths.values()]
        return cls(directory, config, tensors, list(paths.values()), storage, stamps=stamps, weight_map=weight_map)

    def info(self, name: str) -> TensorInfo:
        """The tensor's dtype, shape, file and byte range. CheckpointError when the checkpoint has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.directory}: no tensor named {name!r}") from None

    def read(self, name: str) -> Tensor:
        """Read the whole tensor into new memory."""
        return _tensor(self.read_array(name), self.tensors[name])

    def read_array(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read rows [start, stop) of the first dimension, by default the whole tensor, into new memory: an array with
        its bits (`dtypes.array_dtype`)."""
        info = self.info(name)
        if not info.shape:
            return self._read_range(info, info.start, info.end).view(array_dtype(info.dtype)).reshape(())
        stop = info.shape[0] if stop is None else stop
        if not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(f"{info.file}: tensor {name!r} {list(info.shape)} has no rows {start} to {stop}")
        row_bytes = prod(info.shape[1:]) * info.item_bytes
        data = self._read_range(info, info.start + start * row_bytes, info.start + stop * row_bytes)
        return data.view(array_dtype(info.dtype)).reshape(stop - start, *info.shape[1:])

    def read_bytes(self, name: str, first: int, memory: memoryview) -> None:
        """Fill `memory` with the tensor's bytes from byte `first` on. No tensor is made."""
        info = self.info(name)
        if not 0 <= first <= first + len(memory) <= info.nbytes:
            raise CheckpointError(f"{info.file}: tensor {name!r} has no bytes {first} to {first + len(memory)}")
        self._storage.fill(info, info.start + first, memory)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of the first dimension into new memory."""
        info = self.info(name)
        if not info.shape:
            raise CheckpointError(f"{info.file}: tensor {name!r} [] has no rows {start} to {stop}")
        return _tensor(self.read_array(name, start, stop), info)

    def view(self, name: str) -> Tensor:
        """The whole tensor over a memory map of its file, which reads a page when it is touched. Do not write to it.

        A tensor that cannot be mapped is copied.
        """
        found = self._storage.view(self.info(name), self.files)
        return self.read(name) if found is None else found

    def close(self) -> None:
        """Close the files. Views stay valid for as long as a tensor uses them."""
        self._storage.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_range(self, info: TensorInfo, start: int, end: int) -> NDArray[np.uint8]:
        data = np.empty(end - start, np.uint8)
        self._storage.fill(info, start, data.data)
        return data


def _tensor(array: NDArray[Any], info: TensorInfo) -> Tensor:
    return torch.from_numpy(array).view(info.torch_dtype)


def natural_key(name: str) -> list[str | tuple[int, str]]:
    """Sort key that puts `layers.2.` before `layers.10.`."""
    # Splitting by digits alternates text and number at fixed positions, so that keys always compare. A number becomes
    # its length and its digits, because int() refuses thousands of digits.
    parts: list[str | tuple[int, str]] = list(_DIGITS.split(name))
    parts[1::2] = map(_number, parts[1::2])
    return parts


def _number(digits: str | tuple[int, str]) -> tuple[int, str]:
    significant = str(digits).lstrip("0")
    return len(significant), significant


def read_config(directory: Path) -> dict[str, Any]:
    """Read a directory's config.json. CheckpointError when it is missing, no JSON object, or a link out of it."""
    return read_object(inside(directory, CONFIG_NAME), CheckpointError)


def config_as(directory: Path, config: dict[str, Any], family: str | None) -> dict[str, Any]:
    """A directory's config.json, as that of a family where its model_type is unknown; itself where `family` is None or
    what it states.

    Raises CheckpointError for an unknown family, and for a config that is of another known one.
    """
    if family is None:
        return config
    if not is_known(family):
        raise CheckpointError(
            f"{directory}: cannot read it as {shown(family)}; npuq knows {', '.join(sorted(FAMILIES))}"
        )
    stated = config.get("model_type")
    if stated == family:
        return config
    if is_known(stated):
        raise CheckpointError(
            f"{directory / CONFIG_NAME}: model_type is {stated}, which npuq reads as it is: leave --as {family} out"
        )
    return read_as(config, FAMILIES[family])


def collect_tensors(
    directory: Path, weight_map: Mapping[str, str] | None, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """The tensors of all shards in natural name order, also tensors that the index does not list.

    Every other loader reads shards whole, so that tensors outside the index count, and the last shard wins where
    several hold a tensor. Raises CheckpointError when the index names a missing tensor, or another shard than the last.
    """
    listed = {} if weight_map is None else weight_map
    tensors = {name: _indexed(directory, headers[shard], name, shard) for name, shard in listed.items()}
    for shard, header in sorted(headers.items()):
        for name, info in header.items():
            if shard > listed.get(name, shard):
                raise CheckpointError(
                    f"{index_path(directory)}: tensor {name!r} is in {listed[name]}, which the index names, and in "
                    f"{shard}, which other loaders would take; remove the wrong one"
                )
            if name not in listed:
                tensors[name] = info
    return {name: tensors[name] for name in sorted(tensors, key=natural_key)}


def index_path(directory: Path) -> Path | None:
    """The index's path: Hugging Face's name, or the only one of another (ModelSlim's `quant_model_weights…`); None
    without. CheckpointError where several could be meant.
    """
    if is_inside(directory, INDEX_NAME):
        return directory / INDEX_NAME
    others = sorted(directory.glob("*.safetensors.index.json"))
    if len(others) > 1:
        names = " and ".join(path.name for path in others[:2])
        raise CheckpointError(f"{directory}: {names}: which index is meant? Keep the one that names the weights")
    return others[0] if others else None


def read_weight_map(directory: Path) -> Mapping[str, FileName] | None:
    """Read the shard of each tensor from the index; None without an index. CheckpointError when it is malformed."""
    path = index_path(directory)
    if path is None:
        return None
    weight_map = read_object(inside(directory, path.name), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must map tensor names to shard files")
    if not weight_map:
        raise CheckpointError(f"{path}: weight_map is empty")
    where = f"{path}: weight_map"
    files = {shard: FileName.parse(shard, where, CheckpointError) for shard in set(weight_map.values())}
    return {name: files[shard] for name, shard in weight_map.items()}


def single_file(directory: Path, names: Iterable[str]) -> str:
    """The weights' file of a checkpoint without index, chosen from `names`. CheckpointError when none fits."""
    names = sorted(names)
    files = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in files:
        return SINGLE_NAME
    if len(files) == 1:
        return files[0]
    if files:
        raise CheckpointError(f"{directory}: {len(files)} safetensors files and no {INDEX_NAME}; fetch the index too")
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{directory / pickles[0]}: pickle weights are not read, they can run code; convert them to safetensors"
        )
    raise CheckpointError(f"{directory}: no safetensors files")


def _indexed(directory: Path, header: Mapping[str, TensorInfo], name: str, shard: str) -> TensorInfo:
    try:
        return header[name]
    except KeyError:
        raise CheckpointError(
            f"{index_path(directory)}: tensor {name!r} is not in {shard}; fetch the index and that shard again"
        ) from None
