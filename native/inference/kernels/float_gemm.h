/* Float matrix products: float32 activations, weights in bf16, fp16 or float32, sums in float32. Weights are read where
 * they are stored, a quad of rows at a time. */
#ifndef NPUQ_INFERENCE_KERNELS_FLOAT_GEMM_H
#define NPUQ_INFERENCE_KERNELS_FLOAT_GEMM_H

#include "common/levels.h"
#include "inference/kernels/prefetch.h"
#include "common/vectors.h"

enum { AXPY_AHEAD = 2048, CROWDED = 3 }; /* from so many tokens on, FLOAT_ROWS rows of AVX2 fill all registers */
#if defined(NPUQ_LEVEL_AVX512)
enum { FLOAT_TOKENS = 6, FLOAT_ROWS = 4, AXPY_TOKENS = 6 };
#elif defined(NPUQ_LEVEL_NEON)
enum { FLOAT_TOKENS = 4, FLOAT_ROWS = 4, AXPY_TOKENS = 6 };
#elif defined(NPUQ_LEVEL_AVX2)
enum { FLOAT_TOKENS = 3, FLOAT_ROWS = 4, AXPY_TOKENS = 2 }; /* 16 registers: 12 sums, 3 tokens, a weight */
#else
enum { FLOAT_TOKENS = 2, FLOAT_ROWS = 4, AXPY_TOKENS = 2 };
#endif

INLINE vf load_weight_as(const char *row, const int dtype, size_t i, const int tokens) {
    return tokens < CROWDED ? vf_load_as(row, dtype, i) : vf_load_crowded(row, dtype, i);
}

INLINE vf load_weight_part(const char *row, const int dtype, size_t i, size_t n, const int tokens) {
    if (dtype == NPUQ_F32) return vf_load_part((const float *)row + i, n);
    uint16_t lane[VW] = {0};
    memcpy(lane, (const uint16_t *)row + i, n * sizeof *lane);
    return load_weight_as((const char *)lane, dtype, 0, tokens);
}

INLINE void clear_sums(vf *sum, const int tokens) {
    EACH_TOKEN(tokens, sum[t] = vf_set(0););
}

INLINE void add_products(vf *sum, vf weight, const vf *token, const int tokens) {
    EACH_TOKEN(tokens, sum[t] = tokens < CROWDED ? vf_fma(weight, token[t], sum[t])
                                                 : vf_add_product(sum[t], weight, token[t]););
}

INLINE void float_tile(const char *w, const int dtype, size_t ldw, size_t rows, const float *x, size_t ldx,
                       const int tokens, size_t k, float *acc, size_t ldacc, struct ahead *ahead) {
    const size_t size = size_of(dtype);
    const char *row[FLOAT_ROWS];
    for (size_t r = 0; r < FLOAT_ROWS; r++) row[r] = w + (r < rows ? r : rows - 1) * ldw * size;
    vf sum0[MOST_TOKENS], sum1[MOST_TOKENS], sum2[MOST_TOKENS], sum3[MOST_TOKENS], token[MOST_TOKENS];
    clear_sums(sum0, tokens);
    clear_sums(sum1, tokens);
    clear_sums(sum2, tokens);
    clear_sums(sum3, tokens);
#if defined(NPUQ_LEVEL_AVX2)
    const int in_order = FLOAT_ROWS * k * size <= 4096;
#endif
    size_t i = 0;
    for (; i + VW <= k; i += VW) {
        EACH_TOKEN(tokens, token[t] = vf_load(x + (size_t)t * ldx + i););
        /* A single token is bound by memory: see int_gemm.h and int_gemm_rows.h for both ways. */
#if defined(NPUQ_LEVEL_AVX2)
        /* Rows of a kilobyte: the next four in the order of memory. Longer ones: half a kilobyte ahead in each row, and
         * behind its end in the row that follows it in its place. */
        if (tokens == 1 && in_order) {
            __builtin_prefetch(w + FLOAT_ROWS * (ldw + i) * size, 0, 0);
        } else if (tokens == 1) {
            size_t at = i * size + 512;
            if (at >= k * size) at += (FLOAT_ROWS * ldw - k) * size;
            for (int r = 0; r < FLOAT_ROWS; r++) __builtin_prefetch(row[r] + at, 0, 0);
        } else if (tokens > 1 && (i & ahead->mask) == 0) {
            fetch_line(ahead);
        }
#else
        (void)ahead; /* measured with AVX2 only */
        for (size_t line = 0; tokens == 1 && line < FLOAT_ROWS * VW * size; line += 64) {
            __builtin_prefetch(w + FLOAT_ROWS * (ldw + i) * size + line, 0, 0);
        }
#endif
        add_products(sum0, load_weight_as(row[0], dtype, i, tokens), token, tokens);
        add_products(sum1, load_weight_as(row[1], dtype, i, tokens), token, tokens);
        add_products(sum2, load_weight_as(row[2], dtype, i, tokens), token, tokens);
        add_products(sum3, load_weight_as(row[3], dtype, i, tokens), token, tokens);
    }
    if (i < k) {
        EACH_TOKEN(tokens, token[t] = vf_load_part(x + (size_t)t * ldx + i, k - i););
        add_products(sum0, load_weight_part(row[0], dtype, i, k - i, tokens), token, tokens);
        add_products(sum1, load_weight_part(row[1], dtype, i, k - i, tokens), token, tokens);
        add_products(sum2, load_weight_part(row[2], dtype, i, k - i, tokens), token, tokens);
        add_products(sum3, load_weight_part(row[3], dtype, i, k - i, tokens), token, tokens);
    }
    EACH_TOKEN(tokens, vf_sum4(sum0[t], sum1[t], sum2[t], sum3[t], acc + (size_t)t * ldacc););
}

