"""Run by torchrun on two ranks: what a program of a user's own sees of failures. Each rank writes it to a file.

python failing.py MODEL FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import npuq
from npuq.errors import CheckpointError
from npuq.runtime import EngineConfig

STEPS = 3


def main() -> None:
    torch.set_num_threads(1)
    path, folder, seen = sys.argv[1], Path(sys.argv[2]), {}
    rank = int(os.environ["RANK"])
    seen["settings"] = error_of(lambda: npuq.load(path, parallel="auto", engine=EngineConfig(max_num_seqs=4 + rank)))
    model = npuq.load(path, parallel="ep=2")
    if rank == 1:
        seen["prompt"] = error_of(lambda: model.generate("The law"))
        forward, steps = model.engine.model.forward, 0

        def failing(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > STEPS:
                raise CheckpointError("model-3.safetensors: became shorter")
            return forward(*arguments)

        model.engine.model.forward = failing  # type: ignore[method-assign]
        seen["step"] = error_of(model.follow)
    else:
        seen["step"] = error_of(lambda: model.generate("The law", max_new_tokens=64, temperature=0))
        seen["later"] = error_of(lambda: model.generate("The law", max_new_tokens=4, temperature=0))
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")


def error_of(call: Any) -> list[str]:
    """Class and message of the error that a call raises."""
    try:
        call()
    except npuq.NpuqError as error:
        return [type(error).__name__, str(error)]
    return []


if __name__ == "__main__":
    main()
