/* Norms, activations and quantization of many rows: each row passes through float32 scratch that stays in cache. */
#include "common/checks.h"
#include "common/pool.h"

struct rows {
    npuq_pool *pool;
    const struct kernels *kernels;
    const char *x, *y, *gamma;
    int dtype;
    size_t stride, count, cols, per_task;
    float eps;
    char *out, *sum;
    int out_dtype;
    int8_t *codes;
    float *scale, *maxima;
    const float *largest;
    int divide;
};

/* Elements a task handles: below this, sharing a row out costs more than it saves. */
enum { TASK_ELEMENTS = 4096 };

/* Scratch is `buffers` rows of floats a thread. */
static int run_rows(struct rows rows, pool_task task, size_t buffers) {
    if (!computes(rows.dtype) || (int64_t)rows.count < 0 || (int64_t)rows.cols < 0) return NPUQ_BAD_SIZE;
    rows.kernels = pool_kernels(rows.pool);
    rows.per_task = TASK_ELEMENTS / (rows.cols + 1) + 1;
    pool_begin(rows.pool);
    int status = pool_scratch(rows.pool, buffers * rows.cols * sizeof(float), 0);
    if (status == NPUQ_OK) pool_run(rows.pool, task, &rows, (rows.count + rows.per_task - 1) / rows.per_task);
    pool_end(rows.pool);
    return status;
}

static size_t last_row(const struct rows *rows, size_t index) {
    size_t end = (index + 1) * rows->per_task;
    return end < rows->count ? end : rows->count;
}

static void quant_task(const void *context, size_t index, int thread) {
    const struct rows *rows = context;
    float *x = pool_thread_scratch(rows->pool, thread);
    for (size_t r = index * rows->per_task; r < last_row(rows, index); r++) {
        rows->kernels->to_float(rows->x + r * rows->stride * size_of(rows->dtype), rows->dtype, rows->cols, x);
        rows->kernels->quant_row(x, rows->cols, rows->codes + r * rows->cols, rows->scale + r);
    }
}

int npuq_dynamic_quant(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t count, int64_t cols,
                       int8_t *codes, float *scale) {
    struct rows rows = {.pool = pool, .x = x, .dtype = dtype, .stride = (size_t)stride, .count = (size_t)count,
                        .cols = (size_t)cols, .codes = codes, .scale = scale};
    return run_rows(rows, quant_task, 1);
}

static void maximum_task(const void *context, size_t index, int thread) {
    const struct rows *rows = context;
    float *x = pool_thread_scratch(rows->pool, thread);
    for (size_t r = index * rows->per_task; r < last_row(rows, index); r++) {
        rows->kernels->to_float(rows->x + r * rows->stride * size_of(rows->dtype), rows->dtype, rows->cols, x);
        rows->maxima[r] = rows->kernels->largest_row(x, rows->cols);
    }
}

int npuq_row_maximum(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t count, int64_t cols,
                     float *largest) {
    struct rows rows = {.pool = pool, .x = x, .dtype = dtype, .stride = (size_t)stride, .count = (size_t)count,
                        .cols = (size_t)cols, .maxima = largest};
    return run_rows(rows, maximum_task, 1);
}

static void part_task(const void *context, size_t index, int thread) {
    const struct rows *rows = context;
    float *x = pool_thread_scratch(rows->pool, thread);
    for (size_t r = index * rows->per_task; r < last_row(rows, index); r++) {
        rows->kernels->to_float(rows->x + r * rows->stride * size_of(rows->dtype), rows->dtype, rows->cols, x);
        rows->kernels->quant_part(x, rows->cols, rows->largest[r], rows->divide, rows->codes + r * rows->cols,
                                  rows->scale + r);
    }
}

int npuq_quant_parts(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t count, int64_t cols,
                     const float *largest, int32_t divide, int8_t *codes, float *scale) {
    struct rows rows = {.pool = pool, .x = x, .dtype = dtype, .stride = (size_t)stride, .count = (size_t)count,
                        .cols = (size_t)cols, .largest = largest, .divide = divide, .codes = codes, .scale = scale};
    return run_rows(rows, part_task, 1);
}

