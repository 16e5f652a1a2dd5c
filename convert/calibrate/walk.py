"""The walk: every decoder layer in order, from the embedding on, each journaled and its hidden states kept."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...dtypes import torch_dtype
from ...errors import CalibrationError, RankError
from ...formats.artifact import OWN_FOLDER
from ...formats.digests import source_digest
from ...formats.output_files import write_error
from ...formats.schemes import Scheme
from ...models.family import Block
from ...models.roles import Role
from ...models.rope import rope_tables
from ...parallel.pool import Pool
from ...parallel.torch_threads import single_threaded_torch
from ...quant.weight_error import added
from ...runtime.attention.kinds import attention_of, dense_attention_of
from ...runtime.ranks.group import ALONE, Group
from ..plan.memory import Budget
from ..plan.plan import Job
from ..plan.prepare import Prepared
from ..tally import Tally
from ..write.journal import JobEntry, Journal
from ..write.shards import ShardFiles
from ..write.worker import run_job
from ..write.workspace import Workspace
from .auto import TimeBudget, run_trials
from .context import Layer, Walk, check_finite, rope_rows
from .devices import arithmetic_on
from .layer_report import Choice, LayerReport
from .layers.attention import run_attention
from .layers.feed_forward import run_feed_forward
from .layers.linears import Linears
from .layers.operators import CalibrationOps, is_finite, row_chunks
from .ranks.pool import RankedPool
from .ranks.staging import Staging
from .states import FOLDER, State, StateStore, StreamPair, Streams
from .texts import Calibration

_CHUNK_ELEMENTS = 1 << 20


class CalibratedWalk:
    """Converts every tensor of the decoder layers. An interrupted walk continues after the last layer that it kept.

    group: the ranks that walk together. Rank 0 has the journal and the tally, and writes shards and hidden states; the
    others have neither, and stage what they quantize.
    """

    def __init__(
        self,
        prepared: Prepared,
        calibration: Calibration,
        files: ShardFiles,
        journal: Journal | None,
        output: Path,
        budget: Budget,
        tally: Tally | None,
        group: Group = ALONE,
    ):
        self._prepared = prepared
        self._calibration = calibration
        self._files = files
        self._journal = journal
        self._budget = budget
        self._tally = tally
        self._arithmetic = arithmetic_on(prepared.device)
        self._folder = output / OWN_FOLDER / FOLDER
        self._time = TimeBudget(prepared.time_budget)
        self._group = group
        self._store = StateStore(self._folder, calibration.tokens.numel(), prepared.config.hidden_size, group.rank)
        self._staging = Staging(self._folder, prepared.plan)
        self._start = self._loaded()

    def _loaded(self) -> tuple[State, Streams] | None:
        """The state of an interrupted walk, if it belongs to this one."""
        found = self._store.load()
        if found is None:
            return None
        names = {job.source for job in self._prepared.plan.jobs if job.scheme is not Scheme.FLOAT}
        width = self._prepared.config.attention.cache_scales
        ours = all(
            (0 if report.kv_cache is None else report.kv_cache.scale.numel()) == width
            and names.issuperset(report.linear_errors)
            for report in found[0].reports
        )
        return found if ours else None

    def forget_unvouched(self) -> None:
        """Remove from the journal's record the layers that will be walked: all from the first one that is incomplete,
        or without hidden states."""
        assert self._journal is not None
        record, layers = self._journal.record, self._layers()
        missing = [layer for layer, jobs in layers.items() if any(job not in record.jobs for job in jobs)]
        first = min(missing, default=len(layers))
        if self._start is None or self._start[0].layer > first:
            # A layer without hidden states: the walk begins at the layer that they come from.
            self._start, first = None, 0
        else:
            first = self._start[0].layer
        for layer, jobs in layers.items():
            if layer >= first:
                for job in jobs:
                    record.jobs.pop(job, None)
                    record.hashes.pop(self._prepared.plan.jobs[job].shard, None)

    @property
    def kept_jobs(self) -> set[int]:
        """The jobs that the remaining ones build on: those of the layers walked already, and of the embedding."""
        if self._start is None:
            return set()
        walked = range(self._start[0].layer)
        return {job.index for job in self._prepared.plan.jobs if job.layer in walked or job.role is Role.EMBEDDING}

    def run(self) -> tuple[LayerReport, ...]:
        """Walk all layers; return the report of each. Afterwards the journal has all jobs of the decoder layers.

        Raises CalibrationError for infinite or NaN activations, ConversionError when the disk refuses.
        """
        calibration, config, arithmetic = self._calibration, self._prepared.config, self._arithmetic
        ops = CalibrationOps(arithmetic)
        try:
            staged = self._files if self._leads else self._staging.files(self._group.rank)
        except OSError as error:
            raise write_error(self._folder, error) from error
        tables, topk = rope_tables(config), calibration.selected(config)
        try:
            with Pool(self._budget.workers) as pool, single_threaded_torch():
                self._begin_together(RankedPool(pool, self._group))
                walk = Walk(
                    config=config,
                    attention=(attention_of if topk else dense_attention_of)(config, tables.softmax_scale),
                    dense=dense_attention_of(config, tables.softmax_scale),
                    selections=self._store.selections(topk) if topk else None,
                    rope=rope_rows(tables, calibration.sequence_length, ops),
                    ops=ops,
                    source=self._prepared.source,
                    jobs={job.source: job for job in self._prepared.plan.jobs},
                    linears=Linears(self._files if self._leads else None, arithmetic),
                    expert_linears=Linears(staged, arithmetic),
                    pool=RankedPool(pool, self._group),
                    samples=calibration.samples,
                    sequence_length=calibration.sequence_length,
                    smooth=self._prepared.recipe.smooth,
                    done=self._job_done,
                )
                return self._run(walk, staged)
        except OSError as error:
            raise write_error(self._folder, error) from error
        finally:
            if not self._leads:
                staged.close()

    @property
    def _leads(self) -> bool:
        return self._group.rank == 0

    def _job_done(self, job: Job) -> None:
        if self._tally is not None:
            self._tally.job_done(job)

    def _begin_together(self, pool: RankedPool) -> None:
        """Let all ranks begin at the layer where rank 0 does. Raises RankError for one that does not find its state."""
        layer = pool.from_first(0 if self._start is None else self._start[0].layer)
        if layer == 0:
            self._start = None
        found = pool.of_all(0 if self._start is None else self._start[0].layer)
        if lost := [rank for rank, other in enumerate(found) if other != layer]:
            raise RankError(
                f"rank {lost[0]} does not find the hidden states before layer {layer}, which rank 0 has in "
                f"{self._folder}: give all ranks the same output, on a file system that they share"
            )

    def _layers(self) -> dict[int, list[int]]:
        """The indices of the jobs of each decoder layer."""
        layers: dict[int, list[int]] = {layer: [] for layer in range(self._prepared.config.num_hidden_layers)}
        for job in self._prepared.plan.jobs:
            if job.layer in layers:
                layers[job.layer].append(job.index)
        return layers

    def _run(self, walk: Walk, staged: ShardFiles) -> tuple[LayerReport, ...]:
        if self._leads:
            self._convert_embedding(walk)
        if self._start is None:
            state, streams = State(), _embedded(walk, self._calibration.tokens, self._store)
        else:
            state, streams = self._start
        middle = self._store.scratch()
        while state.layer < walk.config.num_hidden_layers:
            out = self._store.new(state.layer + 1)
            # Before any other reader of the layer: `source_digest` gives the reason.
            jobs = [job for job in self._prepared.plan.jobs if job.layer == state.layer]
            digests = walk.pool.gathered(lambda job: source_digest(walk.source, job.source), jobs)
            read = {job.index: digest for job, digest in zip(jobs, digests, strict=True)}
            smooth, choice = walk.smooth, None
            if self._prepared.recipe.auto:
                choice = self._choose(walk, state.layer, (streams, middle, out))
                smooth = choice.smooth
            began = time.monotonic()
            layer = Layer(replace(walk, smooth=smooth), state.layer, read)
            report = replace(_run_layer(layer, streams, middle, out), choice=choice)
            self._time.layer_took(time.monotonic() - began)
            state = State((*state.reports, report))
            if not self._leads:
                streams = self._follow(walk.pool, staged, self._store.carry(out, streams))
                continue
            self._collect(layer, walk.pool)
            self._convert_rest(layer, jobs)
            self._files.sync(sorted({job.shard for job in jobs}))
            assert self._journal is not None
            self._journal.append(layer.entries, {})
            if walk.selections is not None and walk.config.attention.takes_selection(state.layer):
                # Selections are not kept: a later run starts at the layer that makes them.
                streams = self._store.carry(out, streams)
            else:
                streams = self._store.publish(out, state, streams)
            self._group.barrier()
        return state.reports

    def _follow(self, pool: RankedPool, staged: ShardFiles, streams: Streams) -> Streams:
        """After a layer, on the other ranks: give rank 0 the staged weights, and wait until it has copied them."""
        shards = staged.written
        staged.sync(shards)
        staged.close()  # file systems show what was written once the file is closed
        self._group.barrier()
        self._group.barrier()
        self._staging.clear(pool.rank)
        return streams

    def _collect(self, layer: Layer, pool: RankedPool) -> None:
        """After a layer, on rank 0: copy the weights that the others have staged."""
        self._group.barrier()
        staged = {job: rank for job, rank in layer.ranks.items() if rank}
        self._staging.copy(staged, layer.entries, self._files, pool.local)

    def _choose(self, walk: Walk, index: int, streams: tuple[Streams, Streams, Streams]) -> Choice:
        """Choose whether a layer is smoothed, by trials, which overwrite the last two streams."""
        if not walk.pool.from_first(self._time.allows_trials(walk.config.num_hidden_layers - index)):
            return Choice(walk.smooth, None)
        began = time.monotonic()

        def run(trial: Walk, start: StreamPair, middle: StreamPair, out: StreamPair) -> float:
            return _run_layer(Layer(trial, index), start, middle, out).output_error

        trials = run_trials(walk, *streams, run)
        self._time.trial_took(time.monotonic() - began)
        return Choice(trials.prefer_smoothing, trials)

    def _convert_embedding(self, walk: Walk) -> None:
        """Convert the embedding first, so that the journal records the one that the hidden states came from."""
        job = walk.jobs[_embedding_of(walk)]
        assert self._journal is not None
        if job.index not in self._journal.record.jobs:
            entry = self._convert(job)
            self._files.sync([job.shard])
            self._journal.append({job.index: entry}, {})

    def _convert_rest(self, layer: Layer, jobs: Sequence[Job]) -> None:
        """Convert the layer's tensors that the walk does not use: those unknown to the architecture."""
        for job in jobs:
            if job.index not in layer.entries:
                layer.entries[job.index] = self._convert(job)

    def _convert(self, job: Job) -> JobEntry:
        """Convert one job by itself."""
        entry = run_job(job, self._prepared.source, self._files, Workspace(_CHUNK_ELEMENTS), threading.Event()).entry
        self._job_done(job)
        return entry


