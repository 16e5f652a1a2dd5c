"""Where a server that was started with `--json` listens."""

from __future__ import annotations

import json
from typing import Any, TextIO


def start_document(output: TextIO | None) -> dict[str, Any]:
    """The document that `npuq serve --json` writes when it listens."""
    assert output is not None
    text = ""
    while not text.endswith("}\n"):
        line = output.readline()
        assert line, "the server did not start"
        text += line
    found: dict[str, Any] = json.loads(text)
    return found
