"""Processes of the rig, one a rank: started once, they run jobs together, each time as a process group of gloo.

A job is a function of `jobs`, called on every rank. It may fail on all of them; the processes live on.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 120  # of a collective; a rank that waits so long has lost another


class JobError(Exception):
    """A job that failed: the first line of what every rank said, in their order; None where a rank did not fail."""

    def __init__(self, said: list[str | None]):
        super().__init__("; ".join(f"rank {rank}: {line}" for rank, line in enumerate(said) if line))
        self.said = said


class Pool:
    """`size` processes. Jobs may take the first few of them."""

    def __init__(self, size: int, folder: Path):
        # Forks of one process that has imported everything: torch and torch_npu take seconds.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch_npu", "ascend_rig.fixtures", "ascend_rig.ranks.communicators"])
        self._folder, self._jobs = folder, 0
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def run(self, job: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
        """Run `job(*arguments)` on `ranks` ranks: what each returned. Raises JobError if any failed."""
        self._jobs += 1
        store = self._folder / f"store-{self._jobs}"
        pipes = self._pipes[:ranks]
        for pipe in pipes:
            pipe.send((job.__module__, job.__name__, arguments, ranks, str(store)))
        answers = [pipe.recv() for pipe in pipes]
        if any(error for error, _ in answers):
            raise JobError([error for error, _ in answers])
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


@contextmanager
def started(size: int) -> Iterator[Pool]:
    """Start a pool, and end it."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(size, Path(folder))
        try:
            yield pool
        finally:
            pool.close()


def _serve(pipe: Connection, rank: int) -> None:
    """Serve jobs until the other end is closed."""
    import importlib

    import torch
    import torch.distributed as dist
    import torch_npu  # noqa: F401

    from .. import emulate, fixtures  # noqa: F401
    from . import communicators

    torch.set_num_threads(1)
    library = emulate.register()  # lasts as long as this name
    pipe.send("ready")
    while library is not None:
        try:
            module, name, arguments, ranks, store = pipe.recv()
        except EOFError:
            os._exit(0)  # torch_npu takes seconds to say goodbye to devices that are not there
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": 1}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="localhost")
        try:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{store}",
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=SECONDS),
            )
            answer = (None, getattr(importlib.import_module(module), name)(*arguments))
        except Exception as error:
            traceback.print_exc()
            first = str(error).splitlines()[:1]
            answer = (f"{type(error).__name__}: {first[0] if first else ''}", None)
        finally:
            communicators.close_all()
            if dist.is_initialized():  # a job that ends its world has done so
                dist.destroy_process_group()
        pipe.send(answer)
