"""Damage to the files that people can read, by their syntax: JSON, JSON lines, YAML, Jinja, headers; or as bytes, or as
what lies in a file's place: a FIFO, a device, a link out.

What is done to a file is drawn from a generator of random numbers, and said in a line.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import HOSTILE, joined, split

# As JSON or YAML that Python's own writer cannot be made to write.
RAW = [
    "NaN", "-Infinity", "1e999", "1" * 6000, "[" * 100_000, '{"a":' * 5000, '"\\ud800"', '"\\u0000\\u001b[2J"', "'",
    "\\",     "[" * 70 + "]" * 70, "-", "0x10", '"\x1b[31m"', "\x85", "2001-99-99",
    "*a", "&a [*a]", "!!python/object:os.system x",
    "{a: 1, a: 2}", "? [1]\n: 2",
    '{"a": 1, "a": 2}', "---", "\t", '"' + "x" * 100_000 + '"', "1" * 41, "\ufeff", "\u202e",
]  # fmt: skip
TEMPLATES = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x'|center(5000000000) }}",
    "{{ 'x' * 10000000000 }}", "{{ '%0999999999d' % 1 }}", "{{ lipsum(n=10000000) }}", "{{ [1] * 1000000000 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('\x1b[2J') }}",
    "{{ messages[99] }}", "{% include 'x' %}", "{{ 10 ** 10 ** 10 }}", "{%", "\ud800".encode("utf-8", "surrogatepass"),
    "{{ messages|tojson }}" * 1000, "\x1b]0;title\x07", "{{ 1 / 0 }}", "{% set x = namespace(a='a') %}"
    "{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}{{ x.a }}",
]  # fmt: skip
ESCAPES = [b"\x1b[2J", b"\xc2\x9b2J", b"\r", b"\0", b"\xe2\x80\xae", b"\xff", b"\xed\xa0\x80"]
SAFETENSORS, JSON, LINES, YAML, JINJA, TEXT = "safetensors", "json", "jsonl", "yaml", "jinja", "text"


def damage(directory: Path, rng: random.Random) -> str:
    """Damage one file of a directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size < 1 << 30]
    path = rng.choice(files)
    name = path.relative_to(directory)
    draw = rng.random()
    if draw < 0.1:
        return f"{name}: {_replace(path, rng)}"
    if draw < 0.3:
        return f"{name}: {_bytes(path, rng)}"
    try:
        return f"{name}: {_BY_SYNTAX[_syntax(path)](path, rng)}"
    except (ValueError, KeyError, IndexError, TypeError, OSError, RecursionError, struct.error):
        return f"{name}: too damaged already"


def _syntax(path: Path) -> str:
    found = path.suffix.removeprefix(".")
    return {"yaml": YAML, "yml": YAML, "md": YAML}.get(found, found if found in _BY_SYNTAX else TEXT)


# ---- what lies in its place ------------------------------------------------------------------------------------------


def _replace(path: Path, rng: random.Random) -> str:
    kind = rng.choice(["gone", "fifo", "zero", "out", "nowhere", "itself", "directory", "empty", "huge"])
    content = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "out":
        outside = path.parents[2] / "outside"
        outside.write_bytes(content)
        path.symlink_to(outside)
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "itself":
        path.symlink_to(path.name)
    elif kind == "directory":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 40)  # of holes
    return f"is {kind}"


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _bytes(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    if not content:
        return "empty already"
    at, length = rng.randrange(len(content)), rng.randint(1, 40)
    kind = rng.choice(["flip", "cut", "drop", "insert", "repeat", "escape", "zero"])
    if kind == "flip":
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "drop":
        del content[at : at + length]
    elif kind == "insert":
        content[at:at] = rng.randbytes(length)
    elif kind == "repeat":
        content[at:at] = content[at : at + length] * rng.choice([1, 2, 2000])
    elif kind == "escape":
        content[at:at] = rng.choice(ESCAPES)
    else:
        content[at : at + length] = bytes(len(content[at : at + length]))
    path.write_bytes(content)
    return f"{kind} at {at}"


# ---- syntax ----------------------------------------------------------------------------------------------------------


def _json(path: Path, rng: random.Random) -> str:
    text, what = change(json.loads(path.read_text()), rng)
    path.write_text(text, errors="surrogatepass")
    return what


def _lines(path: Path, rng: random.Random) -> str:
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(["change", "change", "change", "swap", "twice", "raw"])
    what = kind
    if kind == "change":
        lines[at], what = change(json.loads(lines[at]), rng)
    elif kind == "swap":
        other = rng.randrange(len(lines))
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    else:
        lines[at] = rng.choice(RAW)
    path.write_text("\n".join(lines) + rng.choice(["\n", ""]), errors="surrogatepass")
    return f"line {at}: {what}"


def _yaml(path: Path, rng: random.Random) -> str:
    """A value after a colon or dash becomes something else; or a line is doubled, indented, dropped."""
    lines = path.read_text().splitlines()
    at = rng.randrange(len(lines))
    kind = rng.choice(["value", "value", "value", "twice", "indent", "drop", "raw"])
    if kind == "value":
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon or ':'} {_raw(rng)}"
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "indent":
        lines[at] = rng.choice([" ", "    ", "\t", "- "]) + lines[at]
    elif kind == "drop":
        del lines[at]
    else:
        lines[at] = rng.choice(RAW)
    path.write_text("\n".join(lines) + "\n", errors="surrogatepass")
    return f"line {at}: {kind}"