INLINE void float_rows(const char *w, const int dtype, size_t ldw, size_t rows, const float *x, size_t ldx,
                       const int tokens, size_t k, float *acc, size_t ldacc, struct ahead *ahead) {
    for (size_t r = 0; r < rows; r += FLOAT_ROWS) {
        const char *from = w + r * ldw * size_of(dtype);
        float_tile(from, dtype, ldw, rows - r, x, ldx, tokens, k, acc + r, ldacc, ahead);
    }
}

/* A function each, so that the loops of each width have all registers. */
#define FLOAT_WIDTH(width)                                                                                          \
    static __attribute__((noinline)) void float_rows_##width(const void *w, int dtype, size_t ldw, size_t rows,     \
                                                             const float *x, size_t ldx, size_t k, float *acc,      \
                                                             size_t ldacc, struct ahead *ahead) {                   \
        const int tokens = width <= FLOAT_TOKENS ? width : 1;                                                       \
        if (dtype == NPUQ_BF16) float_rows(w, NPUQ_BF16, ldw, rows, x, ldx, tokens, k, acc, ldacc, ahead);          \
        else if (dtype == NPUQ_F16) float_rows(w, NPUQ_F16, ldw, rows, x, ldx, tokens, k, acc, ldacc, ahead);       \
        else float_rows(w, NPUQ_F32, ldw, rows, x, ldx, tokens, k, acc, ldacc, ahead);                              \
    }
FLOAT_WIDTH(1)
FLOAT_WIDTH(2)
FLOAT_WIDTH(3)
FLOAT_WIDTH(4)
FLOAT_WIDTH(5)
FLOAT_WIDTH(6)

