"""The results of `npuq evaluate --tasks` as the manifest has them, and their table in the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..formats.artifact import MANIFEST_NAME
from ..inputs.forms import Each, Form, Items, Keys, check_form, is_count, is_finite, is_text
from ..inputs.printable import printable

if TYPE_CHECKING:
    from ..runtime.evaluation.tasks import TaskResult

KEY = "tasks"
_VALUES = Each(is_finite)
_REQUIRED: dict[str, Form] = {
    **dict.fromkeys(("task", "digest", "harness"), is_text),
    **dict.fromkeys(("documents", "num_fewshot"), is_count),
    "metrics": _VALUES,
}
_ENTRY = Keys({**_REQUIRED, "source_metrics": _VALUES}, frozenset(_REQUIRED))


def read_tasks(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of tasks in a manifest, oldest first. Raises ArtifactError when they are damaged."""
    entries: list[dict[str, Any]] = manifest.get(KEY, [])
    try:
        check_form(entries, Items(_ENTRY), MANIFEST_NAME, ArtifactError)
    except ArtifactError as error:
        raise ArtifactError(f"{MANIFEST_NAME}: {KEY!r} is damaged; convert again, or remove the key") from error
    return entries


def as_entry(result: TaskResult) -> dict[str, Any]:
    """A result as values for JSON; without the source's metrics where there is no source."""
    entry = {**asdict(result), "task": printable(result.task)}
    if result.source_metrics is None:
        del entry["source_metrics"]
    return entry


def rows(entry: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A result's metrics as texts: name, value with its standard error, the source's value."""
    ours, theirs = entry["metrics"], entry.get("source_metrics", {})
    return [(name, _text(ours, name), _text(theirs, name)) for name in ours if not name.endswith("_stderr")]


def _text(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return "–"
    error = metrics.get(f"{name}_stderr")
    return f"{metrics[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table of the card; empty without any."""
    if not entries:
        return ""
    lines = [
        "Tasks by lm-evaluation-harness, ± the standard error; the digest is of the task file and its documents.",
        "",
        "| task | digest | documents | few-shot | metric | value | source's | harness |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for entry in entries:
        name = printable(entry["task"]).replace("|", "\\|")
        lines += [
            f"| {name} | `{printable(entry['digest'])[:16]}` | {entry['documents']} | {entry['num_fewshot']} | "
            f"{printable(metric)} | {value} | {source} | {printable(entry['harness'])} |"
            for metric, value, source in rows(entry)
        ]
    return "\n".join(lines) + "\n"
