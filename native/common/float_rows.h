/* Operators on one row of float32: conversion from and to stored dtypes, norms, activations, quantization. */
#ifndef NPUQ_COMMON_FLOAT_ROWS_H
#define NPUQ_COMMON_FLOAT_ROWS_H

#include "common/levels.h"
#include "common/vectors.h"

static void to_float(const void *x, int dtype, size_t n, float *out) {
    size_t i = 0;
    if (dtype == NPUQ_F32) {
        memcpy(out, x, n * sizeof *out);
        return;
    }
    for (; i + VW <= n; i += VW) vf_store(out + i, vf_load_as(x, dtype, i));
    if (i < n) vf_store_part(out + i, vf_load_part_as(x, dtype, i, n - i), n - i);
}

static void from_float(const float *x, size_t n, void *out, int dtype) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vf_store_as(vf_load(x + i), out, dtype, i);
    if (i < n) vf_store_part_as(vf_load_part(x + i, n - i), out, dtype, i, n - i);
}

static void scale_row(const int32_t *acc, int32_t correction, const float *scale, float token_scale, size_t rows,
                      void *out, int out_dtype) {
    size_t r = 0;
    for (; r + VW <= rows; r += VW) {
        typedef uint32_t vu __attribute__((vector_size(VW * 4)));
        vi exact = (vi)((vu)vi_load(acc + r) - (uint32_t)correction); /* wraps where the sum wrapped */
        vf_store_as(vi_float(exact) * vf_load(scale + r) * token_scale, out, out_dtype, r);
    }
    if (r < rows) {
        float lane[VW] = {0};
        for (size_t i = r; i < rows; i++) lane[i - r] = (float)(int32_t)((uint32_t)acc[i] - (uint32_t)correction);
        vf scaled = vf_load(lane) * vf_load_part(scale + r, rows - r) * token_scale;
        vf_store_part_as(scaled, out, out_dtype, r, rows - r);
    }
}

/* max |x|, or NaN when the row holds a NaN or an infinity: x · 0 is NaN for just those. */
INLINE float largest_finite(const float *x, size_t n) {
    vf largest = vf_set(0), poison = vf_set(0);
    size_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf v = vf_load(x + i);
        largest = vf_max(vf_abs(v), largest);
        poison = poison + v * 0.0f;
    }
    if (i < n) {
        vf v = vf_load_part(x + i, n - i);
        largest = vf_max(vf_abs(v), largest);
        poison = poison + v * 0.0f;
    }
    float sum = vf_sum(poison);
    return sum == 0 ? vf_largest(largest) : NAN;
}

INLINE vi round_away(vf v) {
    vi whole = vf_truncate(v);
    vf rest = v - vi_float(whole); /* exact */
    vi step = (vi)(vf_abs(rest) >= 0.5f);
    vi sign = ((vi)v >> 31) | 1;
    return whole + (step & sign);
}

/* The computation and rounding of a quotient; see the table of roundings in npu-ops. */
enum quant_rule { TIMES_EVEN, DIVIDE_EVEN, DIVIDE_AWAY };

INLINE vi quant_vector(vf v, float factor, const enum quant_rule rule) {
    if (rule == TIMES_EVEN) return vf_round(v * factor);
    if (rule == DIVIDE_EVEN) return vf_round(v / factor);
    return round_away(v / factor);
}

INLINE void quant_codes(const float *x, size_t n, float factor, const enum quant_rule rule, int8_t *codes) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vi_store_i8(codes + i, quant_vector(vf_load(x + i), factor, rule));
    if (i < n) {
        int8_t lane[VW];
        vi_store_i8(lane, quant_vector(vf_load_part(x + i, n - i), factor, rule));
        memcpy(codes + i, lane, n - i);
    }
}

/* An infinity instead of a NaN: it stays the greatest of several parts' values. */
static float largest_row(const float *x, size_t n) {
    float largest = largest_finite(x, n);
    return largest != largest ? INFINITY : largest;
}

static void quant_within(const float *x, size_t n, float largest, int8_t *codes, float *scale) {
    float factor = 127.0f / largest;
    /* Below 4e-37 the factor overflows: such a row is zero. */
    if (!(factor <= 3.402823466e38f)) {
        memset(codes, 0, n);
        *scale = largest != largest ? NAN : 0;
        return;
    }
    *scale = 1.0f / factor;
    quant_codes(x, n, factor, TIMES_EVEN, codes);
}

