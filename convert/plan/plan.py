"""The plan of a conversion: every job, and the place of every output byte, decided before any work starts.

A job turns one source tensor into its output tensors. Because their dtypes and shapes follow from the plan alone, shard
headers are written first and jobs fill their slots in any order, from any worker: the bytes of the artifact depend on
neither the number of workers nor on interruptions, and resuming is a list of finished jobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from ...dtypes import ITEM_BYTES
from ...errors import ConversionError, RecipeError
from ...formats.artifact import shard_name
from ...formats.safetensors import encode_header
from ...formats.schemes import OutputTensor, Scheme, output_tensors
from ...formats.sources.weights import Weight
from ...models.inventory import Inventory
from ...models.roles import Role
from ...models.tensors import Spec
from ...quant.scales import Method
from .assignments import Assignment

# Bytes of one tensor's entry in a JSON header besides its name, dtype and dimensions: punctuation, keys and two offsets
# of up to 16 digits.
_ENTRY_BYTES = 80
# `encode_header`: 8 bytes of length, padding to 64, braces and our metadata.
_HEADER_BYTES = 160
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one output tensor: bytes [start, start + nbytes) of the shard with index `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    start: int
    nbytes: int

    @property
    def suffix(self) -> str:
        """The last part of the name (`weight_scale`), as `quantize_rows` names its results."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Job:
    """The conversion of one source tensor to its output tensors, all in one shard."""

    index: int
    source: str
    role: Role
    layer: int | None
    shape: tuple[int, ...]
    scheme: Scheme
    method: Method
    row_parallel: bool
    source_bytes: int
    outputs: tuple[Slot, ...]

    @property
    def output_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.outputs)

    @property
    def shard(self) -> int:
        return self.outputs[0].shard

    @property
    def span(self) -> tuple[int, int]:
        """The bytes [start, end) of the job's outputs in the shard."""
        return min(slot.start for slot in self.outputs), max(slot.start + slot.nbytes for slot in self.outputs)

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        """Elements in one row."""
        return prod(self.shape[1:])


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its complete header bytes, its final size and the jobs that fill it."""

    name: str
    header: bytes
    nbytes: int
    jobs: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The jobs in natural order of their source tensors, and the shards that they fill one after another."""

    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]

    @property
    def turns(self) -> list[Job]:
        """All jobs in the order of work: two neighbouring shards fill at the same time, at the same pace.

        Their digests then grow together, and two take hardly longer than one (`hashes.py`).
        """
        turns = []
        for first in range(0, len(self.shards), 2):
            pair = [(filled, job) for shard in self.shards[first : first + 2] for filled, job in self._filling(shard)]
            turns += [job for _, job in sorted(pair, key=lambda each: each[0])]  # stable
        return turns

    def _filling(self, shard: Shard) -> Iterator[tuple[int, Job]]:
        """A shard's jobs, each with the bytes of the jobs before it."""
        filled = 0
        for index in shard.jobs:
            yield filled, self.jobs[index]
            filled += self.jobs[index].output_bytes

    @property
    def source_bytes(self) -> int:
        return sum(job.source_bytes for job in self.jobs)

    @property
    def output_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job without places for its outputs."""

    spec: Spec
    weight: Weight
    assignment: Assignment
    outputs: tuple[tuple[OutputTensor, int], ...]  # each with its size in bytes


def build_plan(
    weights: Mapping[str, Weight],
    inventory: Inventory,
    assignments: Mapping[str, Assignment],
    max_shard_size: int,
    *,
    float16: bool = False,
) -> Plan:
    """Place every output tensor; `float16`: the model computes in that dtype.

    No shard exceeds `max_shard_size` bytes, header included, unless a single job's outputs do. Raises RecipeError for a
    weight whose shape its scheme cannot hold.
    """
    drafts = [_draft(spec, weights[name], assignments[name], float16) for name, spec in inventory.specs.items()]
    if not drafts:
        raise ConversionError("the checkpoint has no weights to convert")
    groups = list(_fill_shards(drafts, max_shard_size))
    jobs: list[Job] = []
    shards: list[Shard] = []
    for number, group in enumerate(groups):
        header, size, slots = _header_and_slots(number, group)
        first = len(jobs)
        jobs.extend(_job(first + offset, draft, slots) for offset, draft in enumerate(group))
        shards.append(Shard(shard_name(number + 1, len(groups)), header, size, tuple(range(first, len(jobs)))))
    return Plan(tuple(jobs), tuple(shards))


def _draft(spec: Spec, weight: Weight, assignment: Assignment, float16: bool) -> _Draft:
    return _Draft(spec, weight, assignment, _sized(_outputs(spec, assignment, weight, float16)))


def _outputs(spec: Spec, assignment: Assignment, weight: Weight, float16: bool) -> tuple[OutputTensor, ...]:
    if assignment.scheme is Scheme.FLOAT:
        code = spec.kept_dtype or weight.float_code
        return (OutputTensor(spec.name, code, spec.shape),)
    try:
        return output_tensors(spec.name, assignment.scheme, spec.shape, row_parallel=spec.row_parallel, float16=float16)
    except ValueError as error:
        raise RecipeError(f"{assignment.scheme.value} for {spec.name!r} {list(spec.shape)}: {error}") from error


def _fill_shards(drafts: Sequence[_Draft], max_shard_size: int) -> Iterable[list[_Draft]]:
    """Cut the jobs, in order, into shards of at most `max_shard_size` bytes; a larger job has a shard to itself."""
    group: list[_Draft] = []
    size = _HEADER_BYTES
    for draft in drafts:
        wanted = sum([_bound(output, size) for output, size in draft.outputs])
        if group and size + wanted > max_shard_size:
            yield group
            group, size = [], _HEADER_BYTES
        group.append(draft)
        size += wanted
    yield group


def _bound(output: OutputTensor, size: int) -> int:
    """An upper bound in bytes of a tensor's share of its shard: its data and its header entry."""
    # JSON escapes a quote in two bytes and a control character in six.
    name = len(output.name) * (2 if output.name.isascii() and output.name.isprintable() else 6)
    entry = name + len(output.dtype) + 21 * len(output.shape) + _ENTRY_BYTES
    return size + entry


