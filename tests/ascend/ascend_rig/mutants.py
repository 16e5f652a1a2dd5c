"""Calls of operators made otherwise than they should be, and what a generation with them comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npuq.errors import GenerationError

from . import emulate, guard, harness

Arguments = tuple[list[Any], dict[str, Any]]
Change = Callable[[list[Any], dict[str, Any]], Arguments]


class Mutant:
    """`torch.ops.npu` with one operator called otherwise, or with several."""

    def __init__(self, operator: str | tuple[str, ...], change: Change):
        self._operators = (operator,) if isinstance(operator, str) else operator
        self._change = change
        self.changed = 0

    def __getattr__(self, name: str) -> Any:
        original = getattr(torch.ops.npu, name)
        if name not in self._operators:
            return original

        def call(*args: Any, **kwargs: Any) -> Any:
            self.changed += 1
            changed_args, changed_kwargs = self._change(list(args), dict(kwargs))
            return original(*changed_args, **changed_kwargs)

        return call


def setting(**changes: Any) -> Change:
    """Keyword arguments set to other values."""
    return lambda args, kwargs: (args, {**kwargs, **changes})


def without(*names: str) -> Change:
    """Keyword arguments left to their defaults."""
    return lambda args, kwargs: (args, {name: value for name, value in kwargs.items() if name not in names})


def renamed(old: str, new: str) -> Change:
    return lambda args, kwargs: (args, {new if name == old else name: value for name, value in kwargs.items()})


def swapped(first: int, second: int) -> Change:
    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        args[first], args[second] = args[second], args[first]
        return args, kwargs

    return change


def mapped(where: int | str, function: Callable[[Any], Any]) -> Change:
    """One argument passed through a function."""

    def change(args: list[Any], kwargs: dict[str, Any]) -> Arguments:
        target: Any = args if isinstance(where, int) else kwargs
        target[where] = function(target[where])
        return args, kwargs

    return change


def running(lengths: list[int]) -> list[int]:
    return list(accumulate(lengths))


def differences(lengths: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *lengths], lengths, strict=False)]


# Two prompts, the second in two chunks; then decodes of both.
LENGTHS, NEW_TOKENS = (4, 45), 3


_right: dict[tuple[Path, tuple[int, ...]], harness.Run] = {}


def right(path: Path, lengths: tuple[int, ...]) -> harness.Run:
    """The generation without a change, made once."""
    if (path, lengths) not in _right:
        run = harness.generate(path, harness.make("ascend"), lengths=lengths, new_tokens=NEW_TOKENS)
        _right[path, lengths] = run
    return _right[path, lengths]


class ShownError(Exception):
    """A step gave other logits than the right ones. The rest of the generation would tell nothing more."""


def outcome(path: Path, change_ops: Callable[[Any], None], lengths: tuple[int, ...] = LENGTHS) -> str:
    """ "refused: …", "shows: …" or "unnoticed"."""
    ops, known, steps = harness.make("ascend"), _right.get((path, lengths)), count()

    def compared(step: Callable[[], Tensor]) -> Tensor:
        logits = guard.guarded(step)
        if known is not None:
            compare([logits.float()], [known.logits[next(steps)]])
        return logits

    try:
        change_ops(ops)
        run = harness.generate(path, ops, compared, lengths, NEW_TOKENS)
        if known is None:
            # Not before the changed generation: one that is refused may be so by a patch, which a right one would meet.
            compare(run.logits, right(path, lengths).logits)
    except ShownError as error:
        return f"shows: {error}"
    except (emulate.RefusedError, guard.HostSynchronisationError, RuntimeError, TypeError) as error:
        return f"refused: {str(error).splitlines()[0]}"
    except GenerationError as error:  # the sampler met NaN
        return f"shows: {error}"
    return "unnoticed"


def compare(ours: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Raise ShownError for logits that are not the right ones."""
    error = harness.relative_error(ours, right)
    if error > 1e-3:
        raise ShownError(f"{error:.2g}")
