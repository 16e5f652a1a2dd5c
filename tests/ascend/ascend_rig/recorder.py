"""How operators are called: the names of their arguments, over many calls."""

from __future__ import annotations

from typing import Any

import torch

from .schemas import Call


class Recorder:
    """`torch.ops.npu`, noting how its operators are called."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.npu, name)
        order = [argument.name for argument in operator.default._schema.arguments]

        def call(*args: Any, **kwargs: Any) -> Any:
            noted = self.calls.setdefault(name, {"positional": 0, "arguments": [], "none": []})
            noted["positional"] = max(noted["positional"], len(args))
            given = {*noted["arguments"], *order[: len(args)], *kwargs}
            noted["arguments"] = [argument for argument in order if argument in given]
            values = dict(zip(order, args, strict=False)) | kwargs
            none = {*noted["none"], *(argument for argument, value in values.items() if value is None)}
            noted["none"] = [argument for argument in order if argument in none]
            return operator(*args, **kwargs)

        return call
