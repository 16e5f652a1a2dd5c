/* Matrix products: the computation of a task, and its memory. The arithmetic is in kernels/, the cutting in tasks.c. */
#include <stdbool.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"
#include "inference/products/tasks.h"

enum {
    /* Weight bytes a task reads when it is bound by memory: long enough to stream, short enough to share out evenly. */
    STREAM_BYTES = 384 << 10,
    /* Spread weights a task keeps in L2 while the tokens pass by. */
    CACHED_BYTES = 128 << 10,
    /* More tokens than this, and a task is bound by arithmetic. */
    MEMORY_BOUND_TOKENS = 8,
    /* Tokens whose sums are held at a time. */
    TOKEN_CHUNK = 48,
    /* Rows are cut at multiples of this: a tile's height, and a whole number of packed rows. */
    ROW_UNIT = 8,
};

struct product {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_weights *weights;
    const struct task *tasks;
    const int8_t *x8;
    const float *x_scale; /* NULL: out gets the sums of codes as they are, int32 */
    const int32_t *x_sum;
    const float *xf;
    const uint16_t *xb; /* bf16 rows for bf16 weights, where the level multiplies them as they are; else NULL */
    void *out;
    int out_dtype;
    size_t rows_per_task, count;
};

/* Rows a task of this product takes: `bytes` of them, but enough tasks for every thread to have several. */
static size_t rows_per_task(const npuq_weights *weights, size_t row_bytes, size_t bytes, size_t active, int threads) {
    size_t rows = bytes / (row_bytes + 1), most = (size_t)weights->outputs * active / ((size_t)threads * 4);
    rows = rows < most ? rows : most;
    rows = rows / ROW_UNIT * ROW_UNIT;
    return rows < ROW_UNIT ? ROW_UNIT : rows;
}

static void *out_at(const struct product *product, int64_t token, int64_t column) {
    size_t index = (size_t)token * (size_t)product->weights->outputs + (size_t)column;
    return (char *)product->out + index * size_of(product->out_dtype);
}

/* The weights of the task that this thread will probably take after number `index`; nothing before its last tokens. */
static struct following following_task(const struct product *product, size_t index, int64_t tokens_left) {
    index += (size_t)pool_threads(product->pool);
    if (index >= product->count || tokens_left > TOKEN_CHUNK) return (struct following){NULL, 0};
    const npuq_weights *weights = product->weights;
    const struct task *task = &product->tasks[index];
    const npuq_part *part = &weights->part[task->group * weights->parts + task->part];
    const size_t packed = weights->dtype == NPUQ_I4 ? 2 : 1, row = (size_t)weights->cols * size_of(weights->dtype);
    const uint8_t *first = (const uint8_t *)part->weight + (size_t)task->first / packed * row;
    return (struct following){first, (size_t)task->rows / packed * row};
}

/* The sums themselves. They wrap where the product wrapped. */
static void store_sums(const int32_t *acc, int32_t correction, size_t rows, int32_t *out) {
    for (size_t r = 0; r < rows; r++) out[r] = (int32_t)((uint32_t)acc[r] - (uint32_t)correction);
}

static void integer_task(const void *context, size_t index, int thread) {
    const struct product *product = context;
    const struct kernels *kernels = product->kernels;
    const struct task *task = &product->tasks[index];
    const npuq_part *part = &product->weights->part[task->group * product->weights->parts + task->part];
    size_t k = (size_t)product->weights->cols, rows = (size_t)task->rows;
    bool packed = product->weights->dtype == NPUQ_I4, spread = packed && (size_t)task->tokens > kernels->direct_tokens;
    const uint8_t *w = (const uint8_t *)part->weight + (size_t)(packed ? task->first / 2 : task->first) * k;
    size_t ldacc = product->rows_per_task;
    int32_t *acc = pool_thread_scratch(product->pool, thread);
    if (spread) {
        uint8_t *wide = (uint8_t *)(acc + ldacc * TOKEN_CHUNK);
        kernels->unpack_w4(w, rows, k, wide);
        w = wide;
    }
    int32_t offset = packed ? kernels->offset_w4 : kernels->offset_w8;
    for (int64_t done = 0; done < task->tokens; done += TOKEN_CHUNK) {
        int64_t first = task->token + done, left = task->tokens - done;
        size_t tokens = left < TOKEN_CHUNK ? (size_t)left : TOKEN_CHUNK;
        const int8_t *x = product->x8 + (size_t)first * k;
        if (spread) kernels->dot_u4(w, rows, x, tokens, k, acc, ldacc);
        else if (packed) kernels->dot_w4(w, rows, x, tokens, k, acc, ldacc);
        else kernels->dot_w8((const int8_t *)w, rows, x, tokens, k, acc, ldacc, following_task(product, index, left));
        for (size_t t = 0; t < tokens; t++) {
            int64_t token = first + (int64_t)t;
            int32_t correction = (int32_t)((uint32_t)offset * (uint32_t)product->x_sum[token]);
            if (product->x_scale == NULL) {
                store_sums(acc + t * ldacc, correction, rows, out_at(product, token, task->column));
                continue;
            }
            kernels->scale_row(acc + t * ldacc, correction, part->scale + task->first, product->x_scale[token], rows,
                               out_at(product, token, task->column), product->out_dtype);
        }
    }
}

