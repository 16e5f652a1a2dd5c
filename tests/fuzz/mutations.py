"""Damage to an artifact, drawn at random: headers, tables, shapes, dtypes, values, numbers of config.json, names.

Half of it keeps the file valid, so that only what the loader knows of the model can find it. The manifest's hashes are
made right again afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "npuq/manifest.json"
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
FLOATS = [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45, 3e38, 1e-20, -3e38]
HOSTILE: list[Any] = [
    0, 1, -1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 1000, 1 << 24, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, 10**30,
    10**400, (1 << 32) + 1, (1 << 64) + 1, (1 << 64) + 8,
    -(1 << 31), 0.0, 0.5, -1.5, 1e-310, 1e299, 1e400, "", "x", "\x1b[2J", "NaN", "\ud800", "a" * 300, None,
    True, False, [], [1], [[[]]], {}, {"a": 1},
]  # fmt: skip


@dataclass
class Entry:
    """A tensor of a safetensors file."""

    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class TensorFile:
    """All of a safetensors file."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Entry]

    @classmethod
    def read(cls, path: Path) -> TensorFile:
        header, body = split(path.read_bytes())
        metadata = header.pop("__metadata__", {})
        tensors = {
            name: Entry(entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
            for name, entry in header.items()
        }
        return cls(path, metadata, tensors)

    def write(self) -> None:
        header: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        end = 0
        for name, entry in self.tensors.items():
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + len(entry.data)]}
            end += len(entry.data)
        self.path.write_bytes(joined(header, b"".join(entry.data for entry in self.tensors.values())))


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def mutate(directory: Path, rng: random.Random) -> str:
    """Damage an artifact in up to three places; what was done, empty for one that is left as it is."""
    done = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 3])):
        kinds = [kind for kind, weight in _KINDS.items() for _ in range(weight)]
        try:
            done.append(rng.choice(kinds)(directory, rng))
        except (ValueError, KeyError, TypeError, OverflowError, struct.error, UnicodeEncodeError):
            done.append("(too damaged already)")
    reseal(directory)
    return "; ".join(done)


# ---- tensors, in a file that stays valid -----------------------------------------------------------------------------


def _tables(directory: Path, rng: random.Random) -> str:
    return _tensor(rng.choice(_own_files(directory) or _shards(directory)), rng)


def _shard(directory: Path, rng: random.Random) -> str:
    return _tensor(rng.choice(_shards(directory)), rng)


def _tensor(path: Path, rng: random.Random) -> str:
    file = TensorFile.read(path)
    name = rng.choice(list(file.tensors))
    changes = [_reshape, _reshape, _resize, _resize, _retype, _values, _values, _values]
    what = rng.choice([*(_on_entry(change) for change in changes), _rename, _drop, _add, _swap, _metadata])(
        file, name, rng
    )
    file.write()
    return f"{path.name}: {what}"


def _on_entry(change: Callable[[Entry, random.Random], str]) -> Callable[[TensorFile, str, random.Random], str]:
    return lambda file, name, rng: f"{name}: {change(file.tensors[name], rng)}"


