"""The tools that a request offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function that a request offers. parameters: JSON schema of its arguments. strict: they must satisfy it."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool = False

    @property
    def object_schema(self) -> dict[str, Any]:
        """The schema of its arguments, which are an object."""
        return {"type": "object", **self.parameters}

    def with_any_arguments(self) -> Tool:
        """The tool with any object as its arguments."""
        return replace(self, parameters={"type": "object"})


def offered_tools(tools: Sequence[Mapping[str, Any]] | None) -> tuple[Tool, ...]:
    """The functions of a request's tools, `{"type": "function", "function": {"name": …}}` or the inner object alone.

    Others are left out.
    """
    found = []
    for tool in tools or ():
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            schema = parameters if isinstance(parameters, Mapping) else {}
            found.append(Tool(function["name"], schema, function.get("strict") is True))
    return tuple(found)
