/* A linear from its rows, and the dense feed-forward block, in one call each. */
#include "inference/feed_forward.h"

int npuq_linear(npuq_pool *pool, const npuq_weights *weights, const void *x, int32_t dtype, int64_t stride,
                int64_t rows, void *out, int32_t out_dtype) {
    if (rows < 0) return NPUQ_BAD_SIZE;
    pool_begin(pool);
    struct space space = {0};
    take_codes(&space, (size_t)rows, (size_t)weights->cols);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = NPUQ_NO_MEMORY;
    if (space.base != NULL) {
        struct codes codes = take_codes(&space, (size_t)rows, (size_t)weights->cols);
        status = multiply_rows(pool, weights, x, dtype, stride, rows, codes, out, out_dtype);
    }
    pool_end(pool);
    return status;
}

int npuq_mlp(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x, int32_t dtype,
             int64_t rows, void *out) {
    if (!computes(dtype) || rows < 0 || !halves_fit(gate_up, down)) return NPUQ_BAD_SIZE;
    size_t cols = (size_t)gate_up->cols, half = (size_t)down->cols, size = size_of(dtype);
    int64_t most = middle_rows(gate_up, dtype);
    size_t some = (size_t)(rows < most ? rows : most);
    struct space space = {0};
    pool_begin(pool);
    take_codes(&space, some, cols);
    take_middle(&space, some, half, dtype, is_integer(down->dtype));
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        struct codes codes = take_codes(&space, some, cols);
        struct middle middle = take_middle(&space, some, half, dtype, is_integer(down->dtype));
        for (int64_t first = 0; first < rows && status == NPUQ_OK; first += most) {
            int64_t count = rows - first < most ? rows - first : most;
            const char *from = (const char *)x + (size_t)first * cols * size;
            char *to = (char *)out + (size_t)(first * down->outputs) * size;
            status = multiply_rows(pool, gate_up, from, dtype, gate_up->cols, count, codes, middle.gate_up, dtype);
            if (status == NPUQ_OK) status = bring_down(pool, down, &middle, dtype, NULL, count, to);
        }
    }
    pool_end(pool);
    return status;
}
