/* Products of bf16 rows with bf16 weights by vdpbf16ps: twice the products of float32 an instruction, and rows as they come.
 * Sums are float32, in an order that does not depend on the tokens beside a row. */
#ifndef NPUQ_INFERENCE_KERNELS_BF16_GEMM_H
#define NPUQ_INFERENCE_KERNELS_BF16_GEMM_H

#include "common/levels.h"
#include "common/vectors.h"
#include "inference/kernels/prefetch.h"

#if defined(NPUQ_LEVEL_BF16)

enum { BF16_STEP = 32, BF16_ROWS = 4, BF16_TOKENS = 6 };

/* Written out, as dot_nibbles of vectors_int8.h is: intrinsics leave room for half as many sums. */
INLINE vf add_pairs(vf sum, vi weight, vi token) {
#if defined(__AVX512BF16__)
    __asm__("vdpbf16ps\t%2, %1, %0" : "+v"(sum) : "v"(weight), "v"(token));
    return sum;
#else /* tests/native/avx512_emulated.h */
    return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)token);
#endif
}

INLINE vi load_pairs(const uint16_t *p) { return vi_load((const int32_t *)(const void *)p); }

INLINE vi load_pairs_part(const uint16_t *p, size_t n) {
    uint16_t lane[BF16_STEP] = {0};
    memcpy(lane, p, n * sizeof *lane);
    return load_pairs(lane);
}

/* Four rows (those past the last repeat it) and `tokens`, a constant where this is inlined. */
INLINE void bf16_tile(const uint16_t *w, size_t rows, const uint16_t *x, const int tokens, size_t k, float *acc,
                      size_t ldacc, struct ahead *ahead) {
    const uint16_t *row[BF16_ROWS];
    for (size_t r = 0; r < BF16_ROWS; r++) row[r] = w + (r < rows ? r : rows - 1) * k;
    vf sum[BF16_ROWS][BF16_TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < BF16_ROWS; r++) {
        EACH_TOKEN(tokens, sum[r][t] = vf_set(0););
    }
    size_t i = 0;
    for (; i + BF16_STEP <= k; i += BF16_STEP) {
        vi token[BF16_TOKENS];
        EACH_TOKEN(tokens, token[t] = load_pairs(x + (size_t)t * k + i););
        if (tokens == 1) {
            /* In the order of memory: the next tile's lines. */
            for (size_t r = 0; r < BF16_ROWS; r++) __builtin_prefetch(w + BF16_ROWS * (k + i) + r * BF16_STEP, 0, 0);
        } else {
            fetch_lap(ahead);
        }
#pragma GCC unroll 4
        for (int r = 0; r < BF16_ROWS; r++) {
            const vi weight = load_pairs(row[r] + i);
            EACH_TOKEN(tokens, sum[r][t] = add_pairs(sum[r][t], weight, token[t]););
        }
    }
    if (i < k) {
        vi token[BF16_TOKENS];
        EACH_TOKEN(tokens, token[t] = load_pairs_part(x + (size_t)t * k + i, k - i););
#pragma GCC unroll 4
        for (int r = 0; r < BF16_ROWS; r++) {
            const vi weight = load_pairs_part(row[r] + i, k - i);
            EACH_TOKEN(tokens, sum[r][t] = add_pairs(sum[r][t], weight, token[t]););
        }
    }
    EACH_TOKEN(tokens, vf_sum4(sum[0][t], sum[1][t], sum[2][t], sum[3][t], acc + (size_t)t * ldacc););
}

/* A function each, so that the loops of each width have all registers. */
#define BF16_WIDTH(width)                                                                                              \
    static __attribute__((noinline)) void bf16_rows_##width(const uint16_t *w, size_t rows, const uint16_t *x,         \
                                                            size_t k, float *acc, size_t ldacc, struct ahead *ahead) { \
        for (size_t r = 0; r < rows; r += BF16_ROWS) {                                                                 \
            bf16_tile(w + r * k, rows - r, x, width, k, acc + r, ldacc, ahead);                                        \
        }                                                                                                              \
    }
BF16_WIDTH(1)
BF16_WIDTH(2)
BF16_WIDTH(3)
BF16_WIDTH(4)
BF16_WIDTH(5)
BF16_WIDTH(6)

static void dot_bf16(const uint16_t *w, size_t rows, const uint16_t *x, size_t tokens, size_t k, float *acc, size_t ldacc,
                     struct following following) {
    const size_t passes = (tokens + BF16_TOKENS - 1) / BF16_TOKENS;
    struct ahead ahead = {following.weights, following.weights + following.bytes, (BF16_ROWS + passes - 1) / passes, 0};
    for (size_t pass = 0, t = 0; pass < passes; pass++) {
        const size_t width = (tokens - t + passes - pass - 1) / (passes - pass);
        const uint16_t *from = x + t * k;
        float *out = acc + t * ldacc;
        switch (width) {
            case 1: bf16_rows_1(w, rows, from, k, out, ldacc, &ahead); break;
            case 2: bf16_rows_2(w, rows, from, k, out, ldacc, &ahead); break;
            case 3: bf16_rows_3(w, rows, from, k, out, ldacc, &ahead); break;
            case 4: bf16_rows_4(w, rows, from, k, out, ldacc, &ahead); break;
            case 5: bf16_rows_5(w, rows, from, k, out, ldacc, &ahead); break;
            default: bf16_rows_6(w, rows, from, k, out, ldacc, &ahead); break;
        }
        t += width;
    }
}

#endif
#endif
