"""Tasks of multiple choice and of generation, by lm-evaluation-harness on a model in this process."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Final

import torch

from ...errors import GenerationError, NpuqError
from ...inputs.printable import error_line
from ...progress import Progress, Silent, Task
from ..llm import LanguageModel
from ..sampling.params import SamplingParams
from .task_files import TaskFile

_LOGITS_BYTES: Final = 256 << 20
_BOOTSTRAPS: Final = 1000
"""Rounds of resampling for the standard error of a metric that has no formula for it."""


@dataclass(frozen=True)
class TaskResult:
    """Result of a task. digest: sha256 of task file and documents. harness: its name and version.

    metrics, source_metrics: value by name, `NAME_stderr` its standard error; the source's are None without a source.
    """

    task: str
    digest: str
    harness: str
    documents: int
    num_fewshot: int
    metrics: Mapping[str, float]
    source_metrics: Mapping[str, float] | None = None


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[TaskFile],
    source: LanguageModel | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Run the tasks, on the source too if given; of each task the first `limit` documents.

    `progress` counts requests. Raises GenerationError without lm-evaluation-harness, and where it refuses a task.
    """
    require_harness()
    ours = _run(model, tasks, limit, progress or Silent())
    theirs = None if source is None else _run(source, tasks, limit, progress or Silent())
    return [
        TaskResult(
            task.name,
            task.digest,
            f"lm_eval {version('lm_eval')}",
            ours[task.name][1],
            int(task.settings.get("num_fewshot") or 0),
            ours[task.name][0],
            None if theirs is None else theirs[task.name][0],
        )
        for task in tasks
    ]


def require_harness() -> None:
    """Raise GenerationError where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise GenerationError(f"tasks need lm-evaluation-harness ({error}): pip install 'npuq[tasks]'") from error


def _run(
    model: LanguageModel, tasks: Sequence[TaskFile], limit: int | None, progress: Progress
) -> dict[str, tuple[dict[str, float], int]]:
    """Task → its metrics, and the number of its documents."""
    lm_eval = _harness()
    made = [_harness_task(task) for task in tasks]
    try:
        found = lm_eval.simple_evaluate(
            _adapter(model, progress), tasks=made, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False
        )
    except NpuqError:
        raise
    except Exception as error:
        raise _refused(tasks[0], error) from error
    results = {}
    for task in tasks:
        values = {
            name.partition(",")[0]: float(value)
            for name, value in found["results"][task.name].items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and "," in name
        }
        results[task.name] = (values, int(found["n-samples"][task.name]["effective"]))
    return results


def _refused(task: TaskFile, error: BaseException) -> GenerationError:
    return GenerationError(f"{task.path}: lm-evaluation-harness cannot run the task: {error_line(error)}")


def _harness() -> Any:
    """The harness, its templates in a sandbox, without bars and lines of its own."""
    import lm_eval
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.utils
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    sandbox = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = lm_eval.utils.regex_replace
    lm_eval.utils.env = sandbox
    for module in (lm_eval.api.model, lm_eval.api.task):
        module.tqdm = lambda items, *_, **__: items
    return lm_eval


def _harness_task(task: TaskFile) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    def documents(**_: object) -> dict[str, Any]:
        return {split: Dataset.from_list(found) for split, found in task.documents.items()}

    try:
        return ConfigurableTask(config={**task.settings, "custom_dataset": documents})
    except Exception as error:  # the harness raises any kind
        raise _refused(task, error) from error


def _adapter(model: LanguageModel, progress: Progress) -> Any:
    """The model as the harness asks one."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):  # type: ignore[misc]
        tokenizer_name = ""

        @property
        def eot_token_id(self) -> int:
            return _first(model.tokenizer.eos_id, model.tokenizer.bos_id)

        @property
        def prefix_token_id(self) -> int:
            return _first(model.tokenizer.bos_id, model.tokenizer.eos_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
            return model.tokenizer.encode(string, special=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests: Any, **_: object) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            progress.start(Task("tasks", len(pairs), "requests"))
            return list(_likelihoods(model, pairs, progress))

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            progress.start(Task("tasks", len(requests), "requests"))
            return [_rolling(model, request.args[0], self.prefix_token_id, progress) for request in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            progress.start(Task("tasks", len(requests), "requests"))
            return [_generated(model, request.args[0], request.args[1], progress) for request in requests]

    return Adapter()


def _first(*ids: int | None) -> int:
    return next((each for each in ids if each is not None), 0)


def _likelihoods(
    model: LanguageModel, pairs: Sequence[tuple[list[int], list[int]]], progress: Progress
) -> Iterator[tuple[float, bool]]:
    """Log-probability of each continuation behind its context, and whether it is the greedy one.

    Of a pair that exceeds the model's context, the beginning of the context is left out, as the harness does.
    """
    sequences = [[*context, *continuation][-(model.context + 1) :] for context, continuation in pairs]
    most = max(1, _LOGITS_BYTES // (4 * model.engine.model.config.vocab_size))
    for batch in _batches([len(sequence) for sequence in sequences], most):
        logits = model.logits([sequences[index][:-1] for index in batch])
        for index, rows in zip(batch, logits, strict=True):
            tokens = torch.tensor(sequences[index][-len(pairs[index][1]) :])
            chosen = rows[-len(tokens) :].to("cpu", torch.float32).log_softmax(-1)
            found = chosen.gather(1, tokens[:, None]).double().sum()
            progress.advance(1)
            yield float(found), bool((chosen.argmax(-1) == tokens).all())


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of neighbours with at most `most` tokens together, or of one that is longer."""
    batch: list[int] = []
    for index, length in enumerate(lengths):
        if batch and sum(lengths[each] for each in batch) + length > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _rolling(model: LanguageModel, text: str, prefix: int, progress: Progress) -> float:
    """Log-probability of a whole text, in windows of the model's context, each behind the token before it."""
    ids = [prefix, *model.tokenizer.encode(text, special=False)]
    windows = [ids[start : start + model.context + 1] for start in range(0, len(ids) - 1, model.context)]
    found = sum(value for value, _ in _likelihoods(model, [(each[:1], each[1:]) for each in windows], Silent()))
    progress.advance(1)
    return found


def _generated(model: LanguageModel, prompt: str, options: Mapping[str, Any], progress: Progress) -> str:
    """The completion of a prompt up to the first of `until`; of a prompt that is too long the beginning is left out."""
    until = options.get("until") or []
    count = min(int(options.get("max_gen_toks", 256)), model.context - 1)
    params = SamplingParams(
        max_new_tokens=count,
        temperature=float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
        stop=tuple([until] if isinstance(until, str) else until),
        seed=0,
    )
    ids = model.tokenizer.encode(prompt)[-(model.context - count) :]
    progress.advance(1)
    return model.generate(ids, params).text
