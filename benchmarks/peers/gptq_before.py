"""The calibrated rounding that npuq had before, in float64: what `benchmarks/calibrate.py --before` compares with.

GPTQ by the upper Cholesky factor of the inverse (Frantar et al., 2022), then two sweeps of coordinate descent over all
codes, each followed by the best scale.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

_BLOCK = 64


def before(weight: Tensor, inputs: Tensor, scale: Tensor, bits: int) -> tuple[float, float, float]:
    """The squared relative output error of a weight float32 [N, K] on inputs float32 [T, K], and CPU seconds: of the
    Hessian and its factor, and of the rows."""
    began = time.process_time()
    hessian = (inputs.T @ inputs).double()
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    damped = hessian.clone()
    damped.diagonal().add_(0.01 * float(diagonal.mean()))
    lower = torch.linalg.cholesky(damped[order][:, order])
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    factored = time.process_time()
    codes = _greedy(weight, upper, order, scale, bits)
    codes, found = _refine(weight, damped, codes, scale, bits)
    bound = 2 ** (bits - 1)
    rounded = (weight / scale[:, None]).round().clamp(-bound, bound - 1).double()
    worse = _errors(weight, damped, codes, found) > _errors(weight, damped, rounded, scale)
    codes[worse], found[worse] = rounded[worse], scale[worse].double()
    lost = _errors(weight, hessian, codes, found).sum()
    whole = _errors(weight, hessian, torch.zeros_like(codes), found).sum()
    return float(lost / whole), factored - began, time.process_time() - factored


def _errors(weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    difference = weight.double() - codes * scale.double()[:, None]
    return ((difference @ hessian) * difference).sum(1)


def _greedy(weight: Tensor, upper: Tensor, order: Tensor, scale: Tensor, bits: int) -> Tensor:
    bound, step = 2 ** (bits - 1), scale.double()
    rest = weight.double()[:, order].T.contiguous()
    codes, columns = torch.empty_like(rest), rest.shape[0]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, rest.shape[1], dtype=torch.float64)
        for j in range(start, end):
            codes[j] = (rest[j] / step).round_().clamp_(-bound, bound - 1)
            errors[j - start] = (rest[j] - codes[j] * step) / upper[j, j]
            rest[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
        rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    result = torch.empty_like(weight, dtype=torch.float64)
    result[:, order] = codes.T
    return result


def _refine(weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    bound, step, diagonal = 2 ** (bits - 1), scale.double(), hessian.diagonal()
    columns, found = weight.double().T.contiguous(), codes.T.contiguous()
    for _ in range(2):
        gradient = hessian @ (columns - found * step)
        for start in range(0, columns.shape[0], _BLOCK):
            end = min(start + _BLOCK, columns.shape[0])
            part, moved = gradient[start:end], torch.zeros(end - start, columns.shape[1], dtype=torch.float64)
            for j in range(end - start):
                column = start + j
                best = (found[column] + part[j] / (diagonal[column] * step)).round_().clamp_(-bound, bound - 1)
                moved[j] = (found[column] - best) * step
                found[column] = best
                part.addr_(hessian[start:end, column], moved[j])
            gradient[:start].addmm_(hessian[:start, start:end], moved)
            gradient[end:].addmm_(hessian[end:, start:end], moved)
        product = hessian @ found
        step = (product * columns).sum(0) / (product * found).sum(0)
    return found.T.contiguous(), step
