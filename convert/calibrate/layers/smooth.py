"""Smoothing strengths, each chosen by the measured error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

import torch
from torch import Tensor

from ....errors import CheckpointError
from ....formats.schemes import Scheme, dequantize, quantize_stored
from ....quant.scales import NonFiniteError
from ....quant.smoothing import smoothing_scale
from ....quant.stored_rows import StoredRows
from ...plan.plan import Job
from .linears import Linears
from .operators import Deployed, row_chunks

if TYPE_CHECKING:
    from ..ranks.pool import RankedPool

# Rows by whose largest activations the strength of a norm's or a dense block's smoothing is judged.
JUDGED_ROWS: Final = 2048
STRENGTHS = (0.3, 0.5, 0.7)
# The least relative gain in squared error that makes a strength worth a change.
GAIN = 0.98
# Rows rounded at a time: the working memory of the scale search is many times their size.
_ROWS = 512

Trial = TypeVar("Trial")

Change = Callable[[Tensor], dict[str, Tensor]]
"""A function of a scale [K]: the tensors that it changes, by name."""


def least(
    unchanged: Trial,
    trial: Callable[[float], Trial],
    error: Callable[[Trial], float],
    pool: RankedPool | None = None,
) -> tuple[float, Trial]:
    """The strength whose trial leaves the least squared error, and that trial; (0, `unchanged`) where no strength
    gains.

    pool: its ranks divide the trials, one at a time on each; None where the others do not take part.
    """

    def made(strength: float) -> Trial:
        return trial(strength) if strength else unchanged

    candidates = (0.0, *STRENGTHS)
    mine = [pool is None or pool.mine(index) for index in range(len(candidates))]
    errors = [error(made(strength)) if own else 0.0 for strength, own in zip(candidates, mine, strict=True)]
    if pool is not None:
        found = pool.of_all(errors)
        errors = [found[index % pool.size][index] for index in range(len(candidates))]
    best, strength = errors[0] * GAIN, 0.0
    for candidate, left in zip(STRENGTHS, errors[1:], strict=True):
        if left < best:
            best, strength = left, candidate
    return strength, made(strength)


def choose(
    activation: Tensor,
    tensors: dict[str, Tensor],
    readers: tuple[str, ...],
    change: Change,
    error: Callable[[dict[str, Tensor], tuple[str, ...]], float],
    pool: RankedPool,
    shared: tuple[int, int] = (1, 1),
) -> float:
    """Find the best strength, on all ranks of `pool`; make its change in `tensors`, and return it. Return 0 where none
    improves the error.

    activation: the largest magnitudes [K] of the readers' inputs. error: the squared error with some tensors changed
    and the readers rounded. shared: (heads of inputs that read the same values, channels of a head); `change` gets one
    scale for each channel of those values.
    """
    weight = torch.stack([tensors[name].abs().amax(0) for name in readers]).amax(0)
    activation, weight = (
        largest.view(-1, *shared).amax(1).flatten() if shared[0] > 1 else largest for largest in (activation, weight)
    )
    strength, changed = least(
        dict[str, Tensor](),
        lambda candidate: change(smoothing_scale(activation, weight, candidate)),
        lambda trial: error(trial, readers),
        pool,
    )
    tensors.update(changed)
    return strength


def spread(scale: Tensor, shared: tuple[int, int]) -> Tensor:
    """A scale for each channel of values as one for each input that reads them; `shared`: see `choose`."""
    repeat, width = shared
    return scale.view(-1, 1, width).expand(-1, repeat, width).flatten()


def rounded(job: Job, weight: Tensor) -> Tensor:
    """Round a weight float32 [N, K] to the job's scheme, data-free."""
    if job.scheme is Scheme.FLOAT:
        return weight
    base = Scheme.W8A8 if job.scheme is Scheme.W8A8_STATIC else job.scheme
    method, result = job.method.scale_search, torch.empty_like(weight)
    for part in row_chunks(weight.shape[0], _ROWS):
        try:
            rows = quantize_stored(StoredRows(weight[part]), base, method, row_parallel=False)
        except NonFiniteError as error:
            raise CheckpointError(
                f"tensor {job.source!r} outgrows float32 once it is smoothed; leave that out of the method"
            ) from error
        result[part] = dequantize(rows.tensors, base)
    return result


def deployed(job: Job, weight: Tensor) -> Deployed:
    """A linear as the job would leave it without calibration."""
    return Deployed(job.source, job.scheme, rounded(job, weight))


def norm_quotient(linears: Linears, norm: Job, gain: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A norm's gain [K] divided by `scale`, as far as its stored dtype can hold the quotient, and the matching factor
    for the columns of its readers: both float32."""
    smaller = linears.rounded(norm, gain.double() / scale).double()
    # A quotient that the dtype (float16, say) flushes to zero or cannot hold would silence its channel or spoil it.
    smaller = smaller.where((smaller != 0) & torch.isfinite(smaller), gain.double())
    factor = (gain.double() / smaller).where(smaller != 0, 1.0)
    return smaller.float(), factor.float()
