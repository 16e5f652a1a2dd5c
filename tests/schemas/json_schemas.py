"""The published schemas of `--json` documents, docs/schemas/, and documents held to them.

A reader of documents must take keys that it does not know, so the schemas allow them. The tests do not: a key that no
schema has fails.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

FOLDER = Path(__file__).parents[2] / "docs/schemas"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def check(name: str, document: Any) -> None:
    """Fail unless the document has the form that docs/schemas/NAME.json gives, and nothing else."""
    errors = [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(document)]
    assert errors == [], name


def check_output(command: str, document: Any) -> None:
    """The same for what a command printed: an error, a plan, or its own document."""
    if isinstance(document, dict) and "error" in document:
        command = "error"
    elif command == "doctor" and "layouts" in document:
        command = "doctor-plan"
    check(command, document)


@cache
def validator(name: str) -> Draft202012Validator:
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(_closed(schema))


def _closed(schema: Any) -> Any:
    """The schema with no keys allowed besides those that it names."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **inner} if isinstance(schema.get("properties"), dict) else inner