def _jinja(path: Path, rng: random.Random) -> str:
    template = rng.choice(TEMPLATES)
    path.write_bytes(template if isinstance(template, bytes) else template.encode())
    return f"template {template[:40]!r}"


def _header(path: Path, rng: random.Random) -> str:
    header, body = split(path.read_bytes())
    if rng.random() < 0.2:
        name = rng.choice(["\ud800", "\u00b2", "\u0663.x", "\x1b[31m", "a\nb", "x" * 5000, "", "model.layers.999999.x"])
        shape = rng.choice([[0], [2**62, 2**62, 0], [10**30, 0], [1] * 17 + [0], [0] * 100_000])
        dtype = rng.choice(["F32", ["F32"], "Z9", None])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body)] * 2}
        path.write_bytes(joined(header, body))
        return f"header: tensor {name[:20]!r}"
    text, what = change(header, rng)
    encoded = text.encode(errors="surrogatepass")
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    return f"header: {what}"


_BY_SYNTAX: dict[str, Callable[[Path, random.Random], str]] = {
    SAFETENSORS: _header,
    JSON: _json,
    LINES: _lines,
    YAML: _yaml,
    JINJA: _jinja,
    TEXT: _bytes,
}


# ---- JSON ------------------------------------------------------------------------------------------------------------


def change(value: Any, rng: random.Random) -> tuple[str, str]:
    """A JSON value with one thing in it changed, as text, and what was done."""
    place, keys = value, []
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        keys.append(key)
        if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.15:
            break
        place = place[key]
    if not keys:
        return _raw(rng), "all of it"
    key, where = keys[-1], ".".join(map(str, keys))[:80]
    kind = rng.choice(["value", "value", "value", "near", "drop", "rename", "twice", "wrap", "grow", "raw", "raw"])
    if kind == "near" and type(place[key]) in (int, float):
        place[key] = rng.choice([place[key] + 1, place[key] - 1, -place[key], place[key] * 1000, float(place[key])])
    elif kind == "drop":
        del place[key]
    elif kind == "rename" and isinstance(place, dict):
        place[rng.choice(["", "x", "\x1b[2J", key + "x", "\ud800", "__metadata__"])] = place.pop(key)
    elif kind == "wrap":
        place[key] = rng.choice([[place[key]], {"a": place[key]}, [place[key]] * 3])
    elif kind == "grow":
        inner = place[key]
        place[key] = inner * 1000 if isinstance(inner, str | list) else [inner] * 10_000
    elif kind == "twice" and isinstance(place, dict):
        marker = "\x00twice\x00"
        place[marker] = place[key]
        return json.dumps(value).replace(json.dumps(marker), json.dumps(key)), f"{where} twice"
    elif kind == "raw":
        marker = "\x00raw\x00"
        place[key] = marker
        return json.dumps(value).replace(json.dumps(marker), _raw(rng)), f"{where} raw"
    else:
        place[key] = rng.choice(HOSTILE)
    return json.dumps(value), f"{where} {kind}"


def _raw(rng: random.Random) -> str:
    return rng.choice([*RAW, json.dumps(rng.choice(HOSTILE))])