/* cols is the width of the output, half that of x. */
static void swiglu_task(const void *context, size_t index, int thread) {
    const struct rows *rows = context;
    size_t n = rows->cols, size = size_of(rows->dtype);
    float *left = pool_thread_scratch(rows->pool, thread), *right = left + n, *y = right + n;
    for (size_t r = index * rows->per_task; r < last_row(rows, index); r++) {
        rows->kernels->to_float(rows->x + 2 * r * n * size, rows->dtype, n, left);
        rows->kernels->to_float(rows->x + (2 * r + 1) * n * size, rows->dtype, n, right);
        rows->kernels->swiglu_row(left, right, n, y);
        if (rows->codes == NULL) {
            rows->kernels->from_float(y, n, rows->out + r * n * size_of(rows->out_dtype), rows->out_dtype);
        } else {
            rows->kernels->quant_row_divide(y, n, 0, rows->codes + r * n, rows->scale + r);
        }
    }
}

int npuq_swiglu(npuq_pool *pool, const void *x, int32_t dtype, int64_t count, int64_t half, void *out,
                int32_t out_dtype) {
    if (!computes(out_dtype)) return NPUQ_BAD_SIZE;
    struct rows rows = {.pool = pool, .x = x, .dtype = dtype, .count = (size_t)count, .cols = (size_t)half, .out = out,
                        .out_dtype = out_dtype};
    return run_rows(rows, swiglu_task, 3);
}

int npuq_swiglu_quant(npuq_pool *pool, const void *x, int32_t dtype, int64_t count, int64_t half, int8_t *codes,
                      float *scale) {
    struct rows rows = {.pool = pool, .x = x, .dtype = dtype, .count = (size_t)count, .cols = (size_t)half,
                        .codes = codes, .scale = scale};
    return run_rows(rows, swiglu_task, 3);
}

static void norm_task(const void *context, size_t index, int thread) {
    const struct rows *rows = context;
    const struct kernels *kernels = rows->kernels;
    size_t n = rows->cols, size = size_of(rows->dtype);
    float *x = pool_thread_scratch(rows->pool, thread), *gamma = x + n, *y = gamma + n;
    kernels->to_float(rows->gamma, rows->dtype, n, gamma);
    for (size_t r = index * rows->per_task; r < last_row(rows, index); r++) {
        kernels->to_float(rows->x + r * rows->stride * size, rows->dtype, n, x);
        int added = rows->y != NULL;
        if (added) {
            kernels->to_float(rows->y + r * n * size, rows->dtype, n, y);
            kernels->add_row(x, y, n, x);
            kernels->from_float(x, n, rows->sum + r * n * size, rows->dtype);
        }
        /* npu_add_rms_norm rounds the normalised sum before it is times gamma, npu_rms_norm does not. */
        kernels->norm_row(x, gamma, n, rows->eps, added && rows->dtype == NPUQ_BF16, y);
        kernels->from_float(y, n, rows->out + r * n * size, rows->dtype);
    }
}

int npuq_rms_norm(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, const void *gamma, int64_t count,
                  int64_t cols, float eps, void *out) {
    struct rows rows = {.pool = pool, .x = x, .gamma = gamma, .dtype = dtype, .stride = (size_t)stride,
                        .count = (size_t)count, .cols = (size_t)cols, .eps = eps, .out = out};
    return run_rows(rows, norm_task, 3);
}

int npuq_add_rms_norm(npuq_pool *pool, const void *x, const void *residual, int32_t dtype, const void *gamma,
                      int64_t count, int64_t cols, float eps, void *out, void *sum) {
    struct rows rows = {.pool = pool, .x = x, .y = residual, .gamma = gamma, .dtype = dtype, .stride = (size_t)cols,
                        .count = (size_t)count, .cols = (size_t)cols, .eps = eps, .out = out, .sum = sum};
    return run_rows(rows, norm_task, 3);
}
