"""The runtime's front: open a directory, give it prompts, get text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from ..errors import CheckpointError, GenerationError
from ..inputs.files import inside, is_inside
from ..inputs.json_text import read_object
from ..quant.checkpoint import Checkpoint
from ..quant.model_config import ModelConfig
from .backend import make_ops
from .engine import Engine, EngineConfig
from .model import Model
from .sampler import SamplingParams
from .sequence import Sequence
from .step import RopeRows
from .text import TextStream
from .tokenizer import Tokenizer
from .weights import load_kv_cache_scales, load_rope_tables, load_weights, open_store

KV_CACHE_DTYPES = ("auto", "int8")

Prompt: TypeAlias = str | Tokens[int]
"""Text, or the token ids of one."""


@dataclass(frozen=True)
class Completion:
    """What became of a prompt.

    text: without the prompt, special tokens and the stop string. finish_reason: "stop" (end of sequence or a stop
    string) or "length". The seconds are those of the steps the prompt took part in, beside whatever else ran in them.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    prefill_seconds: float
    decode_seconds: float

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Piece:
    """The next text of the prompt numbered `index`. The last piece of a prompt brings its `completion`."""

    index: int
    text: str
    completion: Completion | None = None


class LanguageModel:
    """A loaded model. Not for several threads at once."""

    def __init__(self, directory: Path, config: Mapping[str, Any], engine: Engine):
        self.directory = directory
        self.engine = engine
        self._config = config

    @property
    def backend(self) -> str:
        """The name of the operators that run: "cpu", "reference" or "ascend"."""
        return self.engine.model.ops.name

    @property
    def context(self) -> int:
        """The most tokens a prompt and its completion can have together."""
        return self.engine.context

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when it is first needed; GenerationError when there is none."""
        return Tokenizer(self.directory)

    @overload
    def generate(self, prompts: str, params: SamplingParams | None = None, **options: Any) -> Completion: ...
    @overload
    def generate(
        self, prompts: Tokens[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompts: str | Tokens[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> Completion | list[Completion]:
        """Continue one text, or several at once, each a text or a list of token ids.

        `options` are the fields of `SamplingParams` (`max_new_tokens=64, temperature=0.7, stop="\\n"`, …), over
        `params` when both are given. Raises GenerationError for a bad option and for a prompt that does not fit.
        """
        done: dict[int, Completion] = {}
        for piece in self.stream(prompts, params, **options):
            if piece.completion is not None:
                done[piece.index] = piece.completion
        if isinstance(prompts, str):
            return done[0]
        return [done[index] for index in range(len(done))]

    def stream(
        self, prompts: str | Tokens[Prompt], params: SamplingParams | None = None, **options: Any
    ) -> Iterator[Piece]:
        """As `generate`, in pieces as they come. Text given out is final; closing the iterator ends the generation."""
        several: Tokens[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        return self._stream([self._ids(prompt) for prompt in several], _sampling(params, options))

    def logits(self, sequences: Tokens[Tokens[int]]) -> Iterator[Tensor]:
        """For each sequence of token ids, the logits after each of its tokens: compute dtype `[tokens, vocab]`."""
        return self.engine.logits(sequences)

    def _stream(self, prompts: Tokens[Tokens[int]], params: SamplingParams) -> Iterator[Piece]:
        texts = [TextStream(self.tokenizer, prompt, params.stop) for prompt in prompts]
        sequences: list[Sequence] = []
        try:
            for prompt in prompts:
                sequences.append(self.engine.add(prompt, params))  # noqa: PERF401  (one may raise: drop the others)
            index_of = {id(sequence): index for index, sequence in enumerate(sequences)}
            while any(sequence.finish_reason is None for sequence in sequences):
                for new in self.engine.step():
                    index = index_of[id(new.sequence)]
                    yield from self._piece(index, new.token, new.sequence, texts[index])
        finally:
            for sequence in sequences:
                self.engine.finish(sequence, "cancelled")

    def _piece(self, index: int, token: int, sequence: Sequence, text: TextStream) -> Iterator[Piece]:
        given = "" if sequence.finish_reason == "stop" else text.add(token)  # the end-of-sequence token has no text
        if text.stopped:
            self.engine.finish(sequence, "stop")
            sequence.finish_reason = "stop"
        if sequence.finish_reason is None:
            if given:
                yield Piece(index, given)
            return
        given += text.flush()
        completion = Completion(
            text=text.text,
            token_ids=tuple(sequence.tokens[sequence.num_prompt_tokens :]),
            prompt_tokens=sequence.num_prompt_tokens,
            finish_reason=sequence.finish_reason,
            prefill_seconds=sequence.prefill_seconds,
            decode_seconds=sequence.decode_seconds,
        )
        yield Piece(index, given, completion)

    def _ids(self, prompt: Prompt) -> Tokens[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt


def load(
    path: str | Path,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | None = None,
    kv_layout: str = "nz",
    engine: EngineConfig | None = None,
    kv_cache_dtype: str = "auto",
) -> LanguageModel:
    """Open a quantized artifact, or an unquantized checkpoint (bf16, fp16, fp32 or DeepSeek's FP8), to run it.

    path: a directory, or `user/repo` (`user/repo@revision`) on the hub, which is fetched into the cache and checked.
    backend, dtype, device, kv_layout: see `make_ops`; engine: sizes of cache and batches. kv_cache_dtype: "auto" is the
    compute dtype; "int8" nearly halves a 16-bit cache, and needs the scales that calibrated conversion leaves in an
    artifact. Weights stay mapped from their files on the CPU. Raises CheckpointError or ArtifactError for a directory
    that is not what it should be, BackendError for a backend that cannot run here.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise GenerationError(f"kv_cache_dtype {kv_cache_dtype!r} is unknown; npuq has {', '.join(KV_CACHE_DTYPES)}")
    directory = _local(path)
    ops = make_ops(backend, dtype, device, kv_layout)
    with Checkpoint.open(directory) as checkpoint:
        config = ModelConfig.from_dict(checkpoint.config)
        tables = load_rope_tables(checkpoint, config)
        scales = load_kv_cache_scales(checkpoint, config) if kv_cache_dtype == "int8" else None
        store = open_store(checkpoint, ops.dtype)
        weights = load_weights(store, config, ops, tables.softmax_scale)
        raw_config = dict(checkpoint.config)
    model = Model(config, ops, weights, tables.softmax_scale)
    rope, eos_ids = RopeRows.of(tables, ops), _eos_ids(directory, raw_config)
    runner = Engine(model, rope, eos_ids, engine or EngineConfig(), scales)
    return LanguageModel(directory, raw_config, runner)


def _local(path: str | Path) -> Path:
    if Path(path).exists():
        return Path(path)
    # The client is slow to import, and most models are directories.
    from ..hub import resolve

    return resolve(path)


def _sampling(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    values = dict(options)
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    elif "stop" in values:
        values["stop"] = tuple(values["stop"] or ())
    try:
        return replace(params or SamplingParams(), **values)
    except TypeError:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise GenerationError(f"unknown option among {', '.join(options)}; npuq knows {known}") from None


def _eos_ids(directory: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The end-of-sequence ids of generation_config.json, else of config.json: one, several or none."""
    path, value = directory / "generation_config.json", None
    if is_inside(directory, path.name):
        value = read_object(inside(directory, path.name), CheckpointError).get("eos_token_id")
    if value is None:
        value, path = config.get("eos_token_id"), directory / "config.json"
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int for token in ids):
        raise GenerationError(f"{path}: eos_token_id {value!r} must be a token id or a list of them")
    return frozenset(ids)
