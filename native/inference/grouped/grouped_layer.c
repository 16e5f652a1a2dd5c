/* The rows of grouped-query attention before attention itself, and the whole block in one call. */
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"
#include "inference/scatter.h"

struct rows {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_gqa *gqa;
    const npuq_kv_cache *cache; /* NULL: nothing is written */
    const char *qkv, *cos, *sin;
    size_t stride;
    int dtype;
    const int64_t *slots;
    char *q, *k, *v; /* k and v may be NULL */
};

/* Floats of one thread: a head, twice, angles, gains, a bias; then a token's keys or values, and their codes. */
static size_t row_bytes(const npuq_gqa *gqa) {
    size_t dim = (size_t)gqa->head_dim, wide = (size_t)gqa->kv_heads * dim;
    return (7 * dim + 2 * wide) * sizeof(float);
}

struct work {
    float *x, *y, *cos, *sin, *q_norm, *k_norm, *bias, *wide;
    char *row;
};

/* Rounds floats to the compute dtype, as an operator of their own would. */
static void round_row(const struct rows *rows, float *x, size_t n, char *memory) {
    if (rows->dtype == NPUQ_F32) return;
    rows->kernels->from_float(x, n, memory, rows->dtype);
    rows->kernels->to_float(memory, rows->dtype, n, x);
}

/* One head of a token: its bias, its norm (`gain` NULL: none), and with `rotate` its rotation. Stored at `to`. */
static void run_head(const struct rows *rows, const struct work *work, const char *from, size_t head, const float *gain,
                     bool rotate, char *to) {
    const struct kernels *kernels = rows->kernels;
    const npuq_gqa *gqa = rows->gqa;
    size_t dim = (size_t)gqa->head_dim, size = size_of(rows->dtype);
    float *x = work->x;
    kernels->to_float(from + head * dim * size, rows->dtype, dim, x);
    if (gqa->bias != NULL) {
        kernels->to_float((const char *)gqa->bias + head * dim * size, rows->dtype, dim, work->bias);
        kernels->add_row(x, work->bias, dim, x);
        round_row(rows, x, dim, to);
    }
    if (gain != NULL) {
        kernels->norm_row(x, gain, dim, gqa->eps, 0, work->y);
        x = work->y;
        round_row(rows, x, dim, to);
    }
    if (rotate) {
        float *y = x == work->y ? work->x : work->y;
        size_t rope = (size_t)gqa->rope_dim;
        kernels->rope_halves_row(x, work->cos, work->sin, rope, y);
        memcpy(y + rope, x + rope, (dim - rope) * sizeof *x);
        x = y;
    }
    kernels->from_float(x, dim, to, rows->dtype);
}

/* A token's keys or values into its slot of their pages, and to `out`. */
static void keep_row(const struct rows *rows, const struct work *work, size_t token, const npuq_pages *pages, char *out) {
    size_t wide = (size_t)(rows->gqa->kv_heads * rows->gqa->head_dim), bytes = wide * size_of(rows->dtype);
    if (out != NULL) memcpy(out + token * bytes, work->row, bytes);
    if (pages == NULL || rows->slots[token] < 0) return;
    if (pages->scale == NULL) {
        scatter_row(pages, rows->slots[token], work->row);
        return;
    }
    rows->kernels->to_float(work->row, rows->dtype, wide, work->wide);
    rows->kernels->code_row(work->wide, pages->scale, wide, (int8_t *)work->row);
    scatter_row(pages, rows->slots[token], work->row);
}

static void rows_task(const void *context, size_t token, int thread) {
    const struct rows *rows = context;
    const struct kernels *kernels = rows->kernels;
    const npuq_gqa *gqa = rows->gqa;
    size_t dim = (size_t)gqa->head_dim, size = size_of(rows->dtype), rope = (size_t)gqa->rope_dim;
    size_t heads = (size_t)gqa->heads, kv_heads = (size_t)gqa->kv_heads;
    struct work work = {.x = pool_thread_scratch(rows->pool, thread)};
    work.y = work.x + dim;
    work.cos = work.y + dim;
    work.sin = work.cos + dim;
    work.q_norm = work.sin + dim;
    work.k_norm = work.q_norm + dim;
    work.bias = work.k_norm + dim;
    work.wide = work.bias + dim;
    work.row = (char *)(work.wide + kv_heads * dim);
    kernels->to_float(rows->cos + token * rope * size, rows->dtype, rope, work.cos);
    kernels->to_float(rows->sin + token * rope * size, rows->dtype, rope, work.sin);
    if (gqa->q_norm != NULL) {
        kernels->to_float(gqa->q_norm, rows->dtype, dim, work.q_norm);
        kernels->to_float(gqa->k_norm, rows->dtype, dim, work.k_norm);
    }
    const float *q_gain = gqa->q_norm == NULL ? NULL : work.q_norm, *k_gain = gqa->q_norm == NULL ? NULL : work.k_norm;
    const char *from = rows->qkv + token * rows->stride * size;
    for (size_t h = 0; h < heads; h++) {
        run_head(rows, &work, from, h, q_gain, true, rows->q + (token * heads + h) * dim * size);
    }
    for (size_t h = 0; h < kv_heads; h++) run_head(rows, &work, from, heads + h, k_gain, true, work.row + h * dim * size);
    keep_row(rows, &work, token, rows->cache == NULL ? NULL : &rows->cache->key, rows->k);
    for (size_t h = 0; h < kv_heads; h++) {
        run_head(rows, &work, from, heads + kv_heads + h, NULL, false, work.row + h * dim * size);
    }
    keep_row(rows, &work, token, rows->cache == NULL ? NULL : &rows->cache->value, rows->v);
}

