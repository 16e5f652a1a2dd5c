"""Comparison of a backend with the reference, operator by operator, on small random data: run it first on a new NPU.

A case builds its inputs with the backend's own operators (weight layouts included) and returns tensors. Errors are
relative to the largest value; int8 codes may differ by one, for quotients on a rounding tie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.kv_cache import storable_scale
from ...formats.schemes import Scheme, quantize_rows
from ...formats.static_w8a8 import input_scale_of, quantize_static
from ...inputs.printable import error_line
from ...quant.scales import Method
from ..attention.pools import LayerCache, Pool
from ..ops import (
    Activation,
    Decode,
    Gating,
    IndexerConfig,
    IndexerParts,
    Keys,
    Lengths,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MoeWeights,
    Ops,
    Positions,
    Quantized,
    Queries,
    Static,
    Step,
)
from ..ops.reference import ReferenceOps
from ..ops.sparse_attention import INDEX_KEY

TOKENS, HIDDEN, INNER, HEADS, EXPERTS, TOP_K, BLOCK = 6, 256, 128, 4, 8, 2, 128
WIDE = 18432  # outputs of gate and up in a dense layer of DeepSeek-V3
LATENT, ROPE, HEAD = 512, 64, 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 2e-2}
EPS = 1e-6
INDEX_HEADS, INDEX_HEAD = 16, 128
POOLS = (Pool("latent", LATENT, int8=True), Pool("rope", ROPE))
SPARSE_POOLS = tuple(
    Pool(name, channels, layout="nd")
    for name, channels in (("latent", LATENT), ("rope", ROPE), (INDEX_KEY, INDEX_HEAD))
)
SCALE = (HEAD + ROPE) ** -0.5
DIVISION = (slice(0, 96), slice(96, HIDDEN))  # columns of two ranks

Case = Callable[[Ops], tuple[Activation, ...]]


@dataclass(frozen=True)
class Result:
    """Result of one operator. error: relative to the largest reference value. message: set if the operator failed.

    findings: what its case showed of the device besides (`Ops.findings`).
    """

    operator: str
    error: float | None
    tolerance: float
    message: str = ""
    findings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def selftest(ops: Ops) -> Iterator[Result]:
    """Run every case that `ops` supports, on `ops` and on the reference in the same compute dtype."""
    reference = ReferenceOps(ops.dtype)
    tolerance = TOLERANCE[ops.dtype]
    known: list[str] = []
    for name, case in cases_of(ops).items():
        try:
            ours = case(ops)
        except (BackendError, RuntimeError, TypeError) as error:
            yield Result(name, None, tolerance, error_line(error, 300))
            continue
        theirs = case(reference)
        fresh = [finding for finding in ops.findings() if finding not in known]
        known += fresh
        yield Result(name, max(map(_error, ours, theirs)), tolerance, findings=tuple(fresh))


def cases_of(ops: Ops) -> dict[str, Case]:
    """Cases of a backend in its settings; those of an int8 cache only where the backend has one."""
    return {name: case for name, case in CASES.items() if ops.caches.takes_int8 or name not in INT8_CACHE_CASES}


def _error(ours: Activation, theirs: Activation) -> float:
    """Greatest difference over the greatest magnitude; infinite for unequal shapes and values not finite."""
    if isinstance(ours, Quantized) and isinstance(theirs, Quantized):
        off = (ours.codes.cpu().int() - theirs.codes.int()).abs()
        ties_only = bool(off.max() <= 1) and float(off.float().mean()) < 0.02
        return _error(ours.scale, theirs.scale) if ties_only else float("inf")
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    a, b = ours.cpu().double(), theirs.double()
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rows(ops: Ops, *shape: int, seed: int = 0) -> Tensor:
    """Random activations in the compute dtype, on the device."""
    return _random(*shape, seed=seed).to(ops.dtype).to(ops.device)


def _weight(outputs: int, inputs: int, seed: int) -> Tensor:
    return _random(outputs, inputs, seed=seed).div(inputs**0.5).bfloat16()


def _part(scheme: Scheme, outputs: int, inputs: int, seed: int, name: str = "selftest") -> LinearPart:
    weight = _weight(outputs, inputs, seed)
    if scheme is Scheme.FLOAT:
        return LinearPart(name, scheme, weight)
    if scheme is Scheme.W8A8_STATIC:
        stored = quantize_static(weight.float(), -3.0, 4.0, Method.MINMAX).tensors
        static = Static(input_scale_of(stored), stored["deq_scale"], stored["quant_bias"])
        return LinearPart(name, scheme, stored["weight"], static=static)
    stored = quantize_rows(weight.float(), scheme, Method.MINMAX, row_parallel=False).tensors
    return LinearPart(name, scheme, stored["weight"], stored["weight_scale"], stored.get("scale_bias"))


def _tables(ops: Ops, tokens: int) -> tuple[Tensor, Tensor]:
    angles = _random(tokens, ROPE // 2, seed=90).repeat(1, 2)
    return angles.cos().to(ops.dtype).to(ops.device), angles.sin().to(ops.dtype).to(ops.device)


def _gamma(ops: Ops, width: int) -> Tensor:
    return ops.weights.parameter(1 + 0.1 * _random(width, seed=91), ops.dtype)


def _cache(ops: Ops) -> LayerCache:
    return ops.caches.new(POOLS, 4, BLOCK)


def _written(ops: Ops, tokens: int, first_block: int) -> LayerCache:
    """Cache with `tokens` tokens, from the start of a block on."""
    cache = _cache(ops)
    slots = torch.arange(tokens, device=ops.device) + first_block * BLOCK
    kv = _rows(ops, tokens, LATENT + ROPE, seed=92)
    positions = Positions(slots, *_tables(ops, tokens))
    ops.mla.kv_rmsnorm_rope_cache(kv, _gamma(ops, LATENT), EPS, positions, cache, output_kv=False)
    return cache


def _blocks(ops: Ops, *blocks: int) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int32).to(ops.device)


def _norms(ops: Ops) -> tuple[Activation, ...]:
    x, residual, gamma = _rows(ops, TOKENS, HIDDEN), _rows(ops, TOKENS, HIDDEN, seed=1), _gamma(ops, HIDDEN)
    return ops.norms.rms_norm(x, gamma, EPS), *ops.norms.add_rms_norm(x, residual, gamma, EPS)


def _layer_norm(ops: Ops) -> tuple[Activation, ...]:
    gamma, bias = (ops.weights.parameter(_random(HIDDEN, seed=seed), torch.float32) for seed in (31, 32))
    return (ops.norms.layer_norm(_rows(ops, TOKENS, HIDDEN), gamma, bias, EPS),)


def _wide_swiglu(ops: Ops) -> tuple[Activation, ...]:
    """Values, not codes: a backend may round them to the compute dtype on the way, which moves large codes by one."""
    codes, scale = ops.norms.dequant_swiglu_quant(_rows(ops, 2, 2 * WIDE))
    return (codes.float() * scale[:, None],)


def _linear(scheme: Scheme) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        fused = [_part(scheme, outputs, HIDDEN, seed=outputs) for outputs in (INNER, 2 * INNER)]
        return (ops.products.linear(_rows(ops, TOKENS, HIDDEN), ops.weights.linear_of(fused)),)

    return case


def _divided_linear(scheme: Scheme) -> Case:
    """Multiply by a linear whose inputs two ranks would divide; beside it, 1 where that is the whole product's bits."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        rows, whole = _rows(ops, TOKENS, HIDDEN), _part(scheme, INNER, HIDDEN, seed=INNER)
        expected = ops.products.linear(rows, ops.weights.linear_of([whole]))
        largest, sums, scale = ops.norms.row_maximum(rows), None, None
        for columns in DIVISION:
            part = ops.weights.linear_of([replace(whole, weight=whole.weight[:, columns].contiguous())])
            own = rows[:, columns].contiguous()
            if scheme is Scheme.W8A8_STATIC:
                codes = ops.products.static_quant(own, part)
            else:
                codes, scale = ops.norms.dynamic_quant_by(own, largest)
            product = ops.products.integer_sums(codes, part)
            sums = product if sums is None else sums + product
        assert sums is not None
        out = ops.products.scale_sums(sums, scale, part)
        return out, (out == expected).to(ops.dtype)

    return case


