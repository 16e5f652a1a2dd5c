"""Task files of lm-evaluation-harness with local documents, read as data.

The harness itself runs Python that a task file names (`!function`, `process_docs`), fetches data sets, and renders
templates without a sandbox. Here a task file is plain YAML with known keys, and its documents are JSON lines beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import decoded, inside, read_given_bytes, read_text
from ...inputs.json_text import parse_object
from ...inputs.printable import shown
from ...inputs.yaml_text import parse_yaml

OUTPUT_TYPES: Final = ("multiple_choice", "generate_until", "loglikelihood", "loglikelihood_rolling")
METRICS: Final = (
    *("acc", "acc_norm", "exact_match", "f1", "mcc", "perplexity"),
    *("word_perplexity", "byte_perplexity", "bits_per_byte"),
)
_SPLITS: Final = ("test_split", "validation_split", "training_split", "fewshot_split")
_KEYS: Final = frozenset(
    {
        *("task", "dataset_path", "dataset_kwargs", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice"),
        *("description", "target_delimiter", "fewshot_delimiter", "num_fewshot", "metric_list", "generation_kwargs"),
        *("filter_list", "repeats", "metadata", "tag", "should_decontaminate", *_SPLITS),
    }
)
_MOST_DOCUMENTS_BYTES: Final = 1 << 28


@dataclass(frozen=True)
class TaskFile:
    """A task. digest: sha256 of the task file and its documents. settings: the harness's, without the data set.

    documents: of each split, a list of objects.
    """

    name: str
    path: Path
    digest: str
    settings: Mapping[str, Any]
    documents: Mapping[str, list[dict[str, Any]]]


def read_task(path: Path) -> TaskFile:
    """Read a task file and its documents. Raises GenerationError for what is none, and for what would be code."""
    stored = read_given_bytes(path, GenerationError)
    found = parse_yaml(decoded(stored, path, GenerationError), str(path), GenerationError)
    if not isinstance(found, dict):
        raise GenerationError(f"{path}: a task is a mapping with task, output_type, dataset_kwargs and doc_to_text")
    unknown = [key for key in found if key not in _KEYS]
    if unknown:
        raise GenerationError(f"{path}: key {shown(unknown[0])} is not read; npuq knows {', '.join(sorted(_KEYS))}")
    name, output = found.get("task"), found.get("output_type", "generate_until")
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
        raise GenerationError(f"{path}: task {shown(name)} must be a name")
    if output not in OUTPUT_TYPES:
        raise GenerationError(f"{path}: output_type {shown(output)} must be one of {', '.join(OUTPUT_TYPES)}")
    _check_metrics(found.get("metric_list", []), path)
    if found.get("dataset_path", "json") != "json":
        raise GenerationError(f"{path}: dataset_path must be json: documents are JSON lines beside the task file")
    files = _data_files(found, path)
    digest, documents = hashlib.sha256(stored), {}
    for split, file in files.items():
        text = read_text(inside(path.parent, file, GenerationError), GenerationError, _MOST_DOCUMENTS_BYTES)
        digest.update(text.encode())
        documents[split] = [
            parse_object(line, f"{file}: line {number}", GenerationError)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        if not documents[split]:
            raise GenerationError(f"{path.parent / file}: holds no document")
    for key in _SPLITS:
        if key in found and found[key] not in documents:
            raise GenerationError(f"{path}: {key} {shown(found[key])} is not of data_files")
    settings = {key: value for key, value in found.items() if key not in ("dataset_path", "dataset_kwargs")}
    if not set(settings) & {"test_split", "validation_split"}:
        settings["test_split"] = next(iter(documents))
    return TaskFile(name, path, digest.hexdigest(), settings | {"output_type": output}, documents)


def _data_files(found: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Split → name of its file, of `dataset_kwargs: {data_files: …}`."""
    kwargs = found.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    files = {"test": files} if isinstance(files, str) else files
    if (
        not isinstance(files, dict)
        or not files
        or not all(isinstance(each, str) for pair in files.items() for each in pair)
    ):
        raise GenerationError(f"{path}: give dataset_kwargs: {{data_files: FILE.jsonl}}, or a file for each split")
    return files


def _check_metrics(metrics: Any, path: Path) -> None:
    """Refuse metrics that the harness would fetch code for."""
    for entry in metrics if isinstance(metrics, list) else [None]:
        name = entry.get("metric") if isinstance(entry, dict) else None
        if name not in METRICS:
            raise GenerationError(f"{path}: metric {shown(name)} must be one of {', '.join(METRICS)}")