def _header_and_slots(number: int, group: Sequence[_Draft]) -> tuple[bytes, int, dict[str, Slot]]:
    """The header, file size and slots of one shard: in job order, so that files fill from front to back.

    Every tensor is aligned to its item size, as memory-mapping readers need. Where an odd shape breaks that, all
    tensors of the shard are ordered by falling item size instead.
    """
    by_job = [output for draft in group for output in _falling(draft.outputs)]
    for outputs in (by_job, _falling(by_job)):
        header = encode_header([(output.name, output.dtype, output.shape) for output, _ in outputs], METADATA)
        slots, position = {}, len(header)
        for output, size in outputs:
            slots[output.name] = Slot(output.name, output.dtype, output.shape, number, position, size)
            position += size
        if all(slot.start % ITEM_BYTES[slot.dtype] == 0 for slot in slots.values()):
            break
    return header, position, slots


def _falling(outputs: Iterable[tuple[OutputTensor, int]]) -> list[tuple[OutputTensor, int]]:
    """Sort by falling item size, stably."""
    return sorted(outputs, key=lambda output: -ITEM_BYTES[output[0].dtype])


def _job(index: int, draft: _Draft, slots: Mapping[str, Slot]) -> Job:
    spec, weight = draft.spec, draft.weight
    return Job(
        index=index,
        source=spec.name,
        role=spec.role,
        layer=spec.layer,
        shape=tuple(weight.shape),
        scheme=draft.assignment.scheme,
        method=draft.assignment.method,
        row_parallel=spec.row_parallel,
        source_bytes=weight.nbytes,
        outputs=tuple(slots[output.name] for output, _ in draft.outputs),
    )


def _sized(outputs: Iterable[OutputTensor]) -> tuple[tuple[OutputTensor, int], ...]:
    return tuple([(output, prod(output.shape) * ITEM_BYTES[output.dtype]) for output in outputs])
