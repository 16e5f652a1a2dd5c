"""Trial compilation of JSON schemas from outside, in a child process with limits of time and memory.

llguidance has limits of its own, but none for the intersection of patterns (`allOf`): twenty of them take hours, and
nothing within a process can stop a thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ....errors import GenerationError
from ....inputs import confinement

SECONDS: Final = 3
"""CPU time of a schema, with the start of its process."""
MOST_MEMORY: Final = 512 << 20

_PATIENCE: Final = 60.0
"""Wall time of the process on a busy machine."""
_WORKER: Final = Path(__file__).with_name("checking_worker.py")
_ENVIRONMENT: Final = ("LD_LIBRARY_PATH",)


@lru_cache(maxsize=128)
def fault_of(schema: str) -> str:
    """The library's words on a JSON schema that it does not take; "" for one that it does. Remembers a few schemas.

    A new one takes about 0.1 s. Raises GenerationError where no process can be started.
    """
    spec = find_spec("llguidance")
    if spec is None or spec.origin is None:
        raise GenerationError("structured output needs llguidance: pip install 'npuq[serve]'")
    folders = [str(Path(spec.origin).parent.parent), str(Path(confinement.__file__).parent)]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_WORKER), str(SECONDS), str(MOST_MEMORY), *folders],
            input=schema.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it takes more than {_PATIENCE:g} seconds to compile"
    except OSError as error:
        raise GenerationError(f"no process to check a JSON schema can be started: {error}") from error
    if done.returncode == 0:
        return str(json.loads(done.stdout))
    return f"it takes more than {SECONDS} seconds of CPU time or {MOST_MEMORY >> 20} MiB to compile"
