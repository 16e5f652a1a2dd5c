/* Rope, and writing of the paged latent cache. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"
#include "inference/scatter.h"

struct rope {
    npuq_pool *pool;
    const struct kernels *kernels;
    const char *x, *cos, *sin;
    int dtype;
    size_t token_stride, head_stride, heads, dim;
    char *out;
};

/* One token, all heads: they share its angles. */
static void rope_task(const void *context, size_t token, int thread) {
    const struct rope *rope = context;
    const struct kernels *kernels = rope->kernels;
    size_t n = rope->dim, size = size_of(rope->dtype);
    float *cos = pool_thread_scratch(rope->pool, thread), *sin = cos + n, *x = sin + n, *y = x + n;
    kernels->to_float(rope->cos + token * n * size, rope->dtype, n, cos);
    kernels->to_float(rope->sin + token * n * size, rope->dtype, n, sin);
    for (size_t h = 0; h < rope->heads; h++) {
        kernels->to_float(rope->x + (token * rope->token_stride + h * rope->head_stride) * size, rope->dtype, n, x);
        kernels->rope_row(x, cos, sin, n, y);
        kernels->from_float(y, n, rope->out + (token * rope->heads + h) * n * size, rope->dtype);
    }
}

int npuq_interleave_rope(npuq_pool *pool, const void *x, int32_t dtype, int64_t token_stride, int64_t head_stride,
                         int64_t tokens, int64_t heads, int64_t dim, const void *cos, const void *sin, void *out) {
    if (!computes(dtype) || tokens < 0 || heads < 0 || dim < 0 || dim % 2) return NPUQ_BAD_SIZE;
    struct rope rope = {pool, pool_kernels(pool), x, cos, sin, dtype, (size_t)token_stride, (size_t)head_stride,
                        (size_t)heads, (size_t)dim, out};
    pool_begin(pool);
    int status = pool_scratch(pool, 4 * rope.dim * sizeof(float), 0);
    if (status == NPUQ_OK) pool_run(pool, rope_task, &rope, (size_t)tokens);
    pool_end(pool);
    return status;
}

struct cache_write {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_latent_cache *cache;
    const char *kv, *gamma, *cos, *sin;
    size_t stride;
    const int64_t *slots;
    float eps;
    char *rope_out, *latent_out;
};

/* The latent as it is stored: `row` as it is, or codes of it. `x` is float scratch. */
static void scatter_latent(const struct cache_write *write, int64_t slot, const char *row, float *x, int8_t *codes) {
    const npuq_latent_cache *cache = write->cache;
    size_t l = (size_t)cache->latent.channels;
    if (cache->latent.scale != NULL) {
        write->kernels->to_float(row, cache->rope.dtype, l, x);
        write->kernels->code_row(x, cache->latent.scale, l, codes);
    }
    scatter_row(&cache->latent, slot, cache->latent.scale != NULL ? (const void *)codes : row);
}

static void cache_write_task(const void *context, size_t token, int thread) {
    const struct cache_write *write = context;
    const struct kernels *kernels = write->kernels;
    const npuq_latent_cache *cache = write->cache;
    int dtype = cache->rope.dtype;
    size_t size = size_of(dtype), l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels;
    size_t widest = l > d ? l : d;
    float *x = pool_thread_scratch(write->pool, thread), *y = x + widest, *first = y + widest, *second = first + widest;
    char *stored = (char *)(second + widest);
    const char *row = write->kv + token * write->stride * size;
    int64_t slot = write->slots[token];

    kernels->to_float(row, dtype, l, x);
    kernels->to_float(write->gamma, dtype, l, first);
    kernels->norm_row(x, first, l, write->eps, 0, y);
    kernels->from_float(y, l, stored, dtype);
    if (slot >= 0) scatter_latent(write, slot, stored, x, (int8_t *)y);
    if (write->latent_out != NULL) memcpy(write->latent_out + token * l * size, stored, l * size);

    kernels->to_float(row + l * size, dtype, d, x);
    kernels->to_float(write->cos + token * d * size, dtype, d, first);
    kernels->to_float(write->sin + token * d * size, dtype, d, second);
    kernels->rope_row(x, first, second, d, y);
    kernels->from_float(y, d, stored, dtype);
    if (slot >= 0) scatter_row(&cache->rope, slot, stored);
    if (write->rope_out != NULL) memcpy(write->rope_out + token * d * size, stored, d * size);
}

int npuq_kv_cache_write(npuq_pool *pool, const npuq_latent_cache *cache, const void *kv, int64_t stride,
                        const void *gamma, const void *cos, const void *sin, const int64_t *slots, int64_t tokens, float eps,
                        void *rope_out, void *latent_out) {
    if (!latent_cache_fits(cache) || tokens < 0) return NPUQ_BAD_SIZE;
    if (!slots_fit(&cache->latent, slots, tokens)) return NPUQ_BAD_INDEX;
    struct cache_write write = {pool, pool_kernels(pool), cache, kv, gamma, cos, sin, (size_t)stride, slots, eps,
                                rope_out, latent_out};
    int64_t l = cache->latent.channels, d = cache->rope.channels;
    pool_begin(pool);
    int status = pool_scratch(pool, 5 * (size_t)(l > d ? l : d) * sizeof(float), 0);
    if (status == NPUQ_OK) pool_run(pool, cache_write_task, &write, (size_t)tokens);
    pool_end(pool);
    return status;
}
