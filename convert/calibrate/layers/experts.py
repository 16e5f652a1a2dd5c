"""One expert at a time: gate and up on the tokens routed to it, then down on their outputs.

An expert that calibration hardly reaches is helped, depending on the number of its tokens:
  none              data-free: the scale search of `mse`, no Hessian ("data-free");
  fewer than ENOUGH the tokens for which the router would choose it next are added until there are ENOUGH ("blended");
  ENOUGH or more    its own tokens alone.
A Hessian that cannot be factored at any damping leaves that linear to the data-free method ("data-free").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....formats.schemes import Scheme
from ....quant.hessian import Hessian
from ....quant.scales import Method
from ....quant.smoothing import smoothing_scale
from ....runtime.ops import MlpWeights
from ...plan.plan import Job
from ..context import Layer
from .linears import JobResult, factored
from .operators import CalibrationRouting, Deployed, float_mlp, mlp_weights, round_inputs, row_chunks
from .smooth import deployed, least

if TYPE_CHECKING:
    from ..ranks.pool import RankedPool

ENOUGH = 512
# Rows on which smoothing strengths are judged.
_JUDGED = 512


@dataclass(frozen=True)
class Routed:
    """The tokens of one expert: `own` int64 [n] are routed to it, `near` [m] would be next."""

    own: Tensor
    near: Tensor


@dataclass(frozen=True)
class ExpertResult:
    """The result of an expert: outputs float32 of its own tokens in both streams, and its fallback and smoothing
    strength."""

    floats: Tensor
    quantized: Tensor
    results: Mapping[int, JobResult]
    errors: Mapping[str, float]
    fallback: str | None
    strength: float


def choose_tokens(expert_ids: Tensor, order: Tensor, expert: int, count: int) -> Routed:
    """The tokens of an expert: expert_ids int [T, k]; order int [T, E], each token's experts by falling preference.

    `near` tokens are those that rank the expert highest beyond the k, the earlier token first among equals.
    """
    own = (expert_ids == expert).any(1).nonzero()[:, 0]
    missing = min(ENOUGH, count) - own.shape[0]
    if missing <= 0 or not own.shape[0]:
        return Routed(own, own[:0])
    rank = (order == expert).to(torch.int8).argmax(1)
    rank[own] = order.shape[1]
    near = rank.argsort(stable=True)[:missing]
    return Routed(own, near[rank[near] < order.shape[1]].sort().values)


def quantize_expert(
    layer: Layer, jobs: tuple[Job, Job, Job], own: tuple[Tensor, Tensor], near: Tensor, weights: list[Tensor]
) -> ExpertResult:
    """Quantize gate, up and down (`weights` float32, in that order; the list is emptied) of one expert and write them.

    own: its tokens' inputs float32 [n, H] in the float stream (routed by the float model) and in the quantized one;
    near: further inputs of the quantized stream to calibrate on.
    """
    floats, quantized = own
    inline, linears = layer.walk.pool.inline, layer.walk.expert_linears
    inputs = torch.cat([quantized, near]) if near.shape[0] else quantized
    routing = layer.walk.ops.routing
    truth = routing.mlp(floats, float_mlp(weights))
    strength = smooth_inner(routing, jobs, weights, inputs) if layer.walk.smooth and inputs.shape[0] else 0.0
    gate_w, up_w, down_w = weights
    weights.clear()
    results: dict[int, JobResult] = {}
    errors: dict[str, float] = {}
    missed = False

    def calibrated(some: Sequence[tuple[Job, Tensor]], x: Tensor) -> list[Deployed]:
        nonlocal missed
        hessian = None
        if any(job.method is Method.GPTQ and job.scheme is not Scheme.FLOAT for job, _ in some):
            hessian = Hessian(x.shape[1], linears.arithmetic)
            for part in row_chunks(x.shape[0]):
                hessian.add(round_inputs(x[part], some[0][0].scheme, None), inline)
        factor = factored(hessian, linears.arithmetic, inline)
        missed |= hessian is not None and factor is None
        found = []
        for job, weight in some:
            linear, results[job.index] = linears.quantize(job, weight, hessian, factor, None, inline)
            if linear.error is not None:
                errors[job.source] = linear.error
            found.append(linear)
        return found

    gate, up = calibrated([(jobs[0], gate_w), (jobs[1], up_w)], inputs)
    inner = _inner(routing, mlp_weights(gate, up, up), inputs) if inputs.shape[0] else down_w[:0]
    (down,) = calibrated([(jobs[2], down_w)], inner)
    fallback = "data-free" if missed else "blended" if near.shape[0] else None
    # The first inputs are its own tokens'.
    outputs = [routing.products.linear(inner[part], down) for part in row_chunks(quantized.shape[0])]
    return ExpertResult(truth, torch.cat(outputs or [quantized]), results, errors, fallback, strength)


def _inner(routing: CalibrationRouting, block: MlpWeights, x: Tensor) -> Tensor:
    """The inputs of `down` for inputs float32 [T, H] of the block."""
    return torch.cat([routing.mlp_inner(x[part], block) for part in row_chunks(x.shape[0])])


def smooth_inner(
    routing: CalibrationRouting,
    jobs: tuple[Job, Job, Job],
    weights: list[Tensor],
    inputs: Tensor,
    pool: RankedPool | None = None,
) -> float:
    """Rescale the channels between up and down, by the strength of least error at the block's output.

    weights: gate, up and down, whose last two are replaced; inputs float32 [T, H]. pool: see `least`. Returns the
    strength, 0 for none.
    """
    block = float_mlp(weights)
    inner = _inner(routing, block, inputs)
    activation, weight = inner.abs().amax(0), weights[2].abs().amax(0)
    x = inputs[:_JUDGED]
    truth = routing.mlp(x, block)
    gate = deployed(jobs[0], weights[0])

    def rescaled(candidate: float) -> tuple[Tensor, Tensor]:
        scale = smoothing_scale(activation, weight, candidate)
        return (weights[1].double() / scale[:, None]).float(), (weights[2].double() * scale).float()

    def error(trial: tuple[Tensor, Tensor]) -> float:
        up, down = map(deployed, jobs[1:], trial)
        return float((routing.mlp(x, mlp_weights(gate, up, down)) - truth).double().square().sum())

    strength, weights[1:] = least((weights[1], weights[2]), rescaled, error, pool)
    return strength
