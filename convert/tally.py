"""How far the jobs of a plan have come: told to whoever watches, with what each costs and the layers they complete."""

from __future__ import annotations

from collections.abc import Callable, Collection

from ..formats.schemes import Scheme
from ..progress import LayersLeft, Progress, Task
from ..quant.scales import Method
from .plan.plan import Job, Plan

# Nanoseconds of one core for a byte that is read, copied and hashed, and for a weight whose scale is searched, measured
# with the native kernels. Only their ratios matter.
_BYTE = 0.4
_WEIGHT = {Method.MINMAX: 0.3, Method.MSE: 1.4}


def data_free_effort(job: Job) -> float:
    """What a job costs that looks at its weight alone: nanoseconds of one core."""
    rounded = 0.0 if job.scheme is Scheme.FLOAT else _WEIGHT[job.method.scale_search] * job.rows * job.columns
    return _BYTE * job.source_bytes + rounded


class Tally:
    """Counts jobs as they end, for one thread."""

    def __init__(self, plan: Plan, progress: Progress, effort: Callable[[Job], float] = data_free_effort):
        self._plan = plan
        self._progress = progress
        self._effort = effort
        self._left = LayersLeft(job.layer for job in plan.jobs)

    def start(self, done: Collection[int]) -> None:
        """Say what there is to do, `done` jobs (by index) having been done by an earlier run."""
        jobs = self._plan.jobs
        for index in done:
            self._left.part_done(jobs[index].layer)
        self._progress.start(
            Task(
                "convert",
                self._plan.source_bytes,
                done=sum([jobs[index].source_bytes for index in done]),
                effort=sum([self._effort(job) for job in jobs]),
                effort_done=sum([self._effort(jobs[index]) for index in done]),
                layers=self._left.count,
                layers_done=self._left.done,
            )
        )

    def job_done(self, job: Job) -> None:
        """Say that one more job is done."""
        last = self._left.part_done(job.layer)
        self._progress.advance(job.source_bytes, effort=self._effort(job), layer=job.layer, layer_done=last)