def _reshape(entry: Entry, rng: random.Random) -> str:
    """Another shape of as many values."""
    numel, shape = math.prod(entry.shape), entry.shape
    choices = [[numel], [*shape, 1], [1, *shape], shape[::-1], [numel, 1], [1, numel], [*shape, 1, 1, 1]]
    choices += [[numel // part, part] for part in (2, 4, 16) if numel % part == 0]
    if len(shape) == 2:
        choices += [[shape[0] // 2, shape[1] * 2]] if shape[0] % 2 == 0 else []
        choices += [[shape[0] * 2, shape[1] // 2]] if shape[1] % 2 == 0 else []
    entry.shape = rng.choice(choices)
    return f"{shape} as {entry.shape}"


def _resize(entry: Entry, rng: random.Random) -> str:
    """More or fewer values along a dimension."""
    if not entry.shape:
        return "scalar"
    dimension, before = rng.randrange(len(entry.shape)), list(entry.shape)
    size = entry.shape[dimension]
    entry.shape[dimension] = rng.choice([0, 1, max(0, size - 1), size + 1, size + 15, 2 * size, size // 2])
    _fit(entry)
    return f"{before} became {entry.shape}"


def _retype(entry: Entry, rng: random.Random) -> str:
    before, size = entry.dtype, ITEM_BYTES[entry.dtype]
    same = [dtype for dtype, other in ITEM_BYTES.items() if other == size and dtype != before]
    entry.dtype = rng.choice([*same, *same, *same, *ITEM_BYTES, "F4", "f32"])
    _fit(entry)
    return f"{before} as {entry.dtype}"


def _fit(entry: Entry) -> None:
    """Cut or repeat the data so that shape and dtype have it."""
    nbytes = math.prod(entry.shape) * ITEM_BYTES.get(entry.dtype, 1)
    data = entry.data or b"\x3c"
    entry.data = (data * (nbytes // len(data) + 1))[:nbytes]


def _values(entry: Entry, rng: random.Random) -> str:
    """One value or all become hostile ones, or the bytes random ones."""
    if entry.dtype not in ("F32", "BF16", "F16") or rng.random() < 0.2:
        entry.data = rng.randbytes(len(entry.data))
        return "random bytes"
    value = rng.choice(FLOATS)
    item = {"F32": struct.pack("<f", value), "BF16": struct.pack("<f", value)[2:], "F16": _half(value)}[entry.dtype]
    count = len(entry.data) // len(item)
    if rng.random() < 0.5 or not count:
        entry.data = item * count
        return f"all {value}"
    at = rng.randrange(count) * len(item)
    entry.data = entry.data[:at] + item + entry.data[at + len(item) :]
    return f"one {value}"


def _half(value: float) -> bytes:
    return struct.pack("<e", max(-65504.0, min(65504.0, value)) if math.isfinite(value) else value)


def _rename(file: TensorFile, name: str, rng: random.Random) -> str:
    other = rng.choice([name + "x", name.upper(), "", "\x1b[31m", rng.choice(list(file.tensors))])
    file.tensors[other] = file.tensors.pop(name)
    return f"{name} is called {other!r}"


def _drop(file: TensorFile, name: str, rng: random.Random) -> str:
    del file.tensors[name]
    return f"no {name}"


def _add(file: TensorFile, name: str, rng: random.Random) -> str:
    file.tensors[name + ".copy"] = file.tensors[name]
    return f"{name} twice"


def _swap(file: TensorFile, name: str, rng: random.Random) -> str:
    other = rng.choice(list(file.tensors))
    file.tensors[name], file.tensors[other] = file.tensors[other], file.tensors[name]
    return f"{name} and {other} changed places"


def _metadata(file: TensorFile, name: str, rng: random.Random) -> str:
    key = rng.choice([*file.metadata, "format"])
    file.metadata[key] = str(rng.choice([*HOSTILE[:-6], *FLOATS]))
    return f"metadata {key}: {file.metadata[key]!r}"


# ---- headers and bytes -----------------------------------------------------------------------------------------------


def _header(directory: Path, rng: random.Random) -> str:
    path = rng.choice([*_shards(directory), *_own_files(directory)])
    header, body = split(path.read_bytes())
    what = _mutate_json(header, rng)
    path.write_bytes(joined(header, body))
    return f"{path.name}: header {what}"


def _bytes(directory: Path, rng: random.Random) -> str:
    path = rng.choice([*_shards(directory), *_own_files(directory)])
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    kind = rng.choice(["flip", "flip", "length", "cut", "longer", "empty"])
    if kind == "flip":
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    elif kind == "length":
        length = rng.choice([0, 1, length - 8, length + 8, 1 << 26, 1 << 63, len(content) - 8])
        content[:8] = struct.pack("<Q", length)
    elif kind == "cut":
        del content[rng.randrange(len(content)) :]
    elif kind == "longer":
        content += bytes(rng.randint(1, 100))
    else:
        content.clear()
    path.write_bytes(content)
    return f"{path.name}: {kind}"


# ---- JSON ------------------------------------------------------------------------------------------------------------


def _config(directory: Path, rng: random.Random) -> str:
    return _json(directory, rng, ["config.json"])


def _description(directory: Path, rng: random.Random) -> str:
    path = directory / "quant_model_description.json"
    if not path.exists() or rng.random() < 0.3:
        return _json(directory, rng, ["quant_model_description.json"])
    content = json.loads(path.read_text())
    name = rng.choice([name for name in content if "." in name])
    content[name] = rng.choice(["W4A8_DYNAMIC", "W8A8_DYNAMIC", "W8A8", "FLOAT"])
    if rng.random() < 0.5:  # the whole linear
        prefix = name.rpartition(".")[0] + "."
        content |= {other: content[name] for other in content if other.startswith(prefix)}
    path.write_text(json.dumps(content))
    return f"{name} described as {content[name]}"


def _others(directory: Path, rng: random.Random) -> str:
    return _json(directory, rng, [MANIFEST, "model.safetensors.index.json", "generation_config.json"])


def _json(directory: Path, rng: random.Random, names: list[str]) -> str:
    paths = [directory / name for name in names if (directory / name).exists()]
    if not paths:
        return _json(directory, rng, ["config.json"])
    path = rng.choice(paths)
    content = json.loads(path.read_text())
    what = _mutate_json(content, rng)
    path.write_text(json.dumps(content))
    return f"{path.name}: {what}"


def _mutate_json(value: Any, rng: random.Random) -> str:
    """Change one thing somewhere in an object."""
    place, keys = value, []
    while True:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        keys.append(key)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            place = inner
            continue
        break
    where = ".".join(map(str, keys))
    if rng.random() < 0.1:
        del place[key]
        return f"no {where}"
    choices = list(HOSTILE)
    if isinstance(inner, int | float) and not isinstance(inner, bool):
        near = [inner + 1, inner - 1, inner * 2, inner // 2, -inner, float(inner)]
        choices = near * 4 + choices
    place[key] = rng.choice(choices)
    return f"{where} = {str(place[key])[:40]!r}"


# ---- all together ----------------------------------------------------------------------------------------------------

_KINDS: dict[Callable[[Path, random.Random], str], int] = {
    _tables: 6,
    _shard: 7,
    _header: 3,
    _bytes: 2,
    _config: 6,
    _description: 2,
    _others: 2,
}


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def _own_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("npuq/*.safetensors"))


def reseal(directory: Path) -> None:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        for name, entry in manifest["files"].items():
            if (directory / name).is_file() and (directory / name).stat().st_size < 1 << 30:
                content = (directory / name).read_bytes()
                entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        path.write_text(json.dumps(manifest))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # it is what was damaged, or there is none
