"""The results of `npuq evaluate --save`, kept with the artifact: in its manifest and in its model card.

The results are a key of npuq/manifest.json and no file of their own: one rename saves them, so that the manifest always
vouches for the bytes on disk, and a push sends them in its last commit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError
from ..formats.artifact import CARD_BEGIN, CARD_END, CARD_NAME, MANIFEST_NAME, OWN_FOLDER, read_manifest
from ..formats.json_text import json_pieces
from ..formats.output_files import locked_directory, write_error, write_file
from ..inputs.files import inside, is_inside, read_text
from ..inputs.forms import Form, Items, Keys, check_form, is_count, is_finite, is_text, optional
from ..inputs.printable import printable
from .task_results import KEY as TASKS_KEY
from .task_results import as_entry, read_tasks, table

if TYPE_CHECKING:
    from ..runtime.evaluation.layer_error import LayerError
    from ..runtime.evaluation.perplexity import Evaluation
    from ..runtime.evaluation.tasks import TaskResult

KEY = "evaluations"
_HEADING = "## Evaluation\n"
_NEXT_HEADING = "## Loading\n"
_OPTIONAL = ("source_perplexity", "kl_divergence", "top1_agreement")
_OF_A_LAYER = ("relative_error", "cosine", "own_relative_error", "own_cosine")


_LAYER: dict[str, Form] = {"layer": is_count, **dict.fromkeys(_OF_A_LAYER, is_finite)}
_OF_A_SPARSE_LAYER: dict[str, Form] = {"own_selection_agreement": optional(is_finite)}
_RESULT: dict[str, Form] = {
    "text": is_text,
    "text_sha256": is_text,
    "context": is_count,
    "tokens": is_count,
    "perplexity": is_finite,
}
_ENTRY = Keys(
    {
        **_RESULT,
        "kv_cache_dtype": is_text,
        **dict.fromkeys(_OPTIONAL, optional(is_finite)),
        "layers": Items(Keys({**_LAYER, **_OF_A_SPARSE_LAYER}, frozenset(_LAYER))),
    },
    frozenset(_RESULT),
)


def check_can_save(artifact: Path) -> None:
    """Raise ArtifactError unless a result can be saved here: a finished artifact with a readable card and readable
    earlier results, and not a snapshot in a hub's cache. Call it before the hours of an evaluation."""
    if (artifact / MANIFEST_NAME).is_symlink():
        raise ArtifactError(
            f"{artifact}: is in the Hugging Face cache, which holds what the hub has; `npuq pull` it into a directory, "
            "evaluate that one and push it"
        )
    manifest = read_manifest(artifact)
    read_evaluations(manifest)
    read_tasks(manifest)
    _card(artifact)


def save_evaluation(
    artifact: Path,
    result: Evaluation,
    text: str,
    text_sha256: str,
    context: int,
    layers: Sequence[LayerError] = (),
    kv_cache_dtype: str = "auto",
) -> bool:
    """Save a result in the manifest and the card, in place of an earlier one on the same text, context and KV cache.

    `text` is the text's name, `text_sha256` that of its bytes. The errors of layers, where measured, go into the
    manifest alone, under the result's `layers`. Returns True where the card shows the result: a card that is missing,
    or has lost npuq's section, stays as it is. Raises ArtifactError where there is no finished artifact, and
    ConversionError when the disk refuses; the earlier results remain then.
    """
    check_can_save(artifact)
    entry = {
        "text": printable(text),
        "text_sha256": text_sha256,
        "context": context,
        "tokens": result.tokens,
        "perplexity": result.perplexity,
        **{key: getattr(result, key) for key in _OPTIONAL},
    }
    if kv_cache_dtype != "auto":
        entry["kv_cache_dtype"] = kv_cache_dtype
    if layers:
        entry["layers"] = [asdict(layer) for layer in layers]
    return _save(artifact, lambda manifest: _replace(manifest, KEY, read_evaluations(manifest), [entry], _identity))


def save_tasks(artifact: Path, results: Sequence[TaskResult]) -> bool:
    """Save results of tasks in manifest and card, in place of earlier ones of the same task and documents.

    Return value and errors are those of `save_evaluation`.
    """
    check_can_save(artifact)
    entries = [as_entry(result) for result in results]
    return _save(artifact, lambda manifest: _replace(manifest, TASKS_KEY, read_tasks(manifest), entries, _of_task))


