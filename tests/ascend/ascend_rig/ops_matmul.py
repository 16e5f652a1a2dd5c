"""Matrix multiplications: semantics of the operators, the W4A8 one computed by nibbles as the device computes it."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from .emulate import dtype_of, poison, require, rules, semantics
from .formats import FRACTAL_NZ, ND, format_of, to_nd, to_nz, unpack_int4
from .ops_norm import quantize_rows

LAST_DIMENSION = 65535
W4A8_MAX_K = 18432


@semantics
def npu_format_cast(input: Tensor, acl_format: int) -> Tensor:
    require(acl_format == FRACTAL_NZ, f"npu_format_cast: only {FRACTAL_NZ} (FRACTAL_NZ) is emulated, not {acl_format}")
    require(format_of(input) == ND and input.is_contiguous(), "npu_format_cast: input must be a contiguous ND tensor")
    require(
        input.dtype in (torch.int8, torch.bfloat16, torch.float16, *rules.floats), f"npu_format_cast: {input.dtype}"
    )
    try:
        return to_nz(input)
    except ValueError as error:
        require(False, f"npu_format_cast: {error}")
        raise


@semantics
def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
) -> Tensor:
    name = "npu_quant_matmul"
    require(x1.dtype == x2.dtype == torch.int8, f"{name}: x1 is {x1.dtype}, x2 {x2.dtype}")
    require(x1.dim() == x2.dim() == 2 and x1.shape[1] == x2.shape[0], f"{name}: {tuple(x1.shape)} @ {tuple(x2.shape)}")
    require(format_of(x1) == ND, f"{name}: x1 must be ND")
    require(max(x1.shape[1], x2.shape[1]) <= LAST_DIMENSION, f"{name}: last dimension over {LAST_DIMENSION}")
    require(scale.shape == (x2.shape[1],), f"{name}: scale {tuple(scale.shape)} for {x2.shape[1]} outputs")
    out = dtype_of(output_dtype, torch.int8)
    require(out in rules.floats or out == torch.int32, f"{name}: output_dtype {out}")
    accumulator = integer_matmul(x1, to_nd(x2))
    if out == torch.int32:
        require(pertoken_scale is None, f"{name}: per-token scales beside int32 output")
        require(scale.dtype in (torch.float32, torch.bfloat16), f"{name}: scale is {scale.dtype} for int32 output")
        # The formula scales every output; engines take int32 output for unscaled sums. Of ones both are the same.
        require(bool((scale == 1).all()), f"{name}: int32 output, and a scale that is not 1")
        require(bias is None or bias.dtype == torch.int32, f"{name}: a float bias beside int32 output")
        return (accumulator if bias is None else accumulator + bias).to(torch.int32)
    if pertoken_scale is None:
        return _static_quant_matmul(name, accumulator, scale, bias, out)
    require(bias is None, f"{name}: a bias beside per-token scales is not emulated")
    require(scale.dtype == torch.float32, f"{name}: scale is {scale.dtype}")
    require(pertoken_scale.dtype == torch.float32, f"{name}: pertoken_scale is {pertoken_scale.dtype}")
    require(pertoken_scale.shape == (x1.shape[0],), f"{name}: pertoken_scale {tuple(pertoken_scale.shape)}")
    return (accumulator.float() * scale * pertoken_scale.unsqueeze(1)).to(out)


def _static_quant_matmul(
    name: str, accumulator: Tensor, scale: Tensor, bias: Tensor | None, out: torch.dtype
) -> Tensor:
    """Without per-token scales: float16 output takes int64 words that hold float32 bits, bfloat16 float32 scales."""
    if out == torch.float16:
        require(scale.dtype == torch.int64, f"{name}: float16 output needs int64 scales, not {scale.dtype}")
        require(bool((scale >> 32 == 0).all()), f"{name}: the high words of scale must be zero")
        scale = scale.to(torch.int32).view(torch.float32)
    require(scale.dtype == torch.float32, f"{name}: scale is {scale.dtype}")
    if bias is not None:
        require(bias.dtype == torch.int32 and bias.shape == scale.shape, f"{name}: bias {bias.dtype} {bias.shape}")
        accumulator = accumulator + bias
    return (accumulator.float() * scale).to(out)


@semantics
def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    perm_x1: list[int] | None = None,
    perm_x2: list[int] | None = None,
    perm_y: list[int] | None = None,
) -> Tensor:
    name = "npu_transpose_batchmatmul"
    require(input.dim() == weight.dim() == 3, f"{name}: three dimensions each")
    require(input.dtype == weight.dtype, f"{name}: {input.dtype} @ {weight.dtype}")
    require(format_of(weight) == ND, f"{name}: weight must be ND")
    require(list(perm_x2 or [0, 1, 2]) == [0, 1, 2], f"{name}: perm_x2 {perm_x2}")
    require(list(perm_y or [1, 0, 2]) == [1, 0, 2], f"{name}: perm_y {perm_y}")
    x = input.permute(*(perm_x1 or [0, 1, 2]))
    batch, _, k = x.shape
    require(weight.shape[:2] == (batch, k), f"{name}: {tuple(x.shape)} @ {tuple(weight.shape)}")
    require(k % 16 == 0 and weight.shape[2] % 16 == 0, f"{name}: K {k} and N {weight.shape[2]} must be multiples of 16")
    width = k * batch if perm_x1 and list(perm_x1) == [1, 0, 2] else k
    require(0 < width < 65536, f"{name}: K · B = {width} must be below 65536 when x1 is transposed")
    return (x.float() @ weight.float()).to(input.dtype).permute(1, 0, 2).contiguous()


@semantics
def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor] | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
) -> list[Tensor]:
    name = "npu_grouped_matmul"
    expected = list(tuning_config or [0])
    require(len(expected) == 1 and 0 <= expected[0] <= len(x[0]), f"{name}: tuning_config {expected}, {len(x[0])} rows")
    require(len(x) == len(weight) == 1, f"{name}: one x and one weight")
    rows, experts = x[0], weight[0]
    require(split_item in (2, 3), f"{name}: split_item {split_item} gives a list of tensors, not one")
    require(group_type == 0, f"{name}: group_type {group_type}, not 0 (rows)")
    require(rows.dim() == 2 and experts.dim() == 3, f"{name}: x {tuple(rows.shape)}, weight {tuple(experts.shape)}")
    require(rows.shape[1] == experts.shape[1], f"{name}: K {rows.shape[1]} against {experts.shape[1]}")
    require(isinstance(group_list, Tensor), f"{name}: group_list must be a tensor")
    assert group_list is not None
    require(group_list.dtype == torch.int64, f"{name}: group_list is {group_list.dtype}")
    require(group_list.shape == experts.shape[:1], f"{name}: group_list {tuple(group_list.shape)}")
    require(experts.shape[0] <= 1024, f"{name}: {experts.shape[0]} groups")
    out_dtype = dtype_of(output_dtype, rows.dtype)
    require(out_dtype in rules.floats, f"{name}: output_dtype {out_dtype}")
    counts = group_counts(group_list, group_list_type or 0, rows.shape[0], experts.dtype)
    require(format_of(rows) == ND, f"{name}: x must be ND")
    if experts.dtype == torch.int32:
        products = _w4a8(rows, experts, counts, bias, scale, per_token_scale)
    elif experts.dtype == torch.int8:
        products = _w8a8(rows, experts, counts, bias, scale, per_token_scale, out_dtype)
    else:
        require(not (bias or scale or per_token_scale), f"{name}: float experts take no scales")
        require(rows.dtype == experts.dtype, f"{name}: {rows.dtype} @ {experts.dtype}")
        matrices = to_nd(experts).float()
        products = [rows[group].float() @ matrices[e] for e, group in enumerate(slices(counts))]
    n = experts.shape[2] * (8 if experts.dtype == torch.int32 else 1)
    out = poison(rows.shape[0], n, dtype=out_dtype)  # rows past the last group are never written
    done = torch.cat(products).to(out_dtype)
    out[: done.shape[0]] = done
    return [out]


def group_counts(group_list: Tensor, group_list_type: int, rows: int, weight_dtype: torch.dtype) -> list[int]:
    """Rows of each expert. The W4A8 kernel reads counts whatever the type says, so only counts are let through."""
    name = "npu_grouped_matmul"
    require(group_list_type in (0, 1), f"{name}: group_list_type {group_list_type}")
    require(weight_dtype != torch.int32 or group_list_type == 1, f"{name}: W4A8 takes counts (group_list_type=1)")
    values = group_list.tolist()
    if group_list_type == 0:
        require(values == sorted(values), f"{name}: group_list {values} is not cumulative")
        values = [value - before for before, value in zip([0, *values], values, strict=False)]
    require(min(values) >= 0 and sum(values) <= rows, f"{name}: group_list {values} for {rows} rows")
    return values


def slices(counts: list[int]) -> list[slice]:
    """Where each expert's rows are."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _w4a8(
    rows: Tensor,
    experts: Tensor,
    counts: list[int],
    bias: list[Tensor] | None,
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
) -> list[Tensor]:
    """The cube multiplies int4 by int4: x = 16 · high + low + 8, and `bias` gives back what the 8 took away."""
    name = "npu_grouped_matmul W4A8"
    e, k, packed = experts.shape
    n = packed * 8
    require(rows.dtype == torch.int8, f"{name}: x is {rows.dtype}")
    require(rows.is_contiguous(), f"{name}: x is strided")
    require(k % 64 == 0 and k <= W4A8_MAX_K, f"{name}: K {k}")
    require(scale is not None and len(scale) == 1, f"{name}: needs scale")
    require(bias is not None and len(bias) == 1, f"{name}: needs the scale_bias as bias")
    require(per_token_scale is not None and len(per_token_scale) == 1, f"{name}: needs per_token_scale")
    assert scale and bias and per_token_scale
    require(scale[0].dtype == torch.int64 and scale[0].shape == (e, 1, n), f"{name}: scale {tuple(scale[0].shape)}")
    require(bool((scale[0] >> 32 == 0).all()), f"{name}: the high words of scale must be zero")
    require(bias[0].dtype == torch.float32 and bias[0].shape == (e, n), f"{name}: bias {tuple(bias[0].shape)}")
    token_scale = check_token_scale(name, per_token_scale[0], rows)
    channel_scale = scale[0].to(torch.int32).view(torch.float32)
    weights = unpack_int4(to_nd(experts)).view(e, k, n)
    wide = rows.to(torch.int32)
    high, low = wide >> 4, (wide & 15) - 8
    products = []
    for index, part in enumerate(slices(counts)):
        halves = [integer_matmul(half[part], weights[index]).float() * channel_scale[index] for half in (high, low)]
        if rules.half_cube:
            halves = [half.half().float() for half in halves]
        products.append((16 * halves[0] + halves[1] + bias[0][index]) * token_scale[part].unsqueeze(1))
    rows.copy_(rows.roll(1).bitwise_not())  # the kernel packs its nibbles over x
    return products


