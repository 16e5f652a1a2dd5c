/* One instruction-set level. setup.py compiles this file once for each, with that set's flags and
 * -DNPUQ_LEVEL_NAME=<name> (and -DNPUQ_LEVEL_AVX512, _AVX2 or _NEON, none for portable C; with _BF16 or _I8MM where it has
 * more instructions). */
#include "inference/kernels/paged_attention.h"
#include "inference/kernels/bf16_gemm.h"
#include "inference/kernels/int8_attention.h"
#include "inference/kernels/likelihoods.h"
#include "calibrate/descent.h"
#include "calibrate/gptq_columns.h"
#include "convert/quantize_row.h"
#include "inference/kernels/float_gemm.h"
#include "inference/kernels/int_gemm.h"
#include "convert/int4_pack.h"
#include "convert/compare_row.h"
#include "common/float_rows.h"

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const struct kernels JOIN(kernels_, NPUQ_LEVEL_NAME);

const struct kernels JOIN(kernels_, NPUQ_LEVEL_NAME) = {
    .name = TEXT(NPUQ_LEVEL_NAME),
    .dot_w8 = dot_w8,
    .dot_w4 = dot_w4,
    .unpack_w4 = unpack_w4,
    .dot_u4 = dot_u4,
    .direct_tokens = DIRECT_LIMIT,
    .w8_rows = W8_ROWS,
    .offset_w8 = OFFSET_W8,
    .offset_w4 = OFFSET_W4,
    .sum_i8 = sum_i8,
    .scale_row = scale_row,
    .dot_float = dot_float,
    .axpy_float = axpy_float,
    .axpy_add = axpy_add,
    .to_float = to_float,
    .from_float = from_float,
    .code_row = code_row,
    .quant_row = quant_row,
    .quant_row_divide = quant_row_divide,
    .largest_row = largest_row,
    .quant_part = quant_part,
    .swiglu_row = swiglu_row,
    .norm_row = norm_row,
    .add_row = add_row,
    .scale_add_row = scale_add_row,
    .rope_row = rope_row,
    .rope_halves_row = rope_halves_row,
    .attend = attend,
    .online_softmax = online_softmax,
    .multiply_row = multiply_row,
    .weigh_relu = weigh_relu,
#if defined(NPUQ_LEVEL_BF16)
    .dot_bf16 = dot_bf16,
    .bf16_scores = bf16_scores,
    .bf16_softmax = bf16_softmax,
    .bf16_weigh = bf16_weigh,
    .bf16_pair_values = bf16_pair_values,
    .int8_scores = int8_scores,
    .int8_softmax = int8_softmax,
    .int8_weigh = int8_weigh,
#endif
    .logit_range = logit_range,
    .falling_order = falling_order,
    .likelihoods = likelihoods,
    .convert_scratch = convert_scratch,
    .convert_release = convert_release,
    .decode_row = decode_row,
    .convert_row = convert_row,
    .convert_stored = convert_stored,
    .pack_rows = pack_rows,
    .unpack_rows = unpack_rows,
    .compare_row = compare_row,
    .tile_rows = PRODUCT_ROWS,
    .tile_columns = PRODUCT_COLUMNS,
    .product_tile = product_tile,
    .gptq_columns = gptq_columns,
    .descend = descend,
};
