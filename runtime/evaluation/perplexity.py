"""Perplexity of a model on a text, and divergence of its predictions from those of its float source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import GenerationError
from ...formats.artifact import converted_as
from ...formats.checkpoint import read_config
from ...progress import Progress, Silent, Task
from ..engine_config import EngineConfig
from ..llm import LanguageModel, load, local_directory
from ..sampling.sampler import NotFiniteError
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_check import require_tokenizer

DEFAULT_CONTEXT = 512

# Not sized by memory: a source is loaded beside the model, and a step's logits are of all its tokens.
_SIZES = EngineConfig(kv_cache_bytes=2 << 30)

_LOGITS_BYTES = 256 << 20
"""Bytes of one model's logits in memory at once."""


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of the text. inputs: fed to the model. targets: row i of the logits predicts token i."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation. perplexity: exp of the mean negative log-likelihood of `tokens` predicted tokens.

    With a source, on the same tokens, else None: source_perplexity; kl_divergence: mean over tokens of
    KL(source ‖ model), in nats over the whole vocabulary; top1_agreement: share of the tokens for which both models
    have the same likeliest token.
    """

    perplexity: float
    tokens: int
    source_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


def evaluate(
    model: str | Path | LanguageModel,
    text: str,
    source: str | Path | LanguageModel | None = None,
    context: int = DEFAULT_CONTEXT,
    backend: str = "auto",
    progress: Progress | None = None,
    kv_cache_dtype: str = "auto",
    family: str | None = None,
) -> Evaluation:
    """Evaluate a model (a directory to load, or a loaded one) on a text, beside its float source if given.

    The text is tokenized once without special tokens and cut into contexts of `context` tokens; the last may be
    shorter. Each context starts from an empty cache, with BOS before it where the tokenizer has one, and all its tokens
    are predicted (without BOS, all but the first). `progress` counts contexts.
    backend, kv_cache_dtype, family: as of `load`, for directories; the source's cache is in the compute dtype.
    Raises GenerationError for a text or a context that is too short or too long, and for two models with different
    vocabularies.
    """
    judged, reference = load_models(model, source, backend, kv_cache_dtype, family)
    contexts = cut_contexts(text, judged.tokenizer, context)
    _check(judged, contexts, context)
    if reference is not None:
        _check(reference, contexts, context)
        sizes = [runner.engine.model.config.vocab_size for runner in (judged, reference)]
        if sizes[0] != sizes[1]:
            raise GenerationError(
                f"model and source have vocabularies of {sizes[0]} and {sizes[1]}: not the same model"
            )
    totals = torch.zeros(4, dtype=torch.float64)  # model loss, source loss, KL, agreements
    watch = progress or Silent()
    watch.start(Task("evaluate", len(contexts), "contexts"))
    for batch in _batches(contexts, judged.engine.model.config.vocab_size):
        inputs = [each.inputs for each in batch]
        model_logits = judged.logits(inputs)
        source_logits = reference.logits(inputs) if reference is not None else [None] * len(batch)
        for each, ours, theirs in zip(batch, model_logits, source_logits, strict=True):
            totals += _compare(each, ours, theirs)
            watch.advance(1)
    tokens = sum(len(each.targets) for each in contexts)
    means = (totals / tokens).tolist()
    if reference is None:
        return Evaluation(_exp(means[0]), tokens)
    return Evaluation(_exp(means[0]), tokens, _exp(means[1]), means[2], means[3])


def load_models(
    model: str | Path | LanguageModel,
    source: str | Path | LanguageModel | None,
    backend: str = "auto",
    kv_cache_dtype: str = "auto",
    family: str | None = None,
    parallel: str | None = None,
) -> tuple[LanguageModel, LanguageModel | None]:
    """Load a model and its float source, where they are directories. Other arguments and errors as of `load`."""
    if not isinstance(model, LanguageModel):
        require_tokenizer(Path(model))
        model = load(
            model,
            backend,
            engine=_SIZES,
            kv_cache_dtype=kv_cache_dtype,
            family=family,
            parallel=parallel,
            graphs=False,
        )
    return model, _source(source, model.directory, backend, family, parallel)


def _source(
    source: str | Path | LanguageModel | None, artifact: Path, backend: str, family: str | None, parallel: str | None
) -> LanguageModel | None:
    """The source of an artifact, loaded as the family that it was converted as."""
    if source is None or isinstance(source, LanguageModel):
        return source
    directory = local_directory(source)
    family = family or converted_as(artifact, read_config(directory))
    return load(directory, backend, engine=_SIZES, family=family, parallel=parallel, graphs=False)


def cut_contexts(text: str, tokenizer: Tokenizer, context: int) -> list[Context]:
    """Cut a text into contexts. Raises GenerationError where no token is left to predict."""
    if context < 1:
        raise GenerationError(f"context {context} must be at least 1")
    tokens = tokenizer.encode(text, special=False)
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    contexts = []
    for start in range(0, len(tokens), context):
        stretch = (*bos, *tokens[start : start + context])
        if len(stretch) > 1:
            contexts.append(Context(stretch[:-1], stretch[1:]))
    if not contexts:
        raise GenerationError("the text has no token to predict; give a longer one")
    return contexts


def _check(model: LanguageModel, contexts: Sequence[Context], context: int) -> None:
    longest = max(len(each.inputs) for each in contexts)
    if longest > model.context:
        raise GenerationError(f"context {context} exceeds the {model.context} tokens of {model.directory}; lower it")


def _batches(contexts: Sequence[Context], vocabulary: int) -> Iterator[list[Context]]:
    limit = max(1, _LOGITS_BYTES // (4 * vocabulary))
    batch: list[Context] = []
    for each in contexts:
        if batch and sum(len(some.inputs) for some in batch) + len(each.inputs) > limit:
            yield batch
            batch = []
        batch.append(each)
    yield batch


def _compare(context: Context, logits: Tensor, source_logits: Tensor | None) -> Tensor:
    """Sums over a context's tokens, float64 `[4]`: model loss, source loss, KL, agreements."""
    targets = torch.tensor(context.targets)[:, None]
    ours = logits.to("cpu", torch.float32).log_softmax(-1)
    loss = -ours.gather(1, targets).double().sum()
    zero = torch.zeros((), dtype=torch.float64)
    if source_logits is None:
        return torch.stack([loss, zero, zero, zero])
    theirs = source_logits.to("cpu", torch.float32).log_softmax(-1)
    source_loss = -theirs.gather(1, targets).double().sum()
    divergence = (theirs.exp() * (theirs - ours)).sum(-1).double().sum()
    agreements = (ours.argmax(-1) == theirs.argmax(-1)).sum().double()
    return torch.stack([loss, source_loss, divergence, agreements])


def _exp(mean_loss: float) -> float:
    """Perplexity of a mean loss. Raises GenerationError for a loss that is not finite, a sign of damaged weights."""
    if not math.isfinite(mean_loss):
        raise NotFiniteError
    return math.exp(min(mean_loss, 700.0))
