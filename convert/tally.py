"""Progress of a plan's jobs: the cost of each, and the layers that they complete."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..formats.schemes import Scheme
from ..native.library import library
from ..progress import LayersLeft, Progress, Task
from ..quant.scales import Method
from .plan.plan import Job, Plan

# Nanoseconds of one core: for reading, copying and hashing a byte, and for searching the scale of a weight; measured
# with the native kernels. Without them everything takes about so many times as long.
_TORCH = 40
_BYTE = 0.4
_WEIGHT = {Method.MINMAX: 0.3, Method.MSE: 1.4}


def data_free_effort(job: Job) -> float:
    """The cost of a job without calibration: nanoseconds of one core."""
    rounded = 0.0 if job.scheme is Scheme.FLOAT else _WEIGHT[job.method.scale_search] * job.rows * job.columns
    return _BYTE * job.source_bytes + rounded


def data_free_seconds(effort: float) -> float:
    """Seconds of one core for a sum of `data_free_effort`, about: as fast as the machine that was measured."""
    return effort * 1e-9 * (1 if library() is not None else _TORCH)


class Tally:
    """Counts jobs of a plan as they end, for one thread. jobs: those of this process."""

    def __init__(self, plan: Plan, jobs: Collection[Job], progress: Progress, effort: Callable[[Job], float]):
        self._plan = plan
        self._jobs = jobs
        self._progress = progress
        self._effort = effort
        self._left = LayersLeft(job.layer for job in jobs)

    def task(self, done: Collection[int]) -> Task:
        """The task of these jobs; the jobs `done` (by index) were finished by an earlier run. Call it once."""
        jobs = self._plan.jobs
        for index in done:
            self._left.part_done(jobs[index].layer)
        return Task(
            "convert",
            sum([job.source_bytes for job in self._jobs]),
            done=sum([jobs[index].source_bytes for index in done]),
            effort=sum([self._effort(job) for job in self._jobs]),
            effort_done=sum([self._effort(jobs[index]) for index in done]),
            layers=self._left.count,
            layers_done=self._left.done,
        )

    def job_done(self, job: Job) -> None:
        """Advance the task by one job."""
        last = self._left.part_done(job.layer)
        self._progress.advance(job.source_bytes, effort=self._effort(job), layer=job.layer, layer_done=last)
