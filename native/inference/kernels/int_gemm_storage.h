/* Integer products, shared parts: how weights are stored, how far ahead they are fetched, and the k that whole vectors
 * leave over. */
#ifndef NPUQ_INFERENCE_KERNELS_INT_GEMM_STORAGE_H
#define NPUQ_INFERENCE_KERNELS_INT_GEMM_STORAGE_H

#include "inference/kernels/prefetch.h"
#include "inference/kernels/vectors_int8.h"

/* C leaves int32 overflow undefined. */
INLINE int32_t wrap_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }

INLINE int flipped_nibble(uint8_t byte, size_t row) { return ((row % 2 ? byte >> 4 : byte) & 15) ^ 8; }

#if !defined(NPUQ_SCALAR_DOTS)
/* The stored form of a weight: int8 codes, nibbles in pairs of rows, or flipped nibbles spread to a byte each. */
enum storage { CODES, PACKED, SPREAD };

INLINE void clear_row(sums *row, const int tokens) {
    EACH_TOKEN(tokens, row[t] = sums_zero(););
}

#if !defined(NPUQ_LEVEL_AVX2)
INLINE sums dot_stored(const enum storage storage, sums sum, bytes weight, bytes token) {
    return storage == CODES ? dot_bytes(sum, weight, token) : dot_nibbles(sum, weight, token);
}

INLINE bytes load_weight(const enum storage storage, const uint8_t *from) {
    return storage == CODES ? load_w8((const int8_t *)from) : load_bytes(from);
}
#endif

enum {
#if defined(NPUQ_LEVEL_AVX2)
    /* A row's bytes between two prefetches: as many steps as 16-bit sums hold. */
    LAP_BYTES = NARROW_STEPS * STEP,
    /* Weights that all tokens take before the next of them: they stay in L2, and those to come beside them. */
    BLOCK_BYTES = 32 << 10,
#else
    /* Their tiles fetch for themselves: blocks were measured with AVX2 only. */
    LAP_BYTES = 256,
    BLOCK_BYTES = 1 << 30,
#endif
    LAP_LINES = LAP_BYTES / LINE,
    /* The prefetch distance of weights that are read only once. */
    AHEAD_BYTES = 4096,
};

/* The k that whole steps leave over. */
static void add_rest(enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, size_t tokens,
                     size_t k, size_t body, int32_t *acc, size_t ldacc) {
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *row = w + (storage == PACKED ? r / 2 : r) * k;
        for (size_t t = 0; t < tokens; t++) {
            int32_t sum = 0;
            for (size_t i = body; i < k; i++) {
                int code = storage == CODES    ? (int8_t)row[i] + OFFSET_W8
                           : storage == PACKED ? flipped_nibble(row[i], r)
                                               : row[i];
                sum += code * x[t * k + i];
            }
            acc[t * ldacc + r] = wrap_add(acc[t * ldacc + r], sum);
        }
    }
}
#endif

#endif
