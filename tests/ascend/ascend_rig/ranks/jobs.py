"""Jobs of the pool: what ranks compute together, laid beside what one process computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.runtime.diagnostics.selftest import data
from npuq.runtime.ops import Gating, MoeWeights
from npuq.runtime.ops.ascend.operators import AscendOps
from npuq.runtime.ops.ascend.ranks.rules import MoeShape
from npuq.runtime.ranks.group import ALONE, Distributed, Group

from .. import guard
from ..mutants import Mutant
from ..recorder import Recorder
from ..schemas import Call
from . import mutations
from .chips import Chips, as_on_npus

A3 = Chips("A3")


@dataclass(frozen=True)
class Layer:
    """A layer of experts. mutation: of `mutations`. experts_of: those that tokens choose; all where it is empty."""

    scheme: Scheme = Scheme.W4A8
    chips: Chips = A3
    tokens: int = 13
    hidden: int = 1024
    experts: int = 16
    k: int = 4
    inner: int = 64
    mutation: str = ""
    experts_of: tuple[int, ...] = ()


@dataclass
class Outcome:
    """What a rank saw. rows: computed by its experts. launches: operators of the layer, by name."""

    exchange: str
    equal: bool
    rows: int
    launches: dict[str, int] = field(default_factory=dict)


def run_layer(layer: Layer) -> Outcome:
    """Run a layer of experts on this rank with the others, and alone; compare bit by bit."""
    with as_on_npus(layer.chips):
        alone, ops = _ops(layer, ALONE), _ops(layer, Distributed())
        inputs, whole, own = _inputs(layer), _weights(layer, alone, 1), _weights(layer, ops, dist.get_world_size())
        rows: list[Tensor] = []
        products = ops.products.grouped_matmul

        def counting(x: Any, experts: Any, group_list: Tensor) -> Tensor:
            rows.append(group_list)
            return products(x, experts, group_list)

        ops.products.grouped_matmul = counting  # type: ignore[method-assign]
        expected = alone.routing.moe_experts(*inputs[:3], whole, inputs[3])
        if layer.mutation:
            operator, change = mutations.of(layer.mutation)
            ops.npu.operators = Mutant(operator, change)
        shape = MoeShape(dist.get_world_size(), layer.experts, layer.hidden, layer.k)
        exchange = ops.routing.divided.exchange(layer.tokens, shape)
        with torch.inference_mode(), guard.watch() as watched:
            found = ops.routing.moe_experts(*inputs[:3], own, inputs[3])
        if layer.mutation:
            assert ops.npu.operators.changed, f"{layer.mutation}: the operator is never called"
        equal = found.shape == expected.shape and bool((found == expected).all())
        return Outcome(exchange.value, equal, int(rows[0].sum()), dict(watched.counts()))


def record_layer(layer: Layer) -> dict[str, Call]:
    """How the operators are called in a layer of experts."""
    with as_on_npus(layer.chips):
        ops, recorder = _ops(layer, Distributed()), Recorder()
        hidden, weights, ids, shared = _inputs(layer)
        own = _weights(layer, ops, dist.get_world_size())
        ops.npu.operators = recorder
        ops.routing.moe_experts(hidden, weights, ids, own, shared)
    return recorder.calls


def _ops(layer: Layer, group: Group) -> AscendOps:
    return AscendOps(device="cpu", dtype=torch.bfloat16, soc=layer.chips.soc, group=group)


def _inputs(layer: Layer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    chosen = torch.tensor(layer.experts_of or range(layer.experts), dtype=torch.int32)
    ids = torch.stack(
        [chosen[torch.randperm(len(chosen), generator=generator)[: layer.k]] for _ in range(layer.tokens)]
    )
    hidden, shared = (torch.randn(layer.tokens, layer.hidden, generator=generator).bfloat16() for _ in range(2))
    return hidden, torch.rand(layer.tokens, layer.k, generator=generator), ids, shared


def _weights(layer: Layer, ops: AscendOps, ranks: int) -> MoeWeights:
    each = layer.experts // ranks
    first = ops.group.rank * each

    def stacked(names: tuple[str, ...], outputs: int, inputs: int) -> Any:
        part: Callable[..., Any] = data.stored_part
        return ops.weights.experts_of(
            [
                [part(layer.scheme, outputs, inputs, seed=10 * expert + place) for place, _ in enumerate(names)]
                for expert in range(first, first + each)
            ]
        )

    weights = MoeWeights(
        router=ops.weights.router(torch.zeros(layer.experts, layer.hidden)),
        correction_bias=None,
        gating=Gating(layer.k, "sigmoid", renormalize=True),
        gate_up=stacked(("gate", "up"), layer.inner, layer.hidden),
        down=stacked(("down",), layer.hidden, layer.inner),
        num_experts=layer.experts,
        quantized=layer.scheme is not Scheme.FLOAT,
        ranks=ranks,
    )
    return ops.routing.moe_of(weights)  # fused experts are tried here, as when a model is loaded