static void quant_row(const float *x, size_t n, int8_t *codes, float *scale) {
    quant_within(x, n, largest_finite(x, n), codes, scale);
}

/* n is a multiple of 16, which every level's vectors divide. */
static void code_row(const float *x, const float *scale, size_t n, int8_t *codes) {
    for (size_t i = 0; i < n; i += VW) {
        vf v = vf_load(x + i) / vf_load(scale + i);
        vi number = (vi)(v == v); /* NaN has no code: 0 */
        vi code = vf_round(vf_min(vf_max(v, vf_set(-128)), vf_set(127)));
        vi_store_i8(codes + i, code & number);
    }
}

INLINE void divide_within(const float *x, size_t n, float largest, int away, int8_t *codes, float *scale) {
    float step = largest / 127.0f;
    *scale = step;
    if (!(step > 0)) { /* NaN, or nothing to scale */
        memset(codes, 0, n);
        return;
    }
    if (away) quant_codes(x, n, step, DIVIDE_AWAY, codes);
    else quant_codes(x, n, step, DIVIDE_EVEN, codes);
}

static void quant_row_divide(const float *x, size_t n, int away, int8_t *codes, float *scale) {
    divide_within(x, n, largest_finite(x, n), away, codes, scale);
}

static void quant_part(const float *x, size_t n, float largest, int divide, int8_t *codes, float *scale) {
    if (largest == INFINITY) largest = NAN;
    if (divide) divide_within(x, n, largest, 0, codes, scale);
    else quant_within(x, n, largest, codes, scale);
}

INLINE vf silu(vf x) { return x / (vf_exp(-x) + 1.0f); }

static void swiglu_row(const float *left, const float *right, size_t n, float *out) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(out + i, silu(vf_load(left + i)) * vf_load(right + i));
    if (i < n) {
        vf_store_part(out + i, silu(vf_load_part(left + i, n - i)) * vf_load_part(right + i, n - i), n - i);
    }
}

static void norm_row(const float *x, const float *gamma, size_t n, float eps, int round_normed, float *out) {
    vf squares = vf_set(0);
    size_t i = 0;
    for (; i + VW <= n; i += VW) squares = vf_fma(vf_load(x + i), vf_load(x + i), squares);
    if (i < n) squares = vf_fma(vf_load_part(x + i, n - i), vf_load_part(x + i, n - i), squares);
    float factor = 1.0f / sqrtf(vf_sum(squares) / (float)n + eps);
    for (i = 0; i < n; i += VW) {
        size_t left = n - i < VW ? n - i : VW;
        vf v = left == VW ? vf_load(x + i) : vf_load_part(x + i, left);
        vf g = left == VW ? vf_load(gamma + i) : vf_load_part(gamma + i, left);
        vf normed = v * factor;
        if (round_normed) normed = vf_round_bf16(normed);
        if (left == VW) vf_store(out + i, normed * g);
        else vf_store_part(out + i, normed * g, left);
    }
}

static void add_row(const float *x, const float *y, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) out[i] = x[i] + y[i];
}

static void scale_add_row(float weight, const float *x, size_t n, float *out) {
    for (size_t i = 0; i < n; i++) out[i] += weight * x[i];
}

static void multiply_row(float factor, size_t n, float *x) {
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

/* A comparison with a NaN is false: it is kept, where a maximum could drop it. */
static void weigh_relu(const float *x, size_t ldx, const float *weight, size_t heads, size_t n, float *out) {
    memset(out, 0, n * sizeof *out);
    for (size_t h = 0; h < heads; h++) {
        const float *row = x + h * ldx;
        for (size_t c = 0; c < n; c++) out[c] += weight[h] * (row[c] < 0 ? 0 : row[c]);
    }
}

/* Interleaved pairs (even, odd) in, halves out: first = even · cos − odd · sin, second = odd · cos + even · sin. */
static void rope_row(const float *x, const float *cos, const float *sin, size_t dim, float *out) {
    size_t half = dim / 2;
    for (size_t i = 0; i < half; i++) {
        float even = x[2 * i], odd = x[2 * i + 1];
        out[i] = even * cos[i] - odd * sin[i];
        out[half + i] = odd * cos[half + i] + even * sin[half + i];
    }
}

/* Pairs (i, half + i), which stay in their places. */
static void rope_halves_row(const float *x, const float *cos, const float *sin, size_t dim, float *out) {
    size_t half = dim / 2;
    for (size_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        out[i] = first * cos[i] - second * sin[i];
        out[half + i] = second * cos[half + i] + first * sin[half + i];
    }
}

#endif
