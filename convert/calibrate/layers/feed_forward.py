"""The feed-forward part of one layer: the dense block, or router, shared experts and every routed expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....models.family import Block
from ....quant.smoothing import smoothing_scale
from ....runtime.ops.reference.routing import router_scores
from ....runtime.weights import gating_of
from ...plan.plan import Job
from ..context import Layer
from ..states import StreamPair
from .experts import ExpertResult, choose_tokens, quantize_expert, smooth_inner
from .operators import float_mlp, mlp_weights, row_chunks
from .smooth import JUDGED_ROWS, STRENGTHS, deployed, least, norm_quotient

_PROJECTIONS = ("gate", "up", "down")
_NORM = Block.LAYER, "mlp_norm"


@dataclass(frozen=True)
class Routing:
    """Every token's experts in one stream: weights float32 [T, k], ids int32 [T, k]."""

    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class _Place:
    """A feed-forward block of the layer: the dense one, the shared experts, or a routed expert."""

    block: Block
    expert: int | None = None


@dataclass
class Coverage:
    """The reach of calibration: routed tokens of each expert, and the fallback of those with too few."""

    expert_tokens: list[int]
    fallbacks: dict[str, str]


def run_feed_forward(layer: Layer, middle: StreamPair, out: StreamPair) -> tuple[dict[str, float], Coverage]:
    """Quantize and write the feed-forward part, and compute both streams of the next layer from those between.

    Returns smoothing strengths by their place, and the calibration's coverage of the experts.
    """
    block = _FeedForward(layer, middle, out)
    return block.run()


