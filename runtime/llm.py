"""Loading a directory, and generating text from prompts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from operator import index
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias, overload

import torch
from torch import Tensor

from ..choices import KV_CACHE_DTYPES
from ..errors import BackendError, GenerationError, NpuqError, NpuqWarning
from ..formats.checkpoint import Checkpoint
from ..formats.sources.model_config import read_model_config
from ..inputs.launch import Launch
from ..inputs.printable import shown
from ..units import format_bytes
from .attention.kinds import attention_of, check_backend
from .backend import make_ops
from .engine import Engine
from .engine_config import EngineConfig
from .loop import Loop
from .memory.machine import engine_cache, free_memory, planner_of, rank_memory
from .memory.plan import Planner, RankPlan
from .model import Model
from .ops import Ops
from .ranks.group import ALONE
from .ranks.layout import Layout
from .ranks.world import World
from .request import Request
from .sampling.grammar import Grammar
from .sampling.params import SamplingOptions, SamplingParams
from .step import RopeRows
from .store import open_store
from .stream import Completion, Stream
from .text.conversation import ChatOptions, Message
from .text.generation_config import default_sampling, eos_ids, read_generation_config
from .text.replies.formats import PLAIN, ReplyFormat, find_format
from .text.replies.tools import offered_tools
from .text.tokenizer import Tokenizer
from .weights import load_kv_cache_scales, load_rope_tables, load_weights

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt: TypeAlias = str | Sequence[int]
"""Text, or the token ids of one."""


class LanguageModel:
    """A loaded model. Several threads may use it, and several streams may be open: they share its steps.

    loop: runs them.
    """

    def __init__(
        self,
        directory: Path,
        generation: Mapping[str, Any],
        engine: Engine,
        tokenizer: Tokenizer | None = None,
        world: World | None = None,
    ):
        self.directory = directory
        self.engine = engine
        self._generation = generation
        self.loop = Loop(engine)
        self._reading = Lock()
        self._tokenizer = tokenizer
        self._world = world

    @property
    def leads(self) -> bool:
        """True where this process takes prompts: alone, or rank 0 of several."""
        return self._world is None or self._world.leads

    @property
    def over_ranks(self) -> bool:
        """True where several processes run the model."""
        return self._world is not None

    def follow(self) -> None:
        """On a rank other than 0: run the steps of rank 0, of all loaded models, until it calls `close`."""
        if self._world is not None:
            self._world.follow()

    def close(self) -> None:
        """On rank 0 of several: let the others return from `follow`. No model can be run over ranks afterwards."""
        if self._world is not None:
            self._world.close()

    @property
    def backend(self) -> str:
        """The name of the operators that run: "cpu", "reference" or "ascend"."""
        return self.engine.model.ops.name

    @property
    def context(self) -> int:
        """Limit of the tokens of a prompt and its completion together."""
        return self.engine.context

    @property
    def cache_tokens(self) -> int:
        """Tokens that the KV cache holds, of all sequences together."""
        return self.engine.cache_tokens

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache in this process."""
        return self.engine.cache_bytes

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read on first use. Raises GenerationError where the directory has none."""
        with self._reading:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self.directory)
            return self._tokenizer

    @cached_property
    def default_params(self) -> SamplingParams:
        """Sampling of a request without parameters: that of the model's generation_config.json, else greedy."""
        return default_sampling(self.directory, self._generation)

    @cached_property
    def reply_format(self) -> ReplyFormat:
        """How the model writes reasoning and tool calls, by its chat template and tokens."""
        return find_format(self.tokenizer)

    @overload
    def generate(  # type: ignore[overload-overlap]  # an empty list is no prompts
        self, prompts: str | Sequence[int], params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion | list[Completion]:
        """Continue a prompt (a text or token ids), or a list of prompts together.

        `options` are fields of `SamplingParams` (`max_new_tokens=64, temperature=0.7, stop="\\n"`, …). They override
        `params`, or `default_params` without those: `temperature=0` is greedy for every model. With `n`, give a list of
        prompts: the result has n completions of the first, then those of the second, and so on.
        Raises GenerationError for a bad option and for a prompt that does not fit.
        """
        done: dict[int, Completion] = {}
        if _is_one(prompts) and self._params(params, options).n > 1:
            raise GenerationError("n above 1 gives several completions: give the prompt in a list, as [prompt]")
        with self.stream(prompts, params, **options) as pieces:
            for piece in pieces:
                if piece.completion is not None:
                    done[piece.index] = piece.completion
        if _is_one(prompts):
            return done[0]
        return [done[number] for number in range(len(done))]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        grammar: Callable[[], Grammar] | None = None,
        salt: bytes = b"",
        reply: ReplyFormat = PLAIN,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Generate piece by piece. Text of a piece is final; closing the stream ends the generation.

        grammar: makes the grammar of one completion (`Grammar`). salt: the prompts share cache blocks only with others
        of the same salt. reply: tells reasoning and tool calls from the text; `reply_format` is the model's own.
        """
        several = [prompts] if _is_one(prompts) else prompts
        ids = [self._ids(prompt) for prompt in several]  # type: ignore[arg-type]
        return Stream(self.loop, self.tokenizer, Request(ids, self._params(params, options), grammar, salt, reply))

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Answer a conversation: `Tokenizer.chat` makes its prompt, and the model continues it.

        `options`: those of `Tokenizer.chat` and `generate`. chat_template_kwargs: other variables of the template, such
        as `{"thinking": True}`. The completion has `reasoning` and `tool_calls` apart from the text.
        """
        of_chat: Any = {name: value for name, value in options.items() if name in ChatOptions.__annotations__}
        others: Any = {name: value for name, value in options.items() if name not in of_chat}
        prompt = self.tokenizer.chat(messages, chat_template_kwargs=chat_template_kwargs, **of_chat)
        if self._params(params, others).n > 1:
            raise GenerationError(
                "n above 1 gives several completions: give generate a list of tokenizer.chat's prompt"
            )
        reply = replace(self.reply_format, tools=offered_tools(of_chat.get("tools")))
        with self.stream([prompt], params, reply=reply, **others) as pieces:
            (completion,) = (piece.completion for piece in pieces if piece.completion is not None)
        return completion

    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits after each token of each sequence of token ids: compute dtype `[tokens, vocab]` a sequence.

        Raises GenerationError at once for an argument that is no list of sequences, and on the first `next` for a
        sequence that is empty, longer than the context, or holds an id outside the vocabulary.
        """
        if isinstance(sequences, (str, bytes, Mapping)) or not hasattr(sequences, "__getitem__"):
            raise _no_prompt(sequences)
        return self.loop.logits([_token_ids(sequence) for sequence in sequences])

    def _params(self, params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
        return SamplingParams.of(self.default_params if params is None else params, options)

    def _ids(self, prompt: Prompt) -> Sequence[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)


class RequestOptions(ChatOptions, SamplingOptions):
    """Keyword arguments of `LanguageModel.chat`."""


def _is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """True for one prompt (a text or token ids), False for a list of prompts. An empty list is a list of no prompts.

    Raises GenerationError for anything else.
    """
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__getitem__"):
        raise _no_prompt(prompts)
    try:
        return len(prompts) > 0 and _token(prompts[0]) is not None
    except TypeError:
        return False


def _token_ids(given: Any) -> list[int]:
    """Convert a sequence of token ids to plain integers. Raises GenerationError for anything else."""
    if isinstance(given, (str, bytes, Mapping)):
        raise _no_prompt(given)
    try:
        return [_token(token) for token in given]
    except TypeError:
        raise _no_prompt(given) from None


def _no_prompt(given: object) -> GenerationError:
    what = shown(given) if isinstance(given, (list, tuple)) else f"a {type(given).__name__}"
    return GenerationError(f"a prompt is a text or a list of token ids, not {what}; for messages there is model.chat")


def _token(value: Any) -> int:
    """Convert a token id of any library's integer type. Raises TypeError for anything else."""
    if isinstance(value, bool) or getattr(value, "ndim", 0) > 0:  # a row of one column is not its only id
        raise TypeError
    return index(value)


def load(
    path: str | Path,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | None = None,
    kv_layout: str = "nz",
    engine: EngineConfig | None = None,
    kv_cache_dtype: str = "auto",
    tokenizer: Tokenizer | None = None,
    family: str | None = None,
    parallel: str | None = None,
    graphs: bool = True,
) -> LanguageModel:
    """Open a quantized artifact, or an unquantized checkpoint (bf16, fp16, fp32 or DeepSeek's FP8), to run it.

    path: a directory, or `user/repo` (`user/repo@revision`) on the hub, which is fetched into the cache and checked.
    backend, dtype, device, kv_layout: see `make_ops`. engine: sizes of cache and batches; without a size the cache
    takes what is free on an NPU, and up to 2 GiB on the CPU (`Planner.auto_cache`). kv_cache_dtype: "auto" is the
    compute dtype; "int8" nearly halves a 16-bit cache and needs scales, which calibrated conversion writes into an
    artifact. tokenizer: the directory's, where the caller has read it already. family: read a checkpoint of unknown
    model_type as one of this family. parallel: in processes that torchrun started, how they divide the model: "auto",
    or a `Layout` like "ep=8,tp=8"; rank 0 then generates, and all others call `LanguageModel.follow`. None keeps this
    process alone. graphs: on one NPU, capture decode steps and replay them; False launches every operator from the
    host. On the CPU, weights stay mapped from their files. Raises CheckpointError or ArtifactError for a directory that
    is incomplete, damaged or not supported, BackendError for a backend that cannot run here, for a layout that does not
    divide the model, and for a model that does not fit into memory, with the numbers, RankError where ranks do not come
    together, and after the first step over ranks: the others follow by then. A damaged directory or a device that one
    rank cannot use ends all ranks.
    """
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise GenerationError(f"kv_cache_dtype {kv_cache_dtype!r} is unknown; npuq has {', '.join(KV_CACHE_DTYPES)}")
    if not isinstance(engine, (EngineConfig, type(None))):
        raise GenerationError(f"engine must be an EngineConfig, not a {type(engine).__name__}")
    sizes = engine or EngineConfig()
    directory = local_directory(path)
    generation = read_generation_config(directory)
    world = None if parallel is None else World.join(Launch.of(os.environ))
    group, local_rank = (ALONE, 0) if world is None else (world.group, world.launch.local_rank)
    if world is not None:
        world.begin_loading()
    with _ending_all(world):
        ops = make_ops(backend, dtype, device, kv_layout, group, local_rank)
    with _ending_all(world, BackendError, GenerationError), Checkpoint.open(directory) as checkpoint:
        checkpoint.read_as(family)
        config = read_model_config(checkpoint)
        check_backend(config, ops)
        sizes = sizes.on(ops.name, config)
        ends = eos_ids(directory, generation, checkpoint.text_config)
        tables = load_rope_tables(checkpoint, config)
        int8_cache = kv_cache_dtype == "int8"
        store = open_store(checkpoint, ops.dtype)
        if world is not None:
            world.agree("tensors", store.identity())
            world.agree("kind of processor", ops.arithmetic, "run on machines of one kind, with as many threads")
            world.agree("settings", (sizes, ops.name, ops.dtype, kv_layout, kv_cache_dtype, parallel, config))
        planner = planner_of(store.form, config, ops, sizes, _memory(ops, world), int8_cache=int8_cache)
        layout = chosen_layout(parallel, planner, ops.group.size)
        owned = layout.owned(config, ops.group.rank)
        attention = attention_of(config, tables.softmax_scale, len(owned.heads))
        scales = load_kv_cache_scales(checkpoint, config, attention) if int8_cache else None
        plan = planner.rank(layout)
        sizes = _with_cache(sizes, planner, plan, ops, world)
        weights = load_weights(store, config, ops, attention, owned=owned, cache_scales=scales)
    with _ending_all(world, GenerationError):
        model = Model(config, ops, weights, attention)
        runner = Engine(model, RopeRows.of(tables, ops), ends, sizes, scales, world, graphs)
    return LanguageModel(directory, generation, runner, tokenizer, world)


def _ending_all(world: World | None, *alike: type[NpuqError]) -> AbstractContextManager[None]:
    return nullcontext() if world is None else world.ending_all(*alike)


def chosen_layout(parallel: str | None, planner: Planner, ranks: int) -> Layout:
    """The layout that `parallel` asks for; of "auto", the one that memory recommends.

    Raises BackendError for one that does not divide the model, and where none fits.
    """
    if parallel is None or (ranks == 1 and parallel == "auto"):
        return Layout()
    if parallel == "auto":
        return planner.choose(ranks).layout
    layout = Layout.parse(parallel, ranks)
    layout.check(planner.model.config)
    return layout


def _with_cache(sizes: EngineConfig, planner: Planner, plan: RankPlan, ops: Ops, world: World | None) -> EngineConfig:
    """The sizes with a cache that fits; where none is given, the same one on all ranks: that of the least memory.

    Raises BackendError where it does not fit.
    """
    if sizes.kv_cache_bytes is not None:
        planner.check(plan, engine_cache(planner, plan, sizes))
        return sizes
    free = free_memory(ops, 1) if world is None else world.least(free_memory(ops, world.launch.local_size))
    cache = engine_cache(planner, plan, sizes, free)
    if not planner.backend.on_device and cache < planner.most_cache(plan) and (world is None or world.leads):
        warnings.warn(
            f"free RAM allows a KV cache of {format_bytes(cache)}, {cache // plan.cache_token} tokens, and not "
            f"{format_bytes(planner.most_cache(plan))}; --cache-size (kv_cache_bytes) gives another",
            NpuqWarning,
            3,
        )
    return replace(sizes, kv_cache_bytes=cache)


def _memory(ops: Ops, world: World | None) -> int:
    """Bytes of memory of the rank that has least: all ranks choose the same layout."""
    if world is None:
        return rank_memory(ops, 1)
    return world.least(rank_memory(ops, world.launch.local_size))


def local_directory(path: str | Path) -> Path:
    """The directory of a model; `user/repo` is fetched from the hub."""
    if Path(path).exists():
        return Path(path)
    # The client is slow to import, and most models are directories.
    from ..hub import resolve

    return resolve(path)
