"""YAML from outside: plain data with limits of size and depth, without aliases, or refused in one line."""

from __future__ import annotations

from typing import Any, Final

import yaml

from ..errors import NpuqError
from .printable import printable
from .values import MOST_DEPTH, check_values

MOST_CHARACTERS: Final = 1 << 18


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, which stay text as in JSON."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read; write the value again")
        tag = getattr(self.peek_event(), "tag", None)  # type: ignore[no-untyped-call]
        if tag not in (None, "!"):
            # PyYAML's constructors of tagged values raise errors of other kinds, and make types that JSON lacks.
            raise yaml.YAMLError(f"tags are not read; leave out {tag.removeprefix('tag:yaml.org,2002:')[:40]!r}")
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MOST_DEPTH} levels deep")
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str, error: type[NpuqError]) -> Any:
    """Parse a YAML text of at most 256 Ki characters; `where` names its file.

    Raises `error` for text that is not plain YAML, aliases, deep nesting, and numbers that are not finite or too long.
    """
    if len(text) > MOST_CHARACTERS:
        raise error(f"{where}: is longer than the {MOST_CHARACTERS} characters that npuq reads of such a file")
    try:
        value = yaml.load(text, _Loader)
        check_values(value)
    # Lookup, Type, Attribute: errors of PyYAML's constructors that it does not wrap.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise error(f"{where}: not valid YAML: {printable(' '.join(reason.split()))[:160]}") from cause
    return value