def _divided_swiglu(ops: Ops) -> tuple[Activation, ...]:
    """Quantize activated rows that two ranks would divide; beside them, 1 where those of whole rows are the same."""
    gate_up = _rows(ops, TOKENS, 2 * HIDDEN)
    expected = ops.norms.dequant_swiglu_quant(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    activated = [ops.norms.swiglu_float32(torch.cat([gate[:, own], up[:, own]], dim=-1)) for own in DIVISION]
    largest = torch.stack([ops.norms.row_maximum(part) for part in activated]).amax(0)
    parts = [ops.norms.swiglu_quant_by(part, largest) for part in activated]
    codes, scale = torch.cat([part.codes for part in parts], dim=-1), parts[0].scale
    same = (codes == expected.codes).to(ops.dtype), (scale == expected.scale).to(ops.dtype)
    return Quantized(codes, scale), *same


def _grouped(scheme: Scheme) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        experts = ops.weights.experts_of(
            [[_part(scheme, INNER, HIDDEN, seed=10 * e + side) for side in (0, 1)] for e in range(EXPERTS)]
        )
        rows: Activation = _rows(ops, 2 * EXPERTS, HIDDEN)
        counts = torch.tensor([3, 0, 2, 1, 4, 0, 5, 1]).to(ops.device)
        quantized = rows if scheme is Scheme.FLOAT else ops.norms.dynamic_quant(_rows(ops, 2 * EXPERTS, HIDDEN))
        return (ops.products.grouped_matmul(quantized, experts, counts),)

    return case


def _experts_inner(scheme: Scheme) -> Case:
    """Values of gate and up with their activation, which a backend may do in one operator that rounds codes twice."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        gate_up, down = (
            ops.weights.experts_of(
                [[_part(scheme, outputs, inputs, seed=10 * e + side) for side in sides] for e in range(EXPERTS)]
            )
            for outputs, inputs, sides in ((INNER, HIDDEN, (0, 1)), (HIDDEN, INNER, (2,)))
        )
        router = ops.weights.router(_weight(EXPERTS, HIDDEN, seed=5))
        weights = ops.routing.moe_of(MoeWeights(router, None, Gating(2, "softmax"), gate_up, down, EXPERTS, True))
        counts = torch.tensor([3, 0, 2, 1, 4, 0, 5, 1]).to(ops.device)
        rows = ops.norms.dynamic_quant(_rows(ops, 2 * EXPERTS, HIDDEN))
        inner = ops.routing.experts_inner(rows, counts, weights)
        assert isinstance(inner, Quantized)
        return (inner.codes.float() * inner.scale[:, None],)

    return case


def _gating(gating: Gating, biased: bool) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        bias = ops.weights.parameter(0.1 * _random(4 * EXPERTS, seed=3), torch.float32) if biased else None
        return ops.routing.moe_gating_top_k(_random(TOKENS, 4 * EXPERTS, seed=4).to(ops.device), bias, gating)

    return case


def _routing(quantize: bool) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        ids = ids.to(torch.int32).to(ops.device)
        rows, index, counts = ops.routing.moe_init_routing(_rows(ops, TOKENS, HIDDEN), ids, EXPERTS, quantize)
        weights = _random(TOKENS, TOP_K, seed=6).abs().to(ops.device)
        back = _rows(ops, TOKENS * TOP_K, HIDDEN, seed=7)
        out = ops.routing.moe_finalize_routing(back, weights, index, ids, _rows(ops, TOKENS, HIDDEN, seed=8))
        return rows, index, counts, out

    return case


def _rope_and_cache(ops: Ops) -> tuple[Activation, ...]:
    cos, sin = _tables(ops, TOKENS)
    rotated = ops.rotary.interleave_rope(_rows(ops, TOKENS, HEADS, ROPE, seed=9), cos, sin)
    return rotated, *ops.caches.gather(_written(ops, TOKENS, first_block=2), _blocks(ops, 2), TOKENS).values()


def _ragged_attention(nope: int, value: int) -> Case:
    """Attention over decompressed keys of `nope` + ROPE channels and values of `value`, merged with another one."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        tokens, lengths = 9, (1, 4, 9)
        q, k = (_rows(ops, tokens, HEADS, nope, seed=seed) for seed in (10, 11))
        queries = Queries(q, _rows(ops, tokens, HEADS, ROPE, seed=13))
        keys = Keys(k, _rows(ops, tokens, ROPE, seed=14), _rows(ops, tokens, HEADS, value, seed=12))
        out, lse = ops.mla.fused_infer_attention(queries, keys, Lengths(lengths, lengths, causal=True), SCALE)
        whole = Lengths((tokens,), (tokens,), causal=False)
        past, past_lse = ops.mla.fused_infer_attention(queries, keys, whole, SCALE)
        return out, lse, past, ops.mla.attention_update([out, past], [lse, past_lse])

    return case


def _paged_attention(ops: Ops) -> tuple[Activation, ...]:
    cache = _written(ops, BLOCK + 9, first_block=1)
    return *_attend(ops, cache), *_attend(ops, cache, heads=5)


def _int8_layer(ops: Ops, heads: int, fused: bool) -> tuple[Mla, LayerCache]:
    """Weights and cache of a layer with an int8 cache. fused: in sizes that a fused prolog may take."""
    hidden, q_lora = (1024, 1536) if fused else (HIDDEN, 192)
    config = MlaConfig(heads, q_lora, LATENT, HEAD, ROPE, HEAD, EPS, SCALE)
    scale = storable_scale((3 + _random(LATENT, seed=93).abs()) / 127)
    mla = ops.mla.load(_mla_parts(Scheme.W8A8, hidden, q_lora, heads), config)
    return ops.mla.with_cache_scale(mla, scale), ops.caches.new(POOLS, 4, BLOCK, {"latent": scale})


def _int8_cache_write(ops: Ops) -> tuple[Activation, ...]:
    """Keys and values of tokens, as their own chunk sees them and as later ones do; slots −1 are not written."""
    mla, cache = _int8_layer(ops, HEADS, fused=False)
    slots = torch.tensor([2 * BLOCK, 2 * BLOCK + 1, -1, 2 * BLOCK + 3, 5, -1]).to(ops.device)
    positions = Positions(slots, *_tables(ops, TOKENS))
    written = ops.mla.write_cache(_rows(ops, TOKENS, LATENT + ROPE, seed=92), mla, cache, positions, output_kv=True)
    assert written is not None
    k_rope, latent = written
    cached = ops.caches.gather(cache, _blocks(ops, 2, 0), 2 * BLOCK)
    later = ops.mla.decompress(cached["latent"], cached["rope"], mla)
    return (*ops.mla.decompress(latent, k_rope, mla), *later)


def _int8_attention(heads: int, fused: bool) -> Case:
    """A block of decode attention over an int8 cache, of two sequences with tokens before."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        mla, cache = _int8_layer(ops, heads, fused)
        past = BLOCK + 9
        positions = Positions(torch.arange(past, device=ops.device) + BLOCK, *_tables(ops, past))
        ops.mla.write_cache(_rows(ops, past, LATENT + ROPE, seed=95), mla, cache, positions, output_kv=False)
        slots = torch.tensor([2 * BLOCK + 9, 3 * BLOCK]).to(ops.device)
        table = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32).to(ops.device)
        decode = Decode(q_lens=(1, 2), kv_lens=(past + 1, 1), block_table=table)
        step = Step(slots, Positions(slots, *_tables(ops, 2)), decode=decode, prefill=None, output_rows=None)
        hidden = _rows(ops, 2, 1024 if fused else HIDDEN, seed=25)
        attended = ops.mla.decode(hidden, mla, cache, step)
        several = Decode(q_lens=(2, 5), kv_lens=(past, 40), block_table=table)  # as when tokens are speculated
        q_nope, q_rope = _rows(ops, 5, heads, HEAD, seed=15), _rows(ops, 5, heads, ROPE, seed=16)
        q_latent = ops.mla.absorb(q_nope, mla)
        out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, several, SCALE)
        return attended, ops.mla.bring_out(out, mla)

    return case


def _attend(ops: Ops, cache: LayerCache, heads: int = HEADS) -> tuple[Activation, ...]:
    table = torch.tensor([[1, 2], [1, 0]], dtype=torch.int32).to(ops.device)
    decode = Decode(q_lens=(1, 2), kv_lens=(BLOCK + 9, 40), block_table=table)
    several = Decode(q_lens=(2, 5), kv_lens=decode.kv_lens, block_table=table)  # as when tokens are speculated
    q, q_rope = _rows(ops, 5, heads, LATENT, seed=15), _rows(ops, 5, heads, ROPE, seed=16)
    return (
        ops.mla.fused_infer_attention_paged(q[:2], q_rope[:2], cache, decode, SCALE),
        ops.mla.fused_infer_attention_paged(q, q_rope, cache, several, SCALE),
    )


def _index_keys(ops: Ops) -> tuple[Activation, ...]:
    """Index keys of both rope conventions, as the cache has them; slots −1 are not written."""
    written = []
    for interleave in (False, True):
        config = IndexerConfig(INDEX_HEADS, INDEX_HEAD, ROPE, topk=48, rope_interleave=interleave)
        parts = IndexerParts(
            q=_part(Scheme.W8A8, INDEX_HEADS * INDEX_HEAD, HIDDEN, seed=33),
            k=_part(Scheme.FLOAT, INDEX_HEAD, HIDDEN, seed=34),
            k_norm=1 + 0.1 * _random(INDEX_HEAD, seed=35),
            k_norm_bias=0.1 * _random(INDEX_HEAD, seed=36),
            weights=_part(Scheme.FLOAT, INDEX_HEADS, HIDDEN, seed=37),
        )
        cache = ops.caches.new(SPARSE_POOLS, 4, BLOCK)
        slots = torch.tensor([2 * BLOCK, 2 * BLOCK + 1, -1, 2 * BLOCK + 3, 5, -1]).to(ops.device)
        positions = Positions(slots, *_tables(ops, TOKENS))
        ops.sparse.write_keys(_rows(ops, TOKENS, HIDDEN), ops.sparse.load(parts, config), positions, cache)
        written.append(cache[INDEX_KEY].read(torch.arange(4, device=ops.device), 4 * BLOCK))
    return tuple(written)


def _sparse_cache(ops: Ops) -> tuple[LayerCache, Decode]:
    """Latents, rope keys and index keys of two sequences in ND pages, and two queries of each."""
    cache, slots = ops.caches.new(SPARSE_POOLS, 4, BLOCK), torch.arange(4 * BLOCK, device=ops.device)
    for seed, (name, pages) in enumerate(cache.pages.items()):
        cache[name].write(slots, _rows(ops, 4 * BLOCK, pages.pool.channels, seed=96 + seed))
    table = torch.tensor([[1, 3], [2, 0]], dtype=torch.int32).to(ops.device)
    return cache, Decode.selecting(q_lens=(2, 4), kv_lens=(BLOCK + 9, 40), block_table=table)


def _index_queries(ops: Ops) -> tuple[Tensor, Tensor]:
    return _rows(ops, 4, INDEX_HEADS, INDEX_HEAD, seed=17), _rows(ops, 4, INDEX_HEADS, seed=18)


def _select(ops: Ops, cache: LayerCache, decode: Decode) -> Tensor:
    return ops.sparse.lightning_indexer(*_index_queries(ops), cache[INDEX_KEY], decode, 48)


def _lightning_indexer(ops: Ops) -> tuple[Activation, ...]:
    """The scores of the selected tokens, and which of the places are empty: two tokens of one score may stand for each
    other, in any order."""
    cache, decode = _sparse_cache(ops)
    selected = _select(ops, cache, decode)[:, 0].cpu().long()
    query, weights = (each.cpu().double() for each in _index_queries(ops))
    rows = []
    for sequence, blocks in enumerate(decode.block_table):
        keys = cache[INDEX_KEY].read(blocks, decode.kv_lens[sequence]).cpu().double()
        two = slice(2 * sequence, 2 * sequence + 2)
        scores = ((query[two] @ keys.T).relu() * weights[two].unsqueeze(-1)).sum(1)
        found = scores.gather(1, selected[two].clamp(0, len(keys) - 1)).masked_fill(selected[two] < 0, 0)
        rows.append(found.sort(dim=-1).values)
    return torch.cat(rows), (selected < 0).double()


def _sparse_attention(heads: int) -> Case:
    """Attention to the reference's selection, so that a score on a tie does not matter, and its way out of the latent
    space."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        cache, decode = _sparse_cache(ops)
        reference = ReferenceOps(ops.dtype)
        selected = _select(reference, *_sparse_cache(reference)).to(ops.device)
        q, q_rope = _rows(ops, 4, heads, LATENT, seed=15), _rows(ops, 4, heads, ROPE, seed=16)
        attended = ops.sparse.sparse_flash_attention(q, q_rope, cache, decode, selected, SCALE)
        w_uv = ops.weights.parameter(_rows(ops, heads, LATENT, HEAD, seed=38))
        return attended, ops.products.batch_matmul(attended, w_uv)

    return case


def _mla_parts(scheme: Scheme, hidden: int, q_lora: int, heads: int) -> MlaParts:
    q_a_norm, kv_a_norm = ((1 + 0.1 * _random(width, seed=width)).bfloat16() for width in (q_lora, LATENT))
    return MlaParts(
        q=None,
        q_a=_part(scheme, q_lora, hidden, seed=20, name="q_a"),
        q_a_norm=q_a_norm,
        q_b=_part(scheme, heads * (HEAD + ROPE), q_lora, seed=21, name="q_b"),
        kv_a=_part(scheme, LATENT + ROPE, hidden, seed=22, name="kv_a"),
        kv_a_norm=kv_a_norm,
        kv_b=_weight(heads * 2 * HEAD, LATENT, seed=23),
        o=_part(scheme, hidden, heads * HEAD, seed=24, name="o"),
    )


def _attention_layer(scheme: Scheme, hidden: int, q_lora: int, indexer: Scheme | None = None) -> Case:
    """Run all of decode attention: norm, projections (or the fused prolog), cache, attention, output.

    indexer: scheme of an indexer's linear that reads the latent of the queries too.
    """

    def case(ops: Ops) -> tuple[Activation, ...]:
        config = MlaConfig(HEADS, q_lora, LATENT, HEAD, ROPE, HEAD, EPS, SCALE)
        mla = ops.mla.load(_mla_parts(scheme, hidden, q_lora, HEADS), config)
        cache = _written(ops, 20, first_block=1)
        slots = torch.tensor([BLOCK + 20, 2 * BLOCK]).to(ops.device)
        table = torch.tensor([[1], [2]], dtype=torch.int32).to(ops.device)
        decode = Decode(q_lens=(1, 2), kv_lens=(21, 1), block_table=table)
        step = Step(slots, Positions(slots, *_tables(ops, 2)), decode=decode, prefill=None, output_rows=None)
        x, residual = _rows(ops, 2, hidden, seed=25), _rows(ops, 2, hidden, seed=26)
        rows, total = ops.mla.norm(x, residual, _gamma(ops, hidden), EPS, mla)
        reader = None if indexer is None else ops.weights.linear_of([_part(indexer, HEAD, q_lora, seed=27)])
        absorbed, q_rope, q_latent = ops.mla.prolog_with_latent(rows, mla, cache, step, reader)
        attended = ops.mla.fused_infer_attention_paged(absorbed, q_rope, cache, decode, SCALE)
        outputs = (total, absorbed, q_rope, ops.mla.output(ops.mla.bring_out(attended, mla), mla))
        if reader is None or q_latent is None:
            return outputs
        return *outputs, ops.products.linear(q_latent, reader)

    return case


CASES: dict[str, Case] = {
    "rms_norm, add_rms_norm": _norms,
    "layer_norm": _layer_norm,
    "swiglu": lambda ops: (ops.norms.swiglu(_rows(ops, TOKENS, HIDDEN)),),
    "dynamic_quant": lambda ops: (ops.norms.dynamic_quant(_rows(ops, TOKENS, HIDDEN)),),
    "dequant_swiglu_quant": lambda ops: (ops.norms.dequant_swiglu_quant(_rows(ops, TOKENS, HIDDEN)),),
    "dequant_swiglu_quant, wide rows": _wide_swiglu,
    "linear FLOAT": _linear(Scheme.FLOAT),
    "linear W8A8": _linear(Scheme.W8A8),
    "linear W8A8, static": _linear(Scheme.W8A8_STATIC),
    "linear W8A8, divided": _divided_linear(Scheme.W8A8),
    "linear W8A8, static, divided": _divided_linear(Scheme.W8A8_STATIC),
    "dequant_swiglu_quant, divided": _divided_swiglu,
    "batch_matmul": lambda ops: (
        ops.products.batch_matmul(
            _rows(ops, TOKENS, HEADS, HEAD), ops.weights.parameter(_rows(ops, HEADS, HEAD, LATENT, seed=2))
        ),
    ),
    "router_logits": lambda ops: (
        ops.products.router_logits(_rows(ops, TOKENS, HIDDEN), ops.weights.router(_weight(EXPERTS, HIDDEN, seed=30))),
    ),
    "gating sigmoid, groups, bias": _gating(
        Gating(4, "sigmoid", group_count=8, k_group=4, group_select_mode=1, renormalize=True, scaling=2.5), biased=True
    ),
    "gating softmax": _gating(Gating(4, "softmax"), biased=False),
    "grouped_matmul FLOAT": _grouped(Scheme.FLOAT),
    "grouped_matmul W8A8": _grouped(Scheme.W8A8),
    "grouped_matmul W4A8": _grouped(Scheme.W4A8),
    "gate and up of experts, activated": _experts_inner(Scheme.W4A8),
    "routing float": _routing(quantize=False),
    "routing int8": _routing(quantize=True),
    "rope, cache write and read": _rope_and_cache,
    "rope of halves": lambda ops: (
        ops.rotary.rotary_mul(_rows(ops, TOKENS, HEADS, ROPE, seed=9), *_tables(ops, TOKENS)),
    ),
    "attention, ragged": _ragged_attention(HEAD, HEAD),
    "attention, ragged, heads of 256": _ragged_attention(192, 256),
    "attention, paged": _paged_attention,
    "int8 cache write and read": _int8_cache_write,
    "decode attention, int8 cache": _int8_attention(HEADS, fused=False),
    "decode attention, int8 cache, 5 heads": _int8_attention(5, fused=False),
    "decode attention, int8 cache, prolog shapes": _int8_attention(HEADS, fused=True),
    "index keys": _index_keys,
    "lightning indexer": _lightning_indexer,
    "attention to selected tokens": _sparse_attention(HEADS),
    "attention to selected tokens, 128 heads": _sparse_attention(128),
    "decode attention FLOAT": _attention_layer(Scheme.FLOAT, HIDDEN, q_lora=192),
    "decode attention W8A8": _attention_layer(Scheme.W8A8, HIDDEN, q_lora=192),
    "decode attention W8A8, static": _attention_layer(Scheme.W8A8_STATIC, HIDDEN, q_lora=192),
    "decode attention W8A8, prolog shapes": _attention_layer(Scheme.W8A8, 1024, q_lora=1536),
    "decode attention W8A8, indexer W8A8": _attention_layer(Scheme.W8A8, 1024, 1536, indexer=Scheme.W8A8),
    "decode attention W8A8, indexer FLOAT": _attention_layer(Scheme.W8A8, 1024, 1536, indexer=Scheme.FLOAT),
}

INT8_CACHE_CASES = tuple(name for name in CASES if "int8 cache" in name)