class _FeedForward:
    def __init__(self, layer: Layer, middle: StreamPair, out: StreamPair):
        self._layer = layer
        self._walk = layer.walk
        self._middle = middle
        self._out = out
        self._parts = _joined(layer.walk.summed_batches)
        self._moe = layer.walk.config.moe_at(layer.index)
        # The config decides, as it does in engines, and not the checkpoint's other tensors.
        self._dense_blocks = [
            place for place in (_Place(Block.DENSE), _Place(Block.SHARED)) if layer.has(place.block, "down")
        ]
        self._gain = layer.weight(*_NORM)
        self._factor: Tensor | None = None
        self._strengths: dict[str, float] = {}

    def run(self) -> tuple[dict[str, float], Coverage]:
        if self._walk.smooth:
            self._smooth_norm()
        self._stored_gain = self._layer.keep(*_NORM, self._gain)
        before = self._middle
        for place in self._dense_blocks:
            self._dense(place, before)
            before = self._out
        if before is self._middle:
            self._copy()
        coverage = Coverage([], {}) if self._moe is None else self._experts()
        for rank, part in enumerate(self._parts):
            self._walk.pool.share(rank, self._out.floats[part])
            self._walk.pool.share(rank, self._out.quantized[part])
        return self._strengths, coverage

    def _copy(self) -> None:
        """Begin the sums of outputs with the states before."""
        part = self._parts[self._walk.pool.rank]
        self._out.floats[part] = self._middle.floats[part]
        self._out.quantized[part] = self._middle.quantized[part]

    def _normed(self, x: Tensor, gain: Tensor) -> Tensor:
        return self._walk.ops.norms.rms_norm(x, gain, self._walk.config.rms_norm_eps)

    def _block(self, place: _Place) -> list[Tensor]:
        """gate, up and down of a block, float32; gate and up multiplied by the factor that the norm's gain was divided
        by."""
        gate, up, down = (self._layer.weight(place.block, part, place.expert) for part in _PROJECTIONS)
        return [gate, up, down] if self._factor is None else [gate * self._factor, up * self._factor, down]

    def _jobs(self, place: _Place) -> tuple[Job, Job, Job]:
        gate, up, down = (self._layer.job(place.block, part, place.expert) for part in _PROJECTIONS)
        return gate, up, down

    def _expert_places(self) -> list[_Place]:
        return [
            _Place(Block.EXPERT, expert) for expert in range(0 if self._moe is None else self._moe.n_routed_experts)
        ]

    def _strength_name(self, place: _Place) -> str:
        """The report's name for smoothing within a block, or within all experts of the layer."""
        family = self._layer.tensors.family
        name = family.entry(place.block, "down").name.removesuffix(".weight")
        return name if place.expert is None else family.experts + name

    def _router(self) -> Tensor:
        weight = self._layer.weight(Block.ROUTER, "router")
        return weight if self._factor is None else weight * self._factor

    def _bias(self) -> Tensor | None:
        if not self._layer.has(Block.ROUTER, "router_bias"):
            return None
        return self._layer.weight(Block.ROUTER, "router_bias")

    def _dense(self, place: _Place, before: StreamPair) -> None:
        """Quantize a block, and add its outputs to the states `before`, on the tokens that this rank sums."""
        layer, walk, routing = self._layer, self._walk, self._walk.ops.routing
        weights, jobs = self._block(place), self._jobs(place)
        if walk.smooth:
            sample = self._normed(self._middle.floats[:JUDGED_ROWS], self._gain)
            self._strengths[self._strength_name(place)] = smooth_inner(routing, jobs, weights, sample, walk.pool)
        floats = float_mlp(weights)
        batches, stream = walk.batches, self._middle.quantized

        def inputs(index: int) -> Tensor:
            return self._normed(stream[batches[index]], self._stored_gain)

        gate, up = layer.quantize(jobs[:2], weights[:2], inputs)
        both = mlp_weights(gate, up, up)
        (down,) = layer.quantize(jobs[2:], weights[2:], lambda index: routing.mlp_inner(inputs(index), both))
        quantized = mlp_weights(gate, up, down)

        def step(part: slice) -> None:
            output = routing.mlp(self._normed(self._middle.floats[part], self._gain), floats)
            torch.add(before.floats[part], output, out=self._out.floats[part])
            output = routing.mlp(self._normed(stream[part], self._stored_gain), quantized)
            torch.add(before.quantized[part], output, out=self._out.quantized[part])

        for _ in walk.pool.begin(step, walk.summed_batches[walk.pool.rank]):
            pass

    def _experts(self) -> Coverage:
        layer, walk = self._layer, self._walk
        router = self._router()
        bias = self._bias()
        stored_router = layer.keep(Block.ROUTER, "router", router)
        stored_bias = None if bias is None else layer.keep(Block.ROUTER, "router_bias", bias)
        float_routing, _ = self._route(self._middle.floats, self._gain, router, bias)
        routing, order = self._route(self._middle.quantized, self._stored_gain, stored_router, stored_bias)
        places, middle = self._expert_places(), self._middle

        def one(expert: int) -> ExpertResult:
            tokens = choose_tokens(routing.ids, order, expert, walk.tokens)
            float_tokens = _tokens_of(float_routing, expert)
            return quantize_expert(
                layer,
                self._jobs(places[expert]),
                (
                    self._normed(middle.floats[float_tokens], self._gain),
                    self._normed(middle.quantized[tokens.own], self._stored_gain),
                ),
                self._normed(middle.quantized[tokens.near], self._stored_gain),
                self._block(places[expert]),
            )

        pool, coverage, strengths = walk.pool, Coverage([], {}), []
        own = pool.begin(one, [expert for expert in range(len(places)) if pool.mine(expert)])
        none = self._out.floats[:0]
        for first in range(0, len(places), pool.size):
            experts = range(first, min(first + pool.size, len(places)))
            result = next(own) if first + pool.rank in experts else None
            floats, quantized = (none, none) if result is None else (result.floats, result.quantized)
            self._add_outputs(self._out.floats, float_routing, experts, floats)
            self._add_outputs(self._out.quantized, routing, experts, quantized)
            told = None
            if result is not None:
                told = result.results, result.errors, result.fallback, result.strength
            for expert, found in zip(experts, pool.of_all(told), strict=False):
                assert found is not None
                results, errors, fallback, strength = found
                coverage.expert_tokens.append(_tokens_of(routing, expert).shape[0])
                if fallback is not None:
                    coverage.fallbacks[str(expert)] = fallback
                strengths.append(strength)
                layer.errors.update(errors)
                for job in self._jobs(places[expert]):
                    layer.ranks[job.index] = expert % pool.size
                    layer.finish(job, results[job.index])
        if walk.smooth:
            self._strengths[self._strength_name(places[0])] = sum(strengths) / len(strengths)
        return coverage

    def _add_outputs(self, stream: Tensor, routing: Routing, experts: range, rows: Tensor) -> None:
        """Add the outputs of one expert of each rank, weighted, to the tokens that this rank sums, in order of the
        experts. rows: those of this rank's expert, for all its tokens."""
        pool, parts = self._walk.pool, self._parts
        places = [_tokens_of(routing, expert) for expert in experts]
        places += [places[0][:0]] * (pool.size - len(places))  # the last experts are fewer than ranks
        part, found = parts[pool.rank], pool.exchange(rows, places, [part.stop for part in parts])
        for expert, place, part_rows in zip(experts, places, found, strict=False):
            _add_weighted(stream, routing, expert, place[(place >= part.start) & (place < part.stop)], part_rows)

    def _route(self, stream: Tensor, gain: Tensor, router: Tensor, bias: Tensor | None) -> tuple[Routing, Tensor]:
        """The routing of all tokens, and each token's experts by falling preference, int16 [T, E]."""
        assert self._moe is not None
        walk, rule, ops = self._walk, gating_of(self._moe), self._walk.ops
        handle = ops.weights.router(router)

        def step(part: slice) -> tuple[Tensor, Tensor, Tensor]:
            logits = ops.products.router_logits(self._normed(stream[part], gain), handle)
            weights, ids = ops.routing.moe_gating_top_k(logits, bias, rule)
            _, preference = router_scores(logits, bias, rule)
            return weights, ids, preference.argsort(dim=1, descending=True, stable=True).to(torch.int16)

        found = list(walk.pool.map(step, walk.batches))
        weights, ids, order = (torch.cat([part[index] for part in found]) for index in range(3))
        return Routing(weights, ids), order

    def _smooth_norm(self) -> None:
        """Choose the strength between the norm and all its readers, by the error at the layer's output."""
        walk, layer, mlp = self._walk, self._layer, self._walk.ops.routing.mlp
        maxima = walk.pool.map(
            lambda part: self._normed(self._middle.floats[part], self._gain).abs().amax(0), walk.batches
        )
        activation = torch.stack(list(maxima)).amax(0)
        places = [*self._dense_blocks, *self._expert_places()]
        columns = walk.pool.map(lambda place: torch.cat(self._block(place)[:2]).abs().amax(0), places)
        weight = torch.stack(list(columns)).amax(0)
        norm = layer.job(*_NORM)
        scales = [
            norm_quotient(walk.linears, norm, self._gain, smoothing_scale(activation, weight, strength))
            for strength in STRENGTHS
        ]
        trials = [(self._gain, torch.ones_like(self._gain)), *scales]
        x = self._middle.floats[walk.batches[0]]
        routing = None
        if self._moe is not None:
            routing, _ = self._route(self._middle.floats, self._gain, self._router(), self._bias())

        def differences(place: _Place) -> tuple[Tensor, list[Tensor]]:
            """The rows of x that a block works on, and its weighted errors with each trial's scale."""
            rows, factor = torch.arange(x.shape[0]), torch.ones(x.shape[0], 1)
            if place.expert is not None and routing is not None:
                chosen = (routing.ids[: x.shape[0]] == place.expert).nonzero()
                rows, factor = chosen[:, 0], routing.weights[chosen[:, 0], chosen[:, 1], None]
            weights, jobs = self._block(place), self._jobs(place)
            truth = mlp(self._normed(x[rows], self._gain), float_mlp(weights))
            found, down = [], deployed(jobs[2], weights[2])
            for gain, grown in trials:
                gate, up = (deployed(jobs[i], weights[i] * grown) for i in (0, 1))
                found.append(factor * (mlp(self._normed(x[rows], gain), mlp_weights(gate, up, down)) - truth))
            return rows, found

        totals = [torch.zeros_like(x) for _ in trials]
        for rows, found in walk.pool.map(differences, places):
            for total, part in zip(totals, found, strict=True):
                total.index_add_(0, rows, part)
        errors = [float(total.double().square().sum()) for total in totals]
        strength, best = least(0, lambda strength: 1 + STRENGTHS.index(strength), errors.__getitem__)
        self._strengths[layer.spec(*_NORM).module] = strength
        if best:
            self._gain, self._factor = trials[best]


def _joined(parts: list[list[slice]]) -> list[slice]:
    """The tokens of each list of neighbouring batches."""
    found, end = [], 0
    for batches in parts:
        start, end = end, batches[-1].stop if batches else end
        found.append(slice(start, end))
    return found


def _tokens_of(routing: Routing, expert: int) -> Tensor:
    """The tokens of an expert, int64 [n], rising."""
    return (routing.ids == expert).any(1).nonzero()[:, 0]


def _add_weighted(stream: Tensor, routing: Routing, expert: int, tokens: Tensor, rows: Tensor) -> None:
    """Add an expert's outputs, weighted by the router, to its tokens."""
    slots = (routing.ids[tokens] == expert).to(torch.int8).argmax(1)
    weights = routing.weights[tokens, slots]
    for part in row_chunks(tokens.shape[0]):
        stream[tokens[part]] += weights[part, None] * rows[part]