def _run_layer(layer: Layer, streams: StreamPair, middle: StreamPair, out: StreamPair) -> LayerReport:
    """Quantize one layer; return its report."""
    pool = layer.walk.pool
    strengths, kv_cache = run_attention(layer, streams, middle)
    _check_finite(pool, middle, layer.index, "attention")
    more, coverage = run_feed_forward(layer, middle, out)
    _check_finite(pool, out, layer.index, "feed-forward part")
    return LayerReport(
        expert_tokens=tuple(coverage.expert_tokens),
        fallbacks=coverage.fallbacks,
        output_error=_relative(pool, out),
        linear_errors=layer.errors,
        kv_cache=kv_cache,
        smoothing=strengths | more if layer.walk.smooth else None,
    )


def _embedding_of(walk: Walk) -> str:
    return walk.config.name(Block.TOP, "embedding")


def _embedded(walk: Walk, tokens: Tensor, store: StateStore) -> Streams:
    """The streams before the first layer: rows of the embedding, exact and as stored."""
    streams = store.new(0)
    name = _embedding_of(walk)
    dtype = torch_dtype(walk.jobs[name].outputs[0].dtype)
    for part in row_chunks(tokens.numel()):
        used, place = tokens.flatten()[part].unique(return_inverse=True)
        rows = torch.cat([walk.source.rows_float32(name, int(token), int(token) + 1) for token in used])
        check_finite(walk.source.weights[name], rows)
        torch.index_select(rows, 0, place, out=streams.floats[part])
        torch.index_select(rows.to(dtype).float(), 0, place, out=streams.quantized[part])
    return streams


def _check_finite(pool: RankedPool, streams: StreamPair, layer: int, part: str) -> None:
    def finite(chunk: slice) -> tuple[bool, bool]:
        return is_finite(streams.floats[chunk]), is_finite(streams.quantized[chunk])

    found = pool.gathered(finite, row_chunks(streams.floats.shape[0]))
    for index, name in enumerate(("the float model", "the quantized model")):
        if not all(chunk[index] for chunk in found):
            raise CalibrationError(
                f"layer {layer}: the {part} of {name} gives activations that are no numbers; the checkpoint is "
                "damaged, or its config.json is another model's"
            )


def _relative(pool: RankedPool, streams: StreamPair) -> float:
    """The relative error ‖quantized − float‖ / ‖float‖ of the hidden states after a layer."""

    def squares(part: slice) -> tuple[float, float]:
        lost = (streams.quantized[part] - streams.floats[part]).double().square_().sum()
        return float(lost), float(streams.floats[part].double().square_().sum())

    found = pool.gathered(squares, row_chunks(streams.floats.shape[0]))
    # In this order, whatever the number of ranks.
    lost, norm = added(lost for lost, _ in found), added(norm for _, norm in found)
    return math.sqrt(lost / norm) if norm else 0.0
