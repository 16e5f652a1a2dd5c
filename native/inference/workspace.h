/* The memory of several operators in one call, and a product through it. A step of one token spends microseconds in most
 * operators and would spend as long again on its way to each of them; in one call they follow each other. Results are those
 * of the operators called one by one. */
#ifndef NPUQ_INFERENCE_WORKSPACE_H
#define NPUQ_INFERENCE_WORKSPACE_H

#include "common/checks.h"
#include "common/pool.h"

enum { ALIGNMENT = 64 };

/* Buffers one after the other. A layout runs twice: with no base to count its bytes, then on memory of that size. */
struct space {
    char *base;
    size_t used;
};

static inline void *take(struct space *space, size_t bytes) {
    char *at = space->base == NULL ? NULL : space->base + space->used;
    space->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

/* Quantized rows and their scales. */
struct codes {
    int8_t *code;
    float *scale;
};

static inline struct codes take_codes(struct space *space, size_t rows, size_t cols) {
    struct codes codes = {take(space, rows * cols), NULL};
    codes.scale = take(space, rows * sizeof(float));
    return codes;
}

/* Rows (of one stride) times weights, through `codes` where the weights are integers; else the rows are contiguous. */
static inline int multiply_rows(npuq_pool *pool, const npuq_weights *weights, const void *x, int dtype,
                                int64_t stride, int64_t rows, struct codes codes, void *out, int out_dtype) {
    if (!is_integer(weights->dtype)) return npuq_matmul(pool, weights, x, dtype, NULL, NULL, rows, out, out_dtype);
    int status = npuq_dynamic_quant(pool, x, dtype, stride, rows, weights->cols, codes.code, codes.scale);
    if (status != NPUQ_OK) return status;
    return npuq_matmul(pool, weights, codes.code, NPUQ_I8, codes.scale, NULL, rows, out, out_dtype);
}

#endif
