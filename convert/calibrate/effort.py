"""The effort of calibrated jobs relative to data-free ones, for an estimate of the time left.

A calibrated job costs a hundred to a thousand times the share of its bytes, and the ratio differs between attention and
experts: bytes do not measure time. Products are counted here, in nanoseconds of one core. Only ratios matter, since the
estimate follows from the pace so far.
"""

from __future__ import annotations

from collections.abc import Callable

from ...formats.schemes import Scheme
from ...models.roles import Role
from ...quant.refine import SWEEPS
from ...quant.scales import Method
from ..plan.plan import Job
from ..plan.prepare import Prepared
from ..tally import data_free_effort
from .layers.experts import ENOUGH
from .layers.smooth import JUDGED_ROWS, STRENGTHS

# Nanoseconds for a product and its sum, of large matrices.
_FLOAT32, _FLOAT64 = 0.03, 0.08
# Products for each weight and input of its linear, K · (N · K) in all: GPTQ takes half of one; each sweep of the
# refinement takes a gradient, the moves and a scale; the errors before, after and at the output take four more.
_REFINED = 0.5 + 3 * SWEEPS + 4
# Products for each cube of inputs: two Cholesky factors and an inverse.
_FACTORED = 0.7


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
        products = 2 * used * rows * columns * _FLOAT32  # both models
        entry = specs[job.source].entry
        if entry is not None and "values" in entry.reads:
            products += 2 * attended * _FLOAT32
        if job.method is Method.GPTQ and job.scheme is not Scheme.FLOAT:
            # gate and up, q_a and kv_a have one Hessian together.
            shared = 0.5 if entry is not None and entry.fused is not None else 1.0
            products += shared * (used * columns**2 * _FLOAT32 + _FACTORED * columns**3 * _FLOAT64)
            products += _REFINED * rows * columns**2 * _FLOAT64
        judged = min(used, JUDGED_ROWS) * rows * columns * _FLOAT32
        return trials * (products + data_free_effort(job) + smoothed * (data_free_effort(job) + judged))

    return effort