static void float_task(const void *context, size_t index, int thread) {
    const struct product *product = context;
    const struct kernels *kernels = product->kernels;
    const struct task *task = &product->tasks[index];
    const npuq_weights *weights = product->weights;
    const npuq_part *part = &weights->part[task->group * weights->parts + task->part];
    size_t k = (size_t)weights->cols, rows = (size_t)task->rows, ldacc = product->rows_per_task;
    const char *w = (const char *)part->weight + (size_t)task->first * k * size_of(weights->dtype);
    float *acc = pool_thread_scratch(product->pool, thread);
    for (int64_t done = 0; done < task->tokens; done += TOKEN_CHUNK) {
        int64_t first = task->token + done, left = task->tokens - done;
        size_t tokens = left < TOKEN_CHUNK ? (size_t)left : TOKEN_CHUNK;
        const struct following following = following_task(product, index, left);
        const size_t from = (size_t)first * k;
        if (product->xb != NULL) {
            kernels->dot_bf16((const uint16_t *)(const void *)w, rows, product->xb + from, tokens, k, acc, ldacc, following);
        } else {
            kernels->dot_float(w, weights->dtype, k, rows, product->xf + from, k, tokens, k, acc, ldacc, following);
        }
        for (size_t t = 0; t < tokens; t++) {
            void *out = out_at(product, first + (int64_t)t, task->column);
            kernels->from_float(acc + t * ldacc, rows, out, product->out_dtype);
        }
    }
}

struct token_rows {
    const struct kernels *kernels;
    const void *x;
    int dtype;
    size_t k, m;
    int32_t *sum;
    float *wide;
};

/* Σ x of int8 rows, or float rows widened, once for all tasks of the product. Some rows a task. */
enum { PREPARED_ROWS = 16 };

static void prepare_task(const void *context, size_t index, int thread) {
    (void)thread;
    const struct token_rows *rows = context;
    size_t end = (index + 1) * PREPARED_ROWS < rows->m ? (index + 1) * PREPARED_ROWS : rows->m;
    for (size_t t = index * PREPARED_ROWS; t < end; t++) {
        if (rows->dtype == NPUQ_I8) {
            rows->sum[t] = rows->kernels->sum_i8((const int8_t *)rows->x + t * rows->k, rows->k);
        } else {
            const char *x = (const char *)rows->x + t * rows->k * size_of(rows->dtype);
            rows->kernels->to_float(x, rows->dtype, rows->k, rows->wide + t * rows->k);
        }
    }
}

static size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

/* Tells the pool what the first tasks read: rows of one part, one task behind the other. */
static void note_weights(npuq_pool *pool, const npuq_weights *weights, const struct task *first) {
    const npuq_part *part = &weights->part[first->group * weights->parts + first->part];
    const size_t packed = weights->dtype == NPUQ_I4 ? 2 : 1, row = (size_t)weights->cols * size_of(weights->dtype);
    const size_t step = (size_t)first->rows / packed * row, bytes = (size_t)part->rows / packed * row;
    pool_note(pool, weights->part, (struct weights_read){part->weight, step, bytes});
}

