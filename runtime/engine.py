"""Continuous batching: schedule, run the model, sample, until every sequence has finished."""

from __future__ import annotations

import time
from collections import abc
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor

from ..errors import GenerationError
from ..inputs.printable import shown
from .attention.pools import LayerCache
from .block_manager import BlockManager
from .engine_config import EngineConfig
from .graph.decode import DecodeGraphs
from .model import Model
from .ranks.world import World
from .sampling.grammar import Grammar
from .sampling.logprobs import TokenLogprobs, rows_logprobs
from .sampling.params import SamplingParams
from .sampling.rows import LogitRow
from .sampling.sampler import NotFiniteError
from .scheduler import Scheduled, Scheduler
from .sequence import Sequence
from .step import Chunk, RopeRows, StepBuilder
from .step_budget import StepBudget


@dataclass(frozen=True)
class StepOutput:
    """Result of a step for one sequence: its next token, or None and the error that ended it.

    The sequence's finish_reason is set when this was its last token.
    """

    sequence: Sequence
    token: int | None
    error: GenerationError | None = None
    logprobs: TokenLogprobs | None = None


class Engine:
    """Continuous batching over one model and one paged cache.

    context: limit of a sequence's tokens, prompt and completion together. cache_tokens, cache_bytes: what the cache of
    this process holds, without spare blocks. eos_ids: end-of-sequence tokens.
    cache_scales: for each layer, float32 `[channels]` by pool; those pools of the cache are int8. world: the ranks that
    run the model; None for this process alone. All ranks make the same engine, and that of rank 0 leads the steps.
    use_graphs: run decode steps as captured graphs, where the backend has them; `graphs` then is set.
    """

    def __init__(
        self,
        model: Model,
        rope: RopeRows,
        eos_ids: frozenset[int],
        config: EngineConfig,
        cache_scales: abc.Sequence[abc.Mapping[str, Tensor]] | None = None,
        world: World | None = None,
        use_graphs: bool = True,
    ):
        self.model = model
        self.config = config
        # Files may name others, of any size; the model never gives them.
        self.eos_ids = frozenset(token for token in eos_ids if 0 <= token < model.config.vocab_size)
        self._int8_cache = cache_scales is not None
        layers = range(model.config.num_hidden_layers)
        scales = cache_scales or [{} for _ in layers]
        pools = [model.attention.pools(layer) for layer in layers]
        caches = model.ops.caches
        stored = [caches.stored(own, scale) for own, scale in zip(pools, scales, strict=True)]
        block_bytes = sum(pool.block_bytes(config.block_tokens) for pool in chain.from_iterable(stored))
        num_blocks = _num_blocks(block_bytes, rope.max_position, config)
        if world is not None:
            num_blocks = world.least(num_blocks)
        self.cache_tokens = num_blocks * config.block_tokens
        self.cache_bytes = num_blocks * block_bytes
        self.context = min(rope.max_position, self.cache_tokens)
        # With an int8 cache a token alone rounds its query: two of a prompt stay together.
        computed = 2 if self._int8_cache else 1
        self.blocks = BlockManager(num_blocks, config.block_tokens, reuse=config.prefix_cache, computed=computed)
        self._cache = tuple(
            caches.new(own, num_blocks, config.block_tokens, scale) for own, scale in zip(pools, scales, strict=True)
        )
        self._dense_tokens = model.attention.dense_tokens
        # With an int8 cache absorbed form rounds queries, which prompts should not notice.
        absorbs = model.ops.mla.absorbs_chunks and not self._int8_cache
        self._absorbed_tokens = model.attention.absorbed_tokens if absorbs else 0
        self._builder = StepBuilder(
            model.ops,
            rope,
            config.block_tokens,
            config.prefix_segment_tokens,
            self._dense_tokens,
            model.attention.continues_on_pages,
        )
        self.graphs = self._capture() if use_graphs else None
        self._world, self._number = world, 0 if world is None else world.add(self._run_alone)
        self.budget = StepBudget(config.max_num_batched_tokens, config.step_seconds, config.block_tokens)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, self.budget)

    def sequence(
        self,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        stop_ids: frozenset[int] = frozenset(),
        choice: int = 0,
        grammar: Grammar | None = None,
        salt: bytes = b"",
        leader: Sequence | None = None,
    ) -> Sequence:
        """Make a sequence of a prompt, for `queue`. It changes nothing, and may be called while a step runs.

        stop_ids: tokens that end it, beside those of `params` and the model's end-of-sequence tokens. choice: its
        number among the sequences of its prompt, which draw different random numbers. grammar: of its completion. salt:
        it shares cache blocks with sequences of the same salt alone. leader: the first choice of its prompt, behind
        which it enters, to take its blocks. Raises GenerationError for a prompt that is empty, holds no token ids, or
        leaves no room to generate, and for parameters with ids outside the vocabulary.
        """
        check_token_ids(prompt, self.model.config.vocab_size)
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if ids and max(ids) >= self.model.config.vocab_size:
                raise GenerationError(
                    f"{name} {shown(max(ids))} is outside the model's vocabulary of {self.model.config.vocab_size}"
                )
        if len(prompt) >= self.context:
            raise GenerationError(
                f"the prompt has {len(prompt)} tokens and the context is {self.context}; shorten it"
                + (", or raise kv_cache_bytes" if self.context < self.model.config.max_position_embeddings else "")
            )
        stop_ids = stop_ids.union(params.stop_token_ids, () if params.ignore_eos else self.eos_ids)
        if not self.config.prefix_cache or len(prompt) <= self.config.block_tokens:
            leader = None  # it has no block to give
        return Sequence.start(prompt, params, self.context, stop_ids, choice, grammar, salt, leader)

    def queue(self, sequence: Sequence) -> None:
        """Take a sequence into the next steps."""
        self.scheduler.add(sequence)

    def add(self, prompt: abc.Sequence[int], params: SamplingParams) -> Sequence:
        """Make a sequence and queue it."""
        sequence = self.sequence(prompt, params)
        self.queue(sequence)
        return sequence

    @property
    def builder(self) -> StepBuilder:
        """The builder of its steps."""
        return self._builder

    @property
    def cache(self) -> tuple[LayerCache, ...]:
        """The paged cache, by layer."""
        return self._cache

    def step(self) -> list[StepOutput]:
        """Run one step: results of the sequences whose next token was due. Without any sequence nothing runs.

        A sequence without a token to choose ends with an error; the others go on.
        """
        started = time.perf_counter()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            return []
        chunks = [
            Chunk(
                work.sequence.tokens[work.sequence.num_cached : work.sequence.num_cached + work.count],
                work.sequence.num_cached,
                work.sequence.blocks,
                last_row=work.samples,
                all_rows=len(work.sequence.unscored(work.count)) > 0,
                absorbed=self._is_absorbed(work),
            )
            for work in scheduled
        ]
        logits, order = self._run(chunks)
        ordered = [scheduled[index] for index in order]
        sampling = [work.sequence for work in ordered if work.samples]
        with self.model.ops.one_thread():
            if any(chunk.all_rows for chunk in chunks):
                logits = _score_prompts(ordered, logits)
            rows = self.model.ops.logit_rows(logits)
            outputs = [_sample(sequence, row) for sequence, row in zip(sampling, rows, strict=True)]
        self._advance(ordered, time.perf_counter() - started)
        for output in outputs:
            if isinstance(output.error, NotFiniteError):  # what made them so may stand in the cache
                self.blocks.forget()
            self._append(output)
        return outputs

    def _is_absorbed(self, work: Scheduled) -> bool:
        """True for tokens that attend to the cache alone: few behind others, and those that are judged as `logits`."""
        if self._int8_cache and work.sequence.unscored(work.count):
            return True
        return work.sequence.num_cached > 0 and work.count <= self._absorbed_tokens

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence (at a stop string, or cancelled by its caller) and free its blocks."""
        if sequence.finish_reason is None:
            sequence.finish_reason = reason
            self.scheduler.finish(sequence)

    def reset(self, sequences: abc.Iterable[Sequence]) -> None:
        """Forget all sequences, which the caller lists, and free all blocks, also after an interrupted step."""
        for sequence in sequences:
            sequence.blocks, sequence.keys = [], []
            sequence.finish_reason = sequence.finish_reason or "cancelled"
        self.scheduler.reset()
        self.blocks.reset()

    def logits(self, sequences: abc.Sequence[abc.Sequence[int]]) -> abc.Iterator[Tensor]:
        """Logits of every token of each sequence, compute dtype `[T, vocab]`, several sequences a step.

        With an int8 cache every token attends to codes, its own included, as a generated token does.
        Raises GenerationError for a sequence that is empty, out of vocabulary, or longer than the context.
        """
        for tokens in sequences:
            check_token_ids(tokens, self.model.config.vocab_size)
            if len(tokens) > self.context:
                raise GenerationError(f"{len(tokens)} tokens are more than the context of {self.context}")
        batch: list[abc.Sequence[int]] = []
        for tokens in sequences:
            if batch and not self._fits_a_step([*batch, tokens]):
                yield from self._logits_of_batch(batch)
                batch = []
            if len(tokens) > self.config.max_num_batched_tokens:
                yield self._logits_by_chunks(tokens)
            else:
                batch.append(tokens)
        if batch:
            yield from self._logits_of_batch(batch)

    def _fits_a_step(self, batch: abc.Sequence[abc.Sequence[int]]) -> bool:
        blocks = sum(self.blocks.blocks_for(len(tokens)) for tokens in batch)
        if self._reads_cache(batch) and blocks > self.blocks.num_free:
            return False
        return sum(map(len, batch)) <= self.config.max_num_batched_tokens

    def _reads_cache(self, batch: abc.Sequence[abc.Sequence[int]]) -> bool:
        """True if whole sequences in one step need a cache: to judge an int8 one, or to select tokens in it."""
        longest = max(len(tokens) for tokens in batch)
        return self._int8_cache or (self._dense_tokens is not None and longest > self._dense_tokens)

    def _logits_of_batch(self, batch: abc.Sequence[abc.Sequence[int]]) -> abc.Iterator[Tensor]:
        cached = self._reads_cache(batch)
        blocks = self._take_blocks([len(tokens) if cached else 0 for tokens in batch])
        try:
            logits, order = self._run(
                [
                    Chunk(tokens, 0, own, all_rows=True, absorbed=self._int8_cache)
                    for tokens, own in zip(batch, blocks, strict=True)
                ]
            )
        finally:
            for own in blocks:
                self.blocks.release(own)
        parts = dict(zip(order, logits.split([len(batch[index]) for index in order]), strict=True))
        yield from (parts[index] for index in range(len(batch)))

    def _logits_by_chunks(self, tokens: abc.Sequence[int]) -> Tensor:
        (blocks,) = self._take_blocks([len(tokens)])
        size = self.config.max_num_batched_tokens
        try:
            chunks = [
                Chunk(tokens[start : start + size], start, blocks, all_rows=True, absorbed=self._int8_cache)
                for start in range(0, len(tokens), size)
            ]
            return torch.cat([self._run([chunk])[0] for chunk in chunks])
        finally:
            self.blocks.release(blocks)

    def _take_blocks(self, lengths: abc.Sequence[int]) -> list[list[int]]:
        """Allocate blocks for sequences of these lengths, or raise GenerationError while others hold too many."""
        counts = [self.blocks.blocks_for(length) for length in lengths]
        blocks = self.blocks.allocate(sum(counts))
        if blocks is None:
            raise GenerationError("the cache is in use; finish what is being generated before asking for logits")
        taken = iter(blocks)
        return [list(islice(taken, count)) for count in counts]

    def _run(self, chunks: abc.Sequence[Chunk]) -> tuple[Tensor, list[int]]:
        return self._run_alone(chunks) if self._world is None else self._world.lead(self._number, chunks)

    def _run_alone(self, chunks: abc.Sequence[Chunk]) -> tuple[Tensor, list[int]]:
        """Run a step's chunks on this rank: (logits, order of the chunks in them)."""
        if self.graphs is not None and (logits := self.graphs.run(chunks)) is not None:
            return logits, list(range(len(chunks)))
        return self.run_eagerly(chunks)

    def run_eagerly(self, chunks: abc.Sequence[Chunk]) -> tuple[Tensor, list[int]]:
        """Run a step's operators one by one, on this rank: as `_run_alone`."""
        step, order = self._builder.build(chunks)
        return self.model.forward(step, self._cache), order

    def _capture(self) -> DecodeGraphs | None:
        ops = self.model.ops
        if ops.graphs is None or ops.group.size > 1:  # no exchange between ranks is captured
            return None
        return DecodeGraphs(
            self.model,
            ops.graphs,
            self._cache,
            self._builder,
            self.config.max_num_seqs,
            table_width=-(-self.context // self.config.block_tokens),
            spare_block=self.blocks.num_blocks,
        )

    def _advance(self, scheduled: abc.Sequence[Scheduled], seconds: float) -> None:
        decodes = sum(work.sequence.is_decoding for work in scheduled)
        prefill = sum(work.count for work in scheduled if not work.sequence.is_decoding)
        self.budget.measured(prefill, decodes, seconds)
        for work in scheduled:
            if work.sequence.is_decoding:
                work.sequence.decode_seconds += seconds
            else:
                work.sequence.prefill_seconds += seconds
            work.sequence.num_cached += work.count
            self.blocks.commit(work.sequence)

    def _append(self, output: StepOutput) -> None:
        sequence = output.sequence
        if output.token is None:
            self.finish(sequence, "error")
            return
        sequence.tokens.append(output.token)
        if output.token in sequence.stop_ids:
            self.finish(sequence, "stop")
        elif len(sequence.tokens) >= sequence.max_tokens:
            self.finish(sequence, "length")


def check_token_ids(tokens: abc.Sequence[int], vocabulary: int) -> None:
    """Raise GenerationError for an empty sequence, and for ids outside a vocabulary of that size."""
    if not tokens:
        raise GenerationError("the prompt is empty: it has no tokens to continue")
    wrong = min(tokens) if min(tokens) < 0 else max(tokens)
    if not 0 <= wrong < vocabulary:
        named = wrong if abs(wrong) < 1 << 63 else "of more than 63 bits"  # it may be too long to be written
        raise GenerationError(
            f"token id {named} is outside the model's vocabulary of {vocabulary}; does the tokenizer belong to this "
            "model?"
        )


def _score_prompts(scheduled: abc.Sequence[Scheduled], logits: Tensor) -> Tensor:
    """Give sequences the log-probabilities of their prompts. Returns the rows of `logits` that are sampled."""
    scored = [work.sequence.unscored(work.count) for work in scheduled]
    counts = [work.count if places else int(work.samples) for work, places in zip(scheduled, scored, strict=True)]
    kept = []
    for work, places, rows in zip(scheduled, scored, logits.split(counts), strict=True):
        sequence = work.sequence
        if places:
            assert sequence.prompt_logprobs is not None
            assert sequence.params.prompt_logprobs is not None
            first = places.start - 1 - sequence.num_cached
            tokens = sequence.tokens[places.start : places.stop]
            judged = rows[first : first + len(places)]
            sequence.prompt_logprobs += rows_logprobs(judged, tokens, sequence.params.prompt_logprobs)
        kept.append(rows[len(rows) - work.samples :])
    return torch.cat(kept)


def _sample(sequence: Sequence, logits: LogitRow) -> StepOutput:
    try:
        sampled = sequence.sampler.next_token(logits, sequence.tokens)
    except GenerationError as error:
        return StepOutput(sequence, None, error)
    return StepOutput(sequence, sampled.token, logprobs=sampled.logprobs)


def _num_blocks(block_bytes: int, max_position: int, config: EngineConfig) -> int:
    """Number of blocks that fit in the memory, at most as many as all sequences can fill.

    block_bytes: of a block in all layers.
    """
    assert config.kv_cache_bytes is not None, "`load` chooses it"
    affordable = config.kv_cache_bytes // block_bytes
    if affordable < 1:
        raise GenerationError(
            f"kv_cache_bytes {config.kv_cache_bytes} holds no block; one of {config.block_tokens} tokens takes "
            f"{block_bytes}: give the cache (--cache-size) at least that"
        )
    return min(affordable, config.max_num_seqs * -(-max_position // config.block_tokens))
