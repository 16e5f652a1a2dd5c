"""Run by torchrun on two ranks: programs of a user's own that end before their ranks do. Each rank writes what it saw.

python ending.py unclosed|alone|uneven MODEL FOLDER
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch

import npuq
from npuq.errors import CheckpointError, RankError
from npuq.runtime import llm

SECONDS = 60.0
"""Of a program that lives on: longer than all ranks may take to end."""


def unclosed(path: str, seen: Path) -> None:
    model = npuq.load(path, parallel="ep=2")
    if not model.leads:
        model.follow()
        seen.write_text("returned", encoding="utf-8")
        return
    model.generate("The law", max_new_tokens=2, temperature=0)
    try:
        npuq.load(path, parallel="ep=2")
    except RankError as error:
        seen.write_text(str(error), encoding="utf-8")


def alone(path: str, seen: Path) -> None:
    error = CheckpointError("model-3.safetensors: became shorter")
    if seen.name == "rank-1":
        with mock.patch.object(llm, "open_store", side_effect=error):
            try:
                npuq.load(path, parallel="ep=2")
            except CheckpointError:
                time.sleep(SECONDS)
    npuq.load(path, parallel="ep=2")


def uneven(path: str, seen: Path) -> None:
    model = npuq.load(path, parallel="ep=2")
    try:
        if model.leads:
            npuq.load(path, parallel="ep=2")
        model.follow()
    except RankError as error:
        seen.write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    program = {"unclosed": unclosed, "alone": alone, "uneven": uneven}[sys.argv[1]]
    program(sys.argv[2], Path(sys.argv[3]) / f"rank-{os.environ['RANK']}")
