"""All ranks of a launch: how they come together, who leads, and how they end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from hashlib import sha256
from typing import ClassVar, Final

import torch
from torch import Tensor

from ... import __version__
from ...errors import GenerationError, NpuqError, RankError
from ...inputs.launch import Launch
from ...inputs.printable import error_line
from ..ops.ascend.support import npu_count
from ..step import Chunk
from .connections import START_SECONDS, connect
from .group import Distributed, Group
from .lifeline import SILENCE_SECONDS, Ending, Lifeline, Loss
from .messages import STOP, Message, receive, send

_GRACE_SECONDS: Final = 5.0
_FOREVER: Final = timedelta(days=365)
"""Followers wait for the next step as long as it takes; a rank that is gone is noticed by the lifeline."""

RunChunks = Callable[[Sequence[Chunk]], tuple[Tensor, list[int]]]


class World:
    """The ranks of one launch, which run the same models. Make it with `join`.

    Rank 0 leads: it has the prompts, and tells all others the chunks of each step. They follow: each runs the step on
    its own part of the weights, with its own cache. A step that fails on one rank ends all.
    """

    _joined: ClassVar[World | None] = None

    def __init__(self, launch: Launch, group: Group, lifeline: Lifeline, tells: bool):
        self.launch, self.group = launch, group
        self._lifeline, self._tells = lifeline, tells
        self._models: list[RunChunks] = []
        self._stepping = threading.Lock()
        self._running = False
        self._failed = False
        self._closed = False

    @classmethod
    def join(cls, launch: Launch, ending: Ending | None = None, silence: float = SILENCE_SECONDS) -> World | None:
        """Meet the other ranks of the launch, None for a process alone; again, return the world that was joined.

        ending: what to do when another rank is lost; None lets a RankError be raised where it is noticed, and ends the
        process a little later. silence: seconds after which a silent rank is lost. Raises RankError where the ranks do
        not come together.
        """
        if cls._joined is None and launch.size > 1:
            cls._joined = cls._meet(launch, ending, silence)
        return cls._joined

    @classmethod
    def _meet(cls, launch: Launch, ending: Ending | None, silence: float) -> World:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        if dist.is_initialized():
            raise RankError("torch.distributed is in use already, and npuq makes its own group of ranks")
        try:
            store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
            peers = connect(launch, PrefixStore("npuq", store))
            lifeline = Lifeline(launch.rank, peers, ending or EndSoon(), silence)
            dist.init_process_group(
                "cpu:gloo,npu:hccl" if npu_count() else "gloo",
                store=PrefixStore("group", store),
                rank=launch.rank,
                world_size=launch.size,
                timeout=_FOREVER,
            )
        except (RuntimeError, ValueError) as error:  # of torch's store and group
            reason = error_line(error, 300)
            raise RankError(f"rank {launch.rank} of {launch.size} does not reach the others: {reason}") from error
        group = Distributed(why=lambda: _text(lifeline.loss(2.0)))
        world = cls(launch, group, lifeline, tells=ending is None)
        world.agree("version of npuq", __version__, "install one on all machines")
        if ending is None:
            atexit.register(world.end_with_program)
        return world

    @property
    def leads(self) -> bool:
        """True on rank 0."""
        return self.launch.rank == 0

    def begin_loading(self) -> None:
        """Wait until all ranks load the next model. Raises RankError where one of them runs steps by now."""
        if self._running:
            raise RankError("steps run already, and every model must be loaded before the first of them")
        if self._over is not None:
            raise RankError(f"{self._over}; start all ranks again")
        self._meet_at("load")

    def _begin_running(self) -> None:
        """Before the first step: wait until all ranks have loaded the same models, and lead or follow."""
        if not self._running:
            self._meet_at("run")
            self._running = True

    def _meet_at(self, phase: str) -> None:
        # A rank that follows and one that loads would each wait for ever in a collective of its own.
        if not self._same((phase, len(self._models))):
            raise RankError(
                "some ranks load a model and others run steps already: load the same models on all ranks, in one order"
            )

    @property
    def _over(self) -> str | None:
        """The reason why no step can run any more; None while steps can."""
        if self._failed:
            return "an earlier step, or loading, has failed"
        return "the ranks have been closed" if self._closed else None

    @contextmanager
    def ending_all(self, *alike: type[NpuqError]) -> Iterator[None]:
        """End all ranks by an error within: those without it would wait for this rank for ever.

        alike: errors that every rank has or none, such as that of a layout. They end nothing.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (RankError, *alike)):
                self._failed = True
                self._tell(error)
            raise

    def add(self, run: RunChunks) -> int:
        """Add a model by the function that runs its steps; return its number. All ranks add the same ones in order."""
        self._models.append(run)
        return len(self._models) - 1

    def least(self, number: int) -> int:
        """The least of a number that the ranks give."""
        return -int(self.group.all_reduce_max(torch.tensor([-number])).item())

    def agree(self, what: str, value: object, remedy: str = "give all of them the same model and options") -> None:
        """Raise RankError on every rank where they give values of different representations. what: their name."""
        if not self._same(value):
            raise RankError(f"the ranks do not have the same {what}; {remedy}")

    def _same(self, value: object) -> bool:
        number = int.from_bytes(sha256(repr(value).encode()).digest()[:7], "big")
        return self.least(number) == -self.least(-number)

    def lead(self, model: int, chunks: Sequence[Chunk]) -> tuple[Tensor, list[int]]:
        """Run a step on all ranks. Raises GenerationError on a follower, and after a step that failed or the end.

        An error of the step ends all ranks: their caches differ from now on.
        """
        if not self.leads:
            raise GenerationError(
                f"rank {self.launch.rank} has no prompts of its own: it follows rank 0 (LanguageModel.follow)"
            )
        with self._stepping:
            if self._over is not None:
                raise GenerationError(f"{self._over}; start all ranks again")
            try:
                self._begin_running()
                send(Message(model, tuple(chunks)), self.group)
                return self._models[model](chunks)
            except BaseException as error:
                self._failed = True
                self._tell(error)
                raise

    def follow(self) -> None:
        """Run the steps of rank 0 until it closes the ranks. Raises what a step raises. Rank 0 returns at once."""
        if self.leads or self._closed:
            return
        try:
            self._begin_running()
            while not self._closed:
                message = receive(self.group)
                if message.model == STOP:
                    self.part_ways()
                else:
                    self._models[message.model](message.chunks)
        except BaseException as error:
            self._failed = True
            self._tell(error)
            raise

    def close(self) -> None:
        """End the followers' `follow`. On rank 0, once; nothing on a follower."""
        if not self.leads or self._closed:
            return
        with self._stepping:
            if not self._failed:
                self._begin_running()
                send(Message(STOP), self.group)
                self.part_ways()

    def fail(self, text: str, code: int) -> None:
        """Tell all ranks that this one ends with an error; they end too. On rank 0 the user has been told before."""
        self._lifeline.fail(text, code)

    def end_with_program(self) -> None:
        """End the ranks with a user's program that has not closed them."""
        if not self._models:
            self._lifeline.leave()  # what kept it from loading was said
        elif self.leads:
            with suppress(RankError):
                self.close()
        elif not self._closed:
            self.fail(f"rank {self.launch.rank}: its program has ended; it should follow rank 0 until that closes", 1)

    def _tell(self, error: BaseException) -> None:
        """Tell of an error at once, where a user's own program may catch it and go on."""
        if self._tells and not isinstance(error, RankError):
            known = isinstance(error, NpuqError)
            words = (f"rank {self.launch.rank}", "" if known else type(error).__name__, str(error))
            self.fail(": ".join(filter(None, words)), error.exit_code if isinstance(error, NpuqError) else 1)

    def tell_leader(self, word: str) -> None:
        """Tell rank 0 one line, at once and beside all collectives; nothing on rank 0."""
        self._lifeline.tell_leader(word)

    def listen(self, hear: Callable[[int, str], None]) -> None:
        """On rank 0: call `hear` with the rank and the line of whatever the others tell from now on, in a thread."""
        self._lifeline.hear = hear

    def part_ways(self) -> None:
        """End the launch: return when all ranks have called this. No collective follows."""
        import torch.distributed as dist

        self.group.barrier()
        self._closed = True
        self._lifeline.leave()
        dist.destroy_process_group()


class EndSoon:
    """Ending for a user's own program: its collectives raise RankError, and it has some seconds to end by itself."""

    def report(self, loss: Loss) -> None:
        """Say nothing yet: the error will be raised in the program's own thread."""

    def end_after(self, loss: Loss) -> None:
        time.sleep(_GRACE_SECONDS)
        if loss.speaks:
            print(f"npuq: error: {loss.text}", file=sys.stderr, flush=True)
        os._exit(loss.code)


def _text(loss: Loss | None) -> str | None:
    return None if loss is None else loss.text