static bool gqa_fits(const npuq_gqa *gqa, const npuq_kv_cache *cache, int dtype) {
    return computes(dtype) && gqa->heads > 0 && gqa->kv_heads > 0 && gqa->heads % gqa->kv_heads == 0 &&
           gqa->head_dim > 0 && gqa->rope_dim >= 0 && gqa->rope_dim % 2 == 0 && gqa->rope_dim <= gqa->head_dim &&
           (gqa->q_norm == NULL) == (gqa->k_norm == NULL) &&
           (cache == NULL || (kv_cache_fits(cache) && cache->key.channels == gqa->kv_heads * gqa->head_dim &&
                              (cache->key.scale != NULL || cache->key.dtype == dtype) &&
                              (cache->value.scale != NULL || cache->value.dtype == dtype)));
}

int npuq_gqa_rows(npuq_pool *pool, const npuq_gqa *gqa, const npuq_kv_cache *cache, const void *qkv, int32_t dtype,
                  int64_t stride, int64_t tokens, const void *cos, const void *sin, const int64_t *slots, void *q,
                  void *k, void *v) {
    if (!gqa_fits(gqa, cache, dtype) || tokens < 0) return NPUQ_BAD_SIZE;
    if (cache != NULL && !slots_fit(&cache->key, slots, tokens)) return NPUQ_BAD_INDEX;
    struct rows rows = {pool, pool_kernels(pool), gqa, cache, qkv, cos, sin, (size_t)stride, dtype, slots, q, k, v};
    pool_begin(pool);
    int status = pool_scratch(pool, row_bytes(gqa), 0);
    if (status == NPUQ_OK) pool_run(pool, rows_task, &rows, (size_t)tokens);
    pool_end(pool);
    return status;
}

int npuq_gqa_decode(npuq_pool *pool, const npuq_gqa *gqa, const npuq_kv_cache *cache, const void *x, int32_t dtype,
                    int64_t tokens, const void *cos, const void *sin, const int64_t *slots, const int64_t *q_ends,
                    const int64_t *kv_lens, int64_t sequences, const int32_t *table, int64_t table_stride,
                    float softmax_scale, void *out) {
    if (!gqa_fits(gqa, cache, dtype) || cache == NULL || tokens < 0) return NPUQ_BAD_SIZE;
    int64_t heads = gqa->heads, dim = gqa->head_dim, width = (heads + 2 * gqa->kv_heads) * dim;
    if (gqa->qkv->outputs != width || (gqa->o != NULL && gqa->o->cols != heads * dim)) return NPUQ_BAD_SIZE;
    if (sequences < 1 || q_ends[sequences - 1] != tokens) return NPUQ_BAD_INDEX;
    size_t size = size_of(dtype), values = (size_t)(tokens * heads * dim) * size;
    values = (values + 63) / 64 * 64;
    pool_begin(pool);
    char *q = pool_workspace(pool, 2 * values + (size_t)(tokens * width) * size);
    int status = q == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    char *attended = q == NULL ? NULL : q + values, *qkv = q == NULL ? NULL : attended + values;
    if (status == NPUQ_OK) status = npuq_linear(pool, gqa->qkv, x, dtype, gqa->qkv->cols, tokens, qkv, dtype);
    if (status == NPUQ_OK) {
        status = npuq_gqa_rows(pool, gqa, cache, qkv, dtype, width, tokens, cos, sin, slots, q, NULL, NULL);
    }
    if (status == NPUQ_OK) {
        status = npuq_grouped_attention_paged(pool, cache, q, dtype, heads, gqa->kv_heads, dim, q_ends, kv_lens,
                                              sequences, table, table_stride, softmax_scale, gqa->o == NULL ? out : attended);
    }
    if (status == NPUQ_OK && gqa->o != NULL) {
        status = npuq_linear(pool, gqa->o, attended, dtype, heads * dim, tokens, out, dtype);
    }
    pool_end(pool);
    return status;
}
