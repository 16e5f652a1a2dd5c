/* Float matrix products: float32 activations, weights in bf16, fp16 or float32, sums in float32. */
#ifndef NPUQ_KERNELS_FLOAT_H
#define NPUQ_KERNELS_FLOAT_H

#include "../levels.h"
#include "simd.h"

#if defined(NPUQ_LEVEL_AVX512)
enum { FLOAT_TOKENS = 6, FLOAT_ROWS = 4 };
#elif defined(NPUQ_LEVEL_NEON)
enum { FLOAT_TOKENS = 4, FLOAT_ROWS = 4 };
#else
enum { FLOAT_TOKENS = 2, FLOAT_ROWS = 4 }; /* 16 registers: 8 sums, 2 tokens, a weight */
#endif

INLINE void float_tile(const char *w, const int dtype, size_t ldw, size_t rows, const float *x, size_t ldx,
                       const int tokens, size_t k, float *acc, size_t ldacc) {
    const size_t size = dtype == NPUQ_F32 ? 4 : 2;
    const char *row[FLOAT_ROWS];
    for (size_t r = 0; r < FLOAT_ROWS; r++) row[r] = w + (r < rows ? r : rows - 1) * ldw * size;
    vf sum[FLOAT_ROWS][6];
#pragma GCC unroll 8
    for (int r = 0; r < FLOAT_ROWS; r++) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) sum[r][t] = vf_set(0);
    }
    size_t i = 0;
    for (; i + VW <= k; i += VW) {
        vf token[6];
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) token[t] = vf_load(x + (size_t)t * ldx + i);
#pragma GCC unroll 8
        for (int r = 0; r < FLOAT_ROWS; r++) {
            if (tokens == 1) __builtin_prefetch(row[r] + (i + FLOAT_ROWS * ldw) * size);
            vf weight = vf_load_as(row[r], dtype, i);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) sum[r][t] = vf_fma(weight, token[t], sum[r][t]);
        }
    }
    if (i < k) {
        for (int r = 0; r < FLOAT_ROWS; r++) {
            vf weight = vf_load_part_as(row[r], dtype, i, k - i);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                sum[r][t] = vf_fma(weight, vf_load_part(x + (size_t)t * ldx + i, k - i), sum[r][t]);
            }
        }
    }
    for (int t = 0; t < tokens; t++) {
        for (int r = 0; r < FLOAT_ROWS; r++) acc[(size_t)t * ldacc + (size_t)r] = vf_sum(sum[r][t]);
    }
}

INLINE void float_tiles(const void *w, const int dtype, size_t ldw, size_t rows, const float *x, size_t ldx,
                        size_t tokens, size_t k, float *acc, size_t ldacc) {
    const size_t size = dtype == NPUQ_F32 ? 4 : 2;
    for (size_t t = 0; t < tokens;) {
        size_t left = tokens - t, width = left < FLOAT_TOKENS ? left : FLOAT_TOKENS;
        const float *xt = x + t * ldx;
        for (size_t r = 0; r < rows; r += FLOAT_ROWS) {
            const char *wr = (const char *)w + r * ldw * size;
            float *out = acc + t * ldacc + r;
            size_t n = rows - r;
            switch (width) {
                case 1: float_tile(wr, dtype, ldw, n, xt, ldx, 1, k, out, ldacc); break;
                case 2: float_tile(wr, dtype, ldw, n, xt, ldx, 2, k, out, ldacc); break;
                case 3: if (FLOAT_TOKENS >= 3) float_tile(wr, dtype, ldw, n, xt, ldx, 3, k, out, ldacc); break;
                case 4: if (FLOAT_TOKENS >= 4) float_tile(wr, dtype, ldw, n, xt, ldx, 4, k, out, ldacc); break;
                case 5: if (FLOAT_TOKENS >= 5) float_tile(wr, dtype, ldw, n, xt, ldx, 5, k, out, ldacc); break;
                default: if (FLOAT_TOKENS >= 6) float_tile(wr, dtype, ldw, n, xt, ldx, 6, k, out, ldacc); break;
            }
        }
        t += width;
    }
}

static void dot_float(const void *w, int dtype, size_t ldw, size_t rows, const float *x, size_t ldx, size_t tokens,
                      size_t k, float *acc, size_t ldacc) {
    if (dtype == NPUQ_BF16) float_tiles(w, NPUQ_BF16, ldw, rows, x, ldx, tokens, k, acc, ldacc);
    else if (dtype == NPUQ_F16) float_tiles(w, NPUQ_F16, ldw, rows, x, ldx, tokens, k, acc, ldacc);
    else float_tiles(w, NPUQ_F32, ldw, rows, x, ldx, tokens, k, acc, ldacc);
}

/* Four vectors of columns for up to two tokens: rows of w are read once for both. */
INLINE void axpy_tile(const void *w, const int dtype, size_t ldw, size_t a, const float *x, size_t ldx,
                      const int tokens, float *out, size_t ldout) {
    vf sum[4][2];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++) sum[v][t] = vf_set(0);
    }
    for (size_t i = 0; i < a; i++) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            vf weight = vf_load_as(w, dtype, i * ldw + (size_t)v * VW);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) sum[v][t] = vf_fma(vf_set(x[(size_t)t * ldx + i]), weight, sum[v][t]);
        }
    }
    for (int v = 0; v < 4; v++) {
        for (int t = 0; t < tokens; t++) vf_store(out + (size_t)t * ldout + (size_t)v * VW, sum[v][t]);
    }
}

INLINE void axpy_columns(const char *w, const int dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                         size_t tokens, float *out, size_t ldout) {
    const size_t size = dtype == NPUQ_F32 ? 4 : 2;
    size_t c = 0;
    for (; c + 4 * VW <= cols; c += 4 * VW) {
        size_t t = 0;
        for (; t + 2 <= tokens; t += 2) {
            axpy_tile(w + c * size, dtype, ldw, a, x + t * ldx, ldx, 2, out + t * ldout + c, ldout);
        }
        if (t < tokens) axpy_tile(w + c * size, dtype, ldw, a, x + t * ldx, ldx, 1, out + t * ldout + c, ldout);
    }
    for (; c < cols; c += VW) {
        size_t n = cols - c < VW ? cols - c : VW;
        for (size_t t = 0; t < tokens; t++) {
            vf sum = vf_set(0);
            for (size_t i = 0; i < a; i++) {
                sum = vf_fma(vf_set(x[t * ldx + i]), vf_load_part_as(w, dtype, i * ldw + c, n), sum);
            }
            vf_store_part(out + t * ldout + c, sum, n);
        }
    }
}

static void axpy_float(const void *w, int dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                       size_t tokens, float *out, size_t ldout) {
    if (dtype == NPUQ_BF16) axpy_columns(w, NPUQ_BF16, ldw, a, cols, x, ldx, tokens, out, ldout);
    else if (dtype == NPUQ_F16) axpy_columns(w, NPUQ_F16, ldw, a, cols, x, ldx, tokens, out, ldout);
    else axpy_columns(w, NPUQ_F32, ldw, a, cols, x, ldx, tokens, out, ldout);
}

#endif
