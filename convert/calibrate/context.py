"""The context of a walk: the state that all layers share, and the weights and results of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from ...formats.sources.weights import Weight, WeightSource, not_finite
from ...models.config import ModelConfig
from ...models.family import Block
from ...models.rope import RopeTables
from ...models.tensors import ModelTensors, Spec
from ...runtime.attention.kind import AttentionKind
from ...runtime.ops import Ops
from ...runtime.step import RopeRows
from ..plan.plan import Job
from ..write.journal import JobEntry
from .layers.linears import Inputs, JobResult, Linears, factored, measure
from .layers.operators import CalibrationOps, Deployed, is_finite
from .ranks.pool import RankedPool
from .states import Selections

# Tokens that one step of the forward pass takes, in whole samples; fixed, so that results depend on nothing else.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Walk:
    """The model, its calibration tokens and the means to work on it.

    attention: as samples of this length run it. dense: without selection of tokens; its cache holds latents in int8.
    selections: what layers hand on, where attention selects tokens. pool: over all ranks. linears: writes what every
    rank computes; expert_linears: what one does.
    """

    config: ModelConfig
    attention: AttentionKind
    dense: AttentionKind
    selections: Selections | None
    rope: RopeRows
    ops: CalibrationOps
    source: WeightSource
    jobs: dict[str, Job]
    linears: Linears
    expert_linears: Linears
    pool: RankedPool
    samples: int
    sequence_length: int
    smooth: bool
    done: Callable[[Job], None]

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length

    @property
    def batches(self) -> list[slice]:
        """Token ranges of whole samples."""
        size = max(1, BATCH_TOKENS // self.sequence_length) * self.sequence_length
        return [slice(start, min(start + size, self.tokens)) for start in range(0, self.tokens, size)]

    @property
    def summed_batches(self) -> list[list[slice]]:
        """The batches whose feed-forward outputs each rank sums: neighbours, and none where ranks are more."""
        batches, size = self.batches, self.pool.size
        bounds = [len(batches) * rank // size for rank in range(size + 1)]
        return [batches[first:end] for first, end in pairwise(bounds)]


class Layer:
    """One decoder layer of a walk: its weights as float32, and the results of its jobs.

    `read` has the digest of the bytes that each job of the layer reads, by index; None in a trial. `entries` collects
    the journal's entry of each job, `errors` the relative output error of each quantized linear, `ranks` the rank that
    wrote a job where only one computed it.
    """

    def __init__(self, walk: Walk, index: int, read: Mapping[int, bytes] | None = None):
        self.walk = walk
        self.index = index
        self.tensors = ModelTensors(walk.config)
        self.entries: dict[int, JobEntry] = {}
        self._read = read
        self.errors: dict[str, float] = {}
        self.ranks: dict[int, int] = {}

    def has(self, block: Block, part: str) -> bool:
        """True where the layer has a part. The config decides, as it does in engines, and not the checkpoint's other
        tensors, except where the config leaves it open."""
        if not self.tensors.has(block, part, self.index):
            return False
        spec = self.spec(block, part)
        return not spec.optional or spec.name in self.walk.jobs

    def spec(self, block: Block, part: str, expert: int | None = None) -> Spec:
        """The specification of a part's tensor."""
        return self.tensors.spec(block, part, self.index, expert)

    def job(self, block: Block, part: str, expert: int | None = None) -> Job:
        """The job of a part."""
        return self.walk.jobs[self.spec(block, part, expert).name]

    def weight(self, block: Block, part: str, expert: int | None = None) -> Tensor:
        """A tensor as float32, rewritten where the conversion rewrites the model. Raises CheckpointError for an
        infinity or NaN in it."""
        name = self.spec(block, part, expert).name
        weight = self.walk.source.weights[name]
        tensor = weight.rows().to_float32()
        check_finite(weight, tensor)
        return tensor

    def keep(self, block: Block, part: str, tensor: Tensor) -> Tensor:
        """Write a tensor that stays float; return the values that engines will read, as float32."""
        job = self.job(block, part)
        stored, written = self.walk.linears.float(job, tensor)
        self.finish(job, written)
        return stored

    def finish(self, job: Job, written: JobResult) -> None:
        """Count a job as written; a trial writes none."""
        if self._read is not None:
            self.entries[job.index] = JobEntry(written.stats, self._read[job.index], written.digest)
        self.walk.done(job)

    def quantize(self, jobs: Sequence[Job], weights: Sequence[Tensor], inputs: Inputs) -> list[Deployed]:
        """Quantize linears that share their inputs on all batches, in the order given."""
        walk, mapper = self.walk, self.walk.pool
        # Inputs are rounded by the scheme: linears of one scheme share one Hessian.
        groups = {job.scheme: [other for other in jobs if other.scheme is job.scheme] for job in jobs}
        measured = {}
        for scheme, members in groups.items():
            hessian, scale = measure(members, inputs, range(len(walk.batches)), walk.linears.arithmetic, mapper)
            found = factored(hessian, walk.linears.arithmetic, mapper.local, divided=mapper)
            measured[scheme] = hessian, found, scale
        deployed = []
        for job, weight in zip(jobs, weights, strict=True):
            linear, written = walk.linears.quantize(job, weight, *measured[job.scheme], mapper)
            self.note_error(job, linear)
            self.finish(job, written)
            deployed.append(linear)
        return deployed

    def note_error(self, job: Job, linear: Deployed) -> None:
        if linear.error is not None:
            self.errors[job.source] = linear.error


def rope_rows(tables: RopeTables, length: int, ops: Ops) -> RopeRows:
    """The first `length` rows of the rope tables: samples have no more positions."""
    return RopeRows.of(replace(tables, cos=tables.cos[:length], sin=tables.sin[:length]), ops)


def check_finite(weight: Weight, tensor: Tensor) -> None:
    """Raise CheckpointError for an infinity or NaN in rows of a weight."""
    if not is_finite(tensor):
        raise not_finite(weight)