def _replace(
    manifest: dict[str, Any],
    key: str,
    old: Sequence[Mapping[str, Any]],
    new: Sequence[Mapping[str, Any]],
    identity: Callable[[Mapping[str, Any]], tuple[object, ...]],
) -> None:
    made = {identity(entry) for entry in new}
    manifest[key] = [*(entry for entry in old if identity(entry) not in made), *new]


def _save(artifact: Path, change: Callable[[dict[str, Any]], None]) -> bool:
    """Change the manifest, and make the card show it; True where the card has npuq's section."""
    try:
        with locked_directory(artifact / OWN_FOLDER):
            manifest = read_manifest(artifact)
            change(manifest)
            write_file(artifact, MANIFEST_NAME, "".join(json_pieces(manifest)).encode())
            before = _card(artifact)
            shown = CARD_END in before.partition(CARD_BEGIN)[2]
            if shown:
                card = with_evaluations(before, read_evaluations(manifest), table(read_tasks(manifest)))
                write_file(artifact, CARD_NAME, card.encode())
    except OSError as error:
        raise write_error(artifact, error) from error
    return shown


def _card(artifact: Path) -> str:
    """The model card, empty where it is missing. Raises ArtifactError for one that cannot be read."""
    if not is_inside(artifact, CARD_NAME):
        return ""
    return read_text(inside(artifact, CARD_NAME, ArtifactError), ArtifactError)


def read_evaluations(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results in a manifest, oldest first. Raises ArtifactError when they are damaged."""
    entries: list[dict[str, Any]] = manifest.get(KEY, [])
    try:
        check_form(entries, Items(_ENTRY), MANIFEST_NAME, ArtifactError)
    except ArtifactError as error:
        raise ArtifactError(f"{MANIFEST_NAME}: {KEY!r} is damaged; convert again, or remove the key") from error
    return entries


def evaluated_on(entry: Mapping[str, Any]) -> str:
    """The text of a result, and its KV cache where that was not the default."""
    return f"{entry['text']} ({entry['kv_cache_dtype']} KV cache)" if "kv_cache_dtype" in entry else str(entry["text"])


def with_evaluations(card: str, entries: Sequence[Mapping[str, Any]], tasks: str) -> str:
    """The card with the results in npuq's section, between errors and loading; everything else stays as it is.

    tasks: the table of tasks behind that of texts, empty without any.
    """
    before, begin, rest = card.partition(CARD_BEGIN)
    section, end, after = rest.partition(CARD_END)
    if not (begin and end):
        return card
    head, heading, tail = section.partition(_NEXT_HEADING)
    head = head.partition(_HEADING)[0].rstrip("\n") + "\n"
    parts = [*([_table(entries)] if entries else []), *([tasks] if tasks else [])]
    if parts:
        head += f"\n{_HEADING}\n" + "\n".join(parts)
    return f"{before}{begin}{head}\n{heading}{tail}{end}{after}"


def _table(entries: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "Text cut into contexts of so many tokens. KL divergence of the source's predictions from this artifact's,",
        "in nats a token; top-1: how often both find the same token the likeliest.",
        "",
        "| text | sha256 | context | tokens | perplexity | source's | KL | top-1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in entries:
        name = evaluated_on(entry).replace("|", "\\|")
        source, divergence, agreement = (entry.get(key) for key in _OPTIONAL)
        lines.append(
            f"| {name} | `{entry['text_sha256'][:16]}` | {entry['context']} | {entry['tokens']} | "
            f"{entry['perplexity']:.3f} | {_number(source, '.3f')} | {_number(divergence, '.5f')} | "
            f"{_number(agreement, '.2%')} |"
        )
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _identity(entry: Mapping[str, Any]) -> tuple[object, ...]:
    return entry["text_sha256"], entry["context"], entry.get("kv_cache_dtype")


def _of_task(entry: Mapping[str, Any]) -> tuple[object, ...]:
    return entry["digest"], entry["documents"], entry["num_fewshot"]
