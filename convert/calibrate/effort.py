"""The effort of calibrated jobs, for an estimate of the time left, and of the time before a conversion starts.

A calibrated job costs a hundred times the share of its bytes, and the ratio differs between attention and experts:
bytes do not measure time. Products are counted here, in nanoseconds of one core of the machine where they were
measured. The time left follows from the pace so far; the time of a dry run from a product that it times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

import torch

from ...formats.schemes import Scheme
from ...models.roles import Role
from ...parallel.torch_threads import single_threaded_torch
from ...quant.arithmetic import Arithmetic
from ...quant.scales import Method
from ..plan.plan import Job
from ..plan.prepare import Prepared
from ..tally import data_free_effort
from .layers.experts import ENOUGH
from .layers.smooth import JUDGED_ROWS, STRENGTHS

# Nanoseconds for a multiply-add of large float32 products, and of attention's scores.
_PRODUCT, _ATTENDED = 0.0105, 0.05
# Multiply-adds for each weight and input of its linear, K · (N · K) in all: half of one for GPTQ, the outputs, the
# gradient and plain rounding each; sweeps cost little, since few codes move.
_REFINED = 2.3
# Multiply-adds for each cube of inputs: a Cholesky factor, its blocks, and the matrices copied.
_FACTORED = 0.28
# For each token and square of inputs: half of a Hessian, and its sum.
_SUMMED = 0.8


def calibrated_effort(prepared: Prepared) -> Callable[[Job], float]:
    """A function of a job: its effort in a calibrated conversion, walked or not."""
    config, calibration, specs = prepared.config, prepared.calibration, prepared.inventory.specs
    assert calibration is not None
    tokens = calibration.tokens.numel()
    routed = 0 if config.moe is None else max(min(ENOUGH, tokens), config.moe.tokens_of_expert(tokens))
    trials = (2 if prepared.recipe.auto else 0) + 1
    smoothed = len(STRENGTHS) + 1 if prepared.recipe.smooth else 0
    # Scores and values of one token against half of its sample, for both models.
    attended = 2 * tokens * calibration.sequence_length / 2 * config.attention.attended_products

    def effort(job: Job) -> float:
        if job.layer is None or job.layer >= config.num_hidden_layers or len(job.shape) != 2:
            return data_free_effort(job)
        rows, columns = job.rows, job.columns
        used = routed if job.role is Role.ROUTED_EXPERT else tokens
        products = 2 * used * rows * columns * _PRODUCT  # both models
        entry = specs[job.source].entry
        if entry is not None and "values" in entry.reads:
            products += 2 * attended * _ATTENDED
        if job.method is Method.GPTQ and job.scheme is not Scheme.FLOAT:
            # gate and up, q_a and kv_a have one Hessian together.
            shared = 0.5 if entry is not None and entry.fused is not None else 1.0
            products += shared * (_SUMMED * used + _FACTORED * columns) * columns**2 * _PRODUCT
            products += _REFINED * rows * columns**2 * _PRODUCT
        judged = min(used, JUDGED_ROWS) * rows * columns * _PRODUCT
        return trials * (products + data_free_effort(job) + smoothed * (data_free_effort(job) + judged))

    return effort


def expected_seconds(prepared: Prepared, arithmetic: Arithmetic, workers: int, done: Collection[int]) -> float:
    """Seconds that a calibrated conversion will take on this machine, but for the jobs `done`, by index."""
    effort = calibrated_effort(prepared)
    left = sum(effort(job) for job in prepared.plan.jobs if job.index not in done)
    return left * 1e-9 * _product_time(arithmetic) / _PRODUCT / workers


def _product_time(arithmetic: Arithmetic) -> float:
    """Nanoseconds of a multiply-add, the best of some small products."""
    rows, width = 256, 1024
    a, b = torch.ones(rows, width), torch.ones(width, width)
    times = []
    with single_threaded_torch():
        for _ in range(5):
            began = time.perf_counter()
            arithmetic.linear(a, b)
            times.append(time.perf_counter() - began)
    return 1e9 * min(times) / (rows * width * width)
