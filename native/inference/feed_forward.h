/* Feed-forward blocks: gate|up, SwiGLU, down. */
#ifndef NPUQ_INFERENCE_FEED_FORWARD_H
#define NPUQ_INFERENCE_FEED_FORWARD_H

#include "inference/workspace.h"

/* The most bytes of a feed-forward block's wide middle, so that the next product finds it in the last-level cache. */
enum { MIDDLE_BYTES = 12 << 20 };

/* The middle of some rows: gate|up, then SwiGLU's rows as codes or (in `inner.code`'s place) as floats. */
struct middle {
    void *gate_up, *floats;
    struct codes inner;
};

static inline struct middle take_middle(struct space *space, size_t rows, size_t half, int dtype, bool quantized) {
    struct middle middle = {.gate_up = take(space, rows * 2 * half * size_of(dtype))};
    if (quantized) middle.inner = take_codes(space, rows, half);
    else middle.floats = take(space, rows * half * size_of(dtype));
    return middle;
}

/* SwiGLU and the product with `down`, from middle->gate_up to out. */
static inline int bring_down(npuq_pool *pool, const npuq_weights *down, const struct middle *middle, int dtype,
                      const int64_t *group_rows, int64_t rows, void *out) {
    if (!is_integer(down->dtype)) {
        int status = npuq_swiglu(pool, middle->gate_up, dtype, rows, down->cols, middle->floats, dtype);
        if (status != NPUQ_OK) return status;
        return npuq_matmul(pool, down, middle->floats, dtype, NULL, group_rows, rows, out, dtype);
    }
    const struct codes *inner = &middle->inner;
    int status = npuq_swiglu_quant(pool, middle->gate_up, dtype, rows, down->cols, inner->code, inner->scale);
    if (status != NPUQ_OK) return status;
    return npuq_matmul(pool, down, inner->code, NPUQ_I8, inner->scale, group_rows, rows, out, dtype);
}

/* True if `down` takes the outputs of `gate_up`, and both have as many groups. */
static inline bool halves_fit(const npuq_weights *gate_up, const npuq_weights *down) {
    return gate_up->outputs > 0 && gate_up->outputs == 2 * down->cols && gate_up->groups == down->groups;
}

static inline int64_t middle_rows(const npuq_weights *gate_up, int dtype) {
    int64_t rows = MIDDLE_BYTES / (gate_up->outputs * (int64_t)size_of(dtype));
    return rows < 64 ? 64 : rows;
}

#endif