/* npuq_matmul of the groups that have tokens, at least one. */
static int run_product(npuq_pool *pool, const npuq_weights *weights, const void *x, int x_dtype, const float *x_scale,
                       const struct active *active, size_t groups, int64_t m, void *out, int out_dtype) {
    size_t k = (size_t)weights->cols, tokens = (size_t)m, most = (size_t)active[groups - 1].tokens;
    const struct kernels *kernels = pool_kernels(pool);
    bool integer = x_dtype == NPUQ_I8;
    bool in_bf16 = weights->dtype == NPUQ_BF16 && x_dtype == NPUQ_BF16 && kernels->dot_bf16 != NULL;
    bool spread = weights->dtype == NPUQ_I4 && most > kernels->direct_tokens;
    size_t row_bytes = spread ? k : weights->dtype == NPUQ_I4 ? k / 2 : k * size_of(weights->dtype);
    size_t bytes = most > MEMORY_BOUND_TOKENS ? CACHED_BYTES : STREAM_BYTES;
    size_t least = weights->dtype == NPUQ_I8 ? kernels->w8_rows * (row_bytes + 1) : 0;
    if (most > MEMORY_BOUND_TOKENS && bytes < least) bytes = least;
    size_t step = rows_per_task(weights, row_bytes, bytes, groups, pool_threads(pool));
    size_t count = count_tasks(weights, active, groups, step);
    if (count == 0) return NPUQ_OK; /* no row of weights */
    size_t task_bytes = aligned(count * sizeof(struct task));
    size_t token_bytes = integer ? aligned(tokens * sizeof(int32_t)) : x_dtype == NPUQ_F32 || in_bf16 ? 0 : tokens * k * 4;
    size_t thread_bytes = step * TOKEN_CHUNK * sizeof(int32_t) + (spread ? step * k : 0);

    int status = pool_scratch(pool, thread_bytes, 2 * task_bytes + token_bytes);
    if (status != NPUQ_OK) return status;
    struct task *tasks = pool_shared_scratch(pool), *sorted = (struct task *)((char *)tasks + task_bytes);
    void *prepared = (char *)sorted + task_bytes;
    list_tasks(weights, active, groups, (int64_t)step, sorted);
    if (groups > 1) mix_tasks(sorted, count, tasks);
    struct token_rows rows = {kernels, x, x_dtype, k, tokens, prepared, prepared};
    if (token_bytes > 0) pool_run(pool, prepare_task, &rows, (tokens + PREPARED_ROWS - 1) / PREPARED_ROWS);
    struct product product = {
        .pool = pool, .kernels = kernels, .weights = weights, .tasks = groups > 1 ? tasks : sorted, .x8 = x,
        .x_scale = x_scale, .x_sum = prepared, .xf = x_dtype == NPUQ_F32 ? x : prepared,
        .xb = in_bf16 ? x : NULL, .out = out,
        .out_dtype = out_dtype, .rows_per_task = step, .count = count,
    };
    note_weights(pool, weights, product.tasks);
    pool_run(pool, integer ? integer_task : float_task, &product, count);
    return NPUQ_OK;
}

/* Products of all groups. x_scale NULL: of codes, their sums. */
static int multiply(npuq_pool *pool, const npuq_weights *weights, const void *x, int x_dtype, const float *x_scale,
                    const int64_t *group_rows, int64_t m, void *out, int out_dtype) {
    if (m == 0) return NPUQ_OK;
    pool_begin(pool);
    struct active *active = pool_workspace(pool, (size_t)weights->groups * sizeof *active);
    int status = NPUQ_NO_MEMORY;
    if (active != NULL) {
        const size_t groups = list_active(weights->groups, group_rows, m, active);
        status = NPUQ_OK;
        if (groups > 0) status = run_product(pool, weights, x, x_dtype, x_scale, active, groups, m, out, out_dtype);
    }
    pool_end(pool);
    return status;
}

int npuq_matmul(npuq_pool *pool, const npuq_weights *weights, const void *x, int32_t x_dtype, const float *x_scale,
                const int64_t *group_rows, int64_t m, void *out, int32_t out_dtype) {
    const bool fits = is_integer(weights->dtype) ? x_dtype == NPUQ_I8 && (m == 0 || x_scale != NULL)
                                                 : is_float(weights->dtype) && computes(x_dtype);
    if (!fits || !computes(out_dtype) || m < 0 || (group_rows == NULL && weights->groups != 1)) return NPUQ_BAD_SIZE;
    if (group_rows != NULL && !groups_fit(group_rows, weights->groups, m)) return NPUQ_BAD_INDEX;
    return multiply(pool, weights, x, x_dtype, x_scale, group_rows, m, out, out_dtype);
}

int npuq_integer_sums(npuq_pool *pool, const npuq_weights *weights, const int8_t *x, int64_t m, int32_t *sums) {
    if (weights->dtype != NPUQ_I8 || weights->groups != 1 || m < 0) return NPUQ_BAD_SIZE;
    /* Sums are as wide as F32. */
    return multiply(pool, weights, x, NPUQ_I8, NULL, NULL, m, sums, NPUQ_F32);
}

struct scaling {
    const struct kernels *kernels;
    const npuq_weights *weights;
    const int32_t *sums;
    const float *x_scale;
    char *out;
    int out_dtype;
};

static void scale_task(const void *context, size_t token, int thread) {
    (void)thread;
    const struct scaling *scaling = context;
    const npuq_weights *weights = scaling->weights;
    size_t at = token * (size_t)weights->outputs;
    for (int64_t p = 0; p < weights->parts; p++) {
        const npuq_part *part = &weights->part[p];
        scaling->kernels->scale_row(scaling->sums + at, 0, part->scale, scaling->x_scale[token], (size_t)part->rows,
                                    scaling->out + at * size_of(scaling->out_dtype), scaling->out_dtype);
        at += (size_t)part->rows;
    }
}

int npuq_scale_sums(npuq_pool *pool, const npuq_weights *weights, const int32_t *sums, const float *x_scale, int64_t m,
                    void *out, int32_t out_dtype) {
    if (weights->dtype != NPUQ_I8 || weights->groups != 1 || m < 0 || !computes(out_dtype)) return NPUQ_BAD_SIZE;
    struct scaling scaling = {pool_kernels(pool), weights, sums, x_scale, out, out_dtype};
    pool_begin(pool);
    pool_run(pool, scale_task, &scaling, (size_t)m);
    pool_end(pool);
    return NPUQ_OK;
}