static void dot_float(const void *w, int dtype, size_t ldw, size_t rows, const float *x, size_t ldx, size_t tokens,
                      size_t k, float *acc, size_t ldacc, struct following following) {
    /* A step of four rows reads a line; the next lines are prefetched over about as many steps as there are passes. */
    size_t steps = 1;
    while (2 * steps * FLOAT_TOKENS < tokens + FLOAT_TOKENS) steps *= 2;
    struct ahead ahead = ahead_of(following, steps * VW - 1);
    for (size_t t = 0; t < tokens;) {
        size_t left = tokens - t, passes = (left + FLOAT_TOKENS - 1) / FLOAT_TOKENS;
        size_t width = (left + passes - 1) / passes;
        const float *xt = x + t * ldx;
        float *out = acc + t * ldacc;
        switch (width) {
            case 1: float_rows_1(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
            case 2: float_rows_2(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
            case 3: float_rows_3(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
            case 4: float_rows_4(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
            case 5: float_rows_5(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
            default: float_rows_6(w, dtype, ldw, rows, xt, ldx, k, out, ldacc, &ahead); break;
        }
        t += width;
    }
}

/* Four vectors of columns for `tokens`: rows of w are read once for all. */
INLINE void axpy_tile(const void *w, const int dtype, size_t ldw, size_t a, const float *x, size_t ldx,
                      const int tokens, const int accumulate, float *out, size_t ldout) {
    enum { vectors = 4 };
    vf sum[AXPY_TOKENS][vectors];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sum[t][v] = accumulate ? vf_load(out + (size_t)t * ldout + (size_t)v * VW) : vf_set(0);
        }
    }
    for (size_t i = 0; i < a; i++) {
        vf weight[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) weight[v] = vf_load_as(w, dtype, i * ldw + (size_t)v * VW);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) {
            vf token = vf_set(x[(size_t)t * ldx + i]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[t][v] = vf_fma(token, weight[v], sum[t][v]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < tokens; t++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) vf_store(out + (size_t)t * ldout + (size_t)v * VW, sum[t][v]);
    }
}

/* A single token is bound by memory: row by row, in the order of memory, AXPY_AHEAD bytes or a row ahead.
 * Sums go on in `out`, in the order of the rows as in a tile. */
INLINE size_t axpy_single(const char *w, const int dtype, size_t ldw, size_t a, size_t cols, const float *x,
                          const int accumulate, float *out) {
    const size_t size = size_of(dtype), whole = cols / VW * VW, row = ldw * size;
    const size_t ahead = row < AXPY_AHEAD ? AXPY_AHEAD / row * row : row;
    if (!accumulate) memset(out, 0, whole * sizeof *out);
    for (size_t i = 0; i < a; i++) {
        const char *at = w + i * row;
        const vf factor = vf_set(x[i]);
        for (size_t c = 0; c < whole; c += VW) {
            __builtin_prefetch(at + ahead + c * size, 0, 0);
            vf_store(out + c, vf_fma(factor, vf_load_as(at, dtype, c), vf_load(out + c)));
        }
    }
    return whole;
}

INLINE void axpy_columns(const char *w, const int dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                         size_t tokens, const int accumulate, float *out, size_t ldout) {
    const size_t size = size_of(dtype);
    size_t c = tokens == 1 ? axpy_single(w, dtype, ldw, a, cols, x, accumulate, out) : 0;
    for (; c + 4 * VW <= cols; c += 4 * VW) {
        const char *wc = w + c * size;
        size_t t = 0;
        for (; t + AXPY_TOKENS <= tokens; t += AXPY_TOKENS) {
            axpy_tile(wc, dtype, ldw, a, x + t * ldx, ldx, AXPY_TOKENS, accumulate, out + t * ldout + c, ldout);
        }
        for (; AXPY_TOKENS > 2 && t + 2 <= tokens; t += 2) {
            axpy_tile(wc, dtype, ldw, a, x + t * ldx, ldx, 2, accumulate, out + t * ldout + c, ldout);
        }
        for (; t < tokens; t++) {
            axpy_tile(wc, dtype, ldw, a, x + t * ldx, ldx, 1, accumulate, out + t * ldout + c, ldout);
        }
    }
    for (; c < cols; c += VW) {
        size_t n = cols - c < VW ? cols - c : VW;
        for (size_t t = 0; t < tokens; t++) {
            vf sum = accumulate ? vf_load_part(out + t * ldout + c, n) : vf_set(0);
            for (size_t i = 0; i < a; i++) {
                sum = vf_fma(vf_set(x[t * ldx + i]), vf_load_part_as(w, dtype, i * ldw + c, n), sum);
            }
            vf_store_part(out + t * ldout + c, sum, n);
        }
    }
}

static void axpy_float(const void *w, int dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                       size_t tokens, float *out, size_t ldout) {
    if (dtype == NPUQ_BF16) axpy_columns(w, NPUQ_BF16, ldw, a, cols, x, ldx, tokens, 0, out, ldout);
    else if (dtype == NPUQ_F16) axpy_columns(w, NPUQ_F16, ldw, a, cols, x, ldx, tokens, 0, out, ldout);
    else axpy_columns(w, NPUQ_F32, ldw, a, cols, x, ldx, tokens, 0, out, ldout);
}

static void axpy_add(const void *w, int dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                     size_t tokens, float *out, size_t ldout) {
    if (dtype == NPUQ_BF16) axpy_columns(w, NPUQ_BF16, ldw, a, cols, x, ldx, tokens, 1, out, ldout);
    else if (dtype == NPUQ_F16) axpy_columns(w, NPUQ_F16, ldw, a, cols, x, ldx, tokens, 1, out, ldout);
    else axpy_columns(w, NPUQ_F32, ldw, a, cols, x, ldx, tokens, 1, out, ldout);
}

#endif
