"""Trial compilation of grammars with JSON schemas from outside, in a child process with limits of time and memory.

llguidance has limits of its own, but none for the intersection of patterns (`allOf`): twenty of them take hours, and
nothing within a process can stop a thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Final

from ....errors import GenerationError
from ....inputs import confinement

SECONDS: Final = 3
"""CPU time of a request's grammars, with the start of their process."""
MOST_MEMORY: Final = 512 << 20

_PATIENCE: Final = 60.0
"""Wall time of the process on a busy machine."""
_WORKER: Final = Path(__file__).with_name("checking_worker.py")
_ENVIRONMENT: Final = ("LD_LIBRARY_PATH",)


_MOST_REMEMBERED: Final = 128

Fault = tuple[int, str]
"""Place of a grammar in a list, and the library's words on it."""

_remembered: OrderedDict[bytes, Fault | None] = OrderedDict()
_lock = Lock()


def first_fault(grammars: Sequence[str]) -> Fault | None:
    """The first of some grammars, in llguidance's form of Lark, that it does not take; None if it takes all.

    They share one process and its limits. Takes about 0.1 s; the last lists that it was asked for are remembered.
    Raises GenerationError where no process can be started, and where it gives no answer in time: the machine is busy.
    """
    text = json.dumps(list(grammars))
    key = sha256(text.encode()).digest()
    with _lock:
        if key in _remembered:
            _remembered.move_to_end(key)
            return _remembered[key]
    answers = _answers(text)
    if len(answers) < len(grammars):  # not remembered: those before it have used up a part
        faults = [*answers, f"it takes more than {SECONDS} seconds of CPU time or {MOST_MEMORY >> 20} MiB to compile"]
    else:
        faults = answers
    found = next(((place, fault) for place, fault in enumerate(faults) if fault), None)
    if len(answers) == len(grammars):
        with _lock:
            _remembered[key] = found
            while len(_remembered) > _MOST_REMEMBERED:
                _remembered.popitem(last=False)
    return found


def _answers(text: str) -> list[str]:
    """The library's words on each grammar of a JSON list, "" for one that it takes, as far as the limits allow."""
    spec = find_spec("llguidance")
    if spec is None or spec.origin is None:
        raise GenerationError("structured output needs llguidance: pip install 'npuq[serve]'")
    folders = [str(Path(spec.origin).parent.parent), str(Path(confinement.__file__).parent)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_WORKER), str(SECONDS), str(MOST_MEMORY), *folders],
            input=text.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GenerationError(f"it was not compiled within {_PATIENCE:g} seconds; ask again") from None
    except OSError as error:
        raise GenerationError(f"no process to check a grammar can be started: {error}") from error
    return [str(json.loads(line)) for line in done.stdout.splitlines(keepends=True) if line.endswith(b"\n")]