@semantics
def npu_grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight: list[Tensor],
    weight_scale: list[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    weight_assist_matrix: list[Tensor] | None = None,
    dequant_mode: int | None = 0,
    group_list_type: int | None = 0,
) -> tuple[Tensor, Tensor]:
    """The left half is activated, in float32 from the product to the codes; these are rounded twice."""
    name = "npu_grouped_matmul_swiglu_quant_v2"
    if rules.refuses_fused_experts:
        raise RuntimeError(f"{name}: weight_scale is torch.int64, which torch_npu's page does not list")
    require(len(weight) == len(weight_scale) == 1, f"{name}: one weight and one scale")
    experts, scale = weight[0], weight_scale[0]
    e, k, stored = experts.shape
    packed = experts.dtype == torch.int32
    n = stored * 8 if packed else stored
    require(x.dim() == 2 and x.shape[1] == k, f"{name}: x {tuple(x.shape)} for K {k}")
    require(k < 20000 and n <= 10240, f"{name}: K {k} or N {n} is too large")
    require(dequant_mode == 0, f"{name}: dequant_mode {dequant_mode} is not emulated")
    require(scale.shape == (e, n), f"{name}: weight_scale {tuple(scale.shape)}, not {(e, n)}")
    require(group_list.dtype == torch.int64 and group_list.shape == (e,), f"{name}: group_list {group_list.dtype}")
    counts = group_counts(group_list, group_list_type or 0, x.shape[0], torch.int8)
    if packed:
        products = _w4a8(x, experts, counts, weight_assist_matrix, [scale.unsqueeze(1)], [x_scale])
    else:
        require(format_of(experts) == FRACTAL_NZ, f"{name}: int8 weights must be FRACTAL_NZ")
        require(weight_assist_matrix is None, f"{name}: weight_assist_matrix is for int4 weights")
        wide = torch.float32 if scale.dtype == torch.float32 else torch.bfloat16
        products = _w8a8(x, experts, counts, None, [scale], [x_scale], wide)
    gate, up = torch.cat(products).chunk(2, dim=-1)
    values = torch.nn.functional.silu(gate) * up
    row_scale = values.abs().amax(-1) / 127
    quotient = (values * (1 / row_scale).unsqueeze(-1)).half().float()
    codes, row_scale = quantize_rows(values, row_scale, quotient)
    out, scales = poison(x.shape[0], n // 2, dtype=torch.int8), poison(x.shape[0], dtype=torch.float32)
    out[: len(codes)], scales[: len(codes)] = codes, row_scale
    return out, scales


def _w8a8(
    rows: Tensor,
    experts: Tensor,
    counts: list[int],
    bias: list[Tensor] | None,
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    out_dtype: torch.dtype,
) -> list[Tensor]:
    name = "npu_grouped_matmul W8A8"
    e, _, n = experts.shape
    require(rows.dtype == torch.int8, f"{name}: x is {rows.dtype}")
    require(not bias, f"{name}: an int32 bias is not emulated")
    require(scale is not None and per_token_scale is not None, f"{name}: needs scale and per_token_scale")
    assert scale and per_token_scale
    required = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}[out_dtype]
    require(scale[0].dtype == required, f"{name}: scale is {scale[0].dtype} for {out_dtype} output")
    require(scale[0].shape == (e, n), f"{name}: scale {tuple(scale[0].shape)}")
    token_scale = check_token_scale(name, per_token_scale[0], rows)
    matrices = to_nd(experts)
    return [
        integer_matmul(rows[part], matrices[i]).float() * scale[0][i].float() * token_scale[part].unsqueeze(1)
        for i, part in enumerate(slices(counts))
    ]


def check_token_scale(name: str, token_scale: Tensor, rows: Tensor) -> Tensor:
    require(token_scale.dtype == torch.float32, f"{name}: per_token_scale is {token_scale.dtype}")
    require(token_scale.shape == rows.shape[:1], f"{name}: per_token_scale {tuple(token_scale.shape)}")
    return token_scale


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact product of small integers: float64 holds every sum here."""
    return a.double() @ b.double()
