/* Rope, the paged cache in NZ layout, and absorbed attention on it. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"

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

/* Channels of one token into its slot: [block, channel / group, offset, channel % group]. */
static void scatter(void *pool, int dtype, size_t block_size, size_t channels, int64_t slot, const void *row) {
    size_t bytes = nz_channels(dtype) * size_of(dtype), groups = channels / nz_channels(dtype);
    size_t block = (size_t)slot / block_size, offset = (size_t)slot % block_size;
    for (size_t g = 0; g < groups; g++) {
        size_t at = (block * groups + g) * block_size + offset;
        memcpy((char *)pool + at * bytes, (const char *)row + g * bytes, bytes);
    }
}

/* The latent as it is stored: `row` as it is, or codes of it. `x` is float scratch. */
static void scatter_latent(const struct cache_write *write, int64_t slot, const char *row, float *x, int8_t *codes) {
    const npuq_latent_cache *cache = write->cache;
    size_t l = (size_t)cache->latent.channels;
    if (cache->latent.scale != NULL) {
        write->kernels->to_float(row, cache->rope.dtype, l, x);
        write->kernels->code_row(x, cache->latent.scale, l, codes);
    }
    const void *stored = cache->latent.scale != NULL ? (const void *)codes : row;
    scatter(cache->latent.rows, cache->latent.dtype, (size_t)cache->latent.block_size, l, slot, stored);
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
    if (slot >= 0) scatter(cache->rope.rows, dtype, (size_t)cache->latent.block_size, d, slot, stored);
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

/* Heads that share a task: its keys come from memory once for all of them, and from L2 for all but the first. Their
 * floats stay in L2 too. */
enum { TASK_HEADS = 32 };

struct attention {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_latent_cache *cache;
    const char *q_latent, *q_rope;
    size_t heads, heads_per_task, tasks_per_token;
    const int64_t *q_ends, *kv_lens;
    const int32_t *table;
    size_t sequences, table_stride;
    float scale;
    char *out;
};

/* A query as int8 keys see it: times their channels' scales, and rounded to int8 itself. `codes` is scratch. */
static void round_query(const struct attention *attention, float *q, int8_t *codes) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels;
    float scale;
    for (size_t i = 0; i < l; i++) q[i] *= cache->latent.scale[i];
    attention->kernels->quant_row(q, l, codes, &scale);
    for (size_t i = 0; i < l; i++) q[i] = (float)codes[i] * scale;
}

static void load_query(const struct attention *attention, size_t row, float *q, int8_t *codes) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels, size = size_of(cache->rope.dtype);
    attention->kernels->to_float(attention->q_latent + row * l * size, cache->rope.dtype, l, q);
    if (cache->latent.scale != NULL) round_query(attention, q, codes);
    attention->kernels->to_float(attention->q_rope + row * d * size, cache->rope.dtype, d, q + l);
    for (size_t i = 0; i < l + d; i++) q[i] *= attention->scale;
}

/* Some keys of one cache block, and their place in it. */
struct place {
    const char *latent, *rope; /* the block */
    size_t first, keys;
};

/* The sequence's keys from `key` on, of `keys` in all: as many as a tile takes of one block. */
static struct place find_keys(const struct attention *attention, size_t sequence, size_t key, size_t keys) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels;
    size_t block_size = (size_t)cache->latent.block_size;
    if (key >= keys) return (struct place){0};
    size_t block = (size_t)attention->table[sequence * attention->table_stride + key / block_size];
    size_t first = key % block_size, some = block_size - first;
    some = some < ATTENTION_KEYS ? some : ATTENTION_KEYS;
    some = some < keys - key ? some : keys - key;
    return (struct place){
        .latent = (const char *)cache->latent.rows + block * l * block_size * size_of(cache->latent.dtype),
        .rope = (const char *)cache->rope.rows + block * d * block_size * size_of(cache->rope.dtype),
        .first = first,
        .keys = some,
    };
}

static const char *first_row(const char *block, int dtype, size_t first) {
    return block == NULL ? NULL : block + first * nz_channels(dtype) * size_of(dtype);
}

/* A task's floats, head after head. */
struct gathered {
    float *q, *out; /* [heads, latent + rope], [heads, latent] */
    float largest[TASK_HEADS], total[TASK_HEADS];
};

/* Merges a tile's keys into all heads of a task: the first of them fetch the keys that follow. */
static void attend_heads(const struct attention *attention, const struct place *now, const struct place *next,
                         size_t heads, struct gathered *in) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels;
    for (size_t head = 0; head < heads; head += ATTENTION_HEADS) {
        struct attention_tile tile = {
            .latent = now->latent, .rope = now->rope, .dtype = cache->rope.dtype, .latent_dtype = cache->latent.dtype,
            .block_size = (size_t)cache->latent.block_size, .first = now->first, .keys = now->keys, .latent_dim = l,
            .rope_dim = d, .heads = heads - head < ATTENTION_HEADS ? heads - head : ATTENTION_HEADS,
            .q = in->q + head * (l + d),
            .next_latent = head > 0 ? NULL : first_row(next->latent, cache->latent.dtype, next->first),
            .next_rope = head > 0 ? NULL : first_row(next->rope, cache->rope.dtype, next->first),
            .largest = in->largest + head, .total = in->total + head, .out = in->out + head * l,
        };
        attention->kernels->attend(&tile);
    }
}

/* Some heads of one query token, over all the keys it sees. */
static void attention_task(const void *context, size_t index, int thread) {
    const struct attention *attention = context;
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels;
    size_t token = index / attention->tasks_per_token, sequence = 0;
    size_t head = index % attention->tasks_per_token * attention->heads_per_task, left = attention->heads - head;
    size_t heads = left < attention->heads_per_task ? left : attention->heads_per_task;
    while ((size_t)attention->q_ends[sequence] <= token) sequence++;
    /* The sequence's last query sees all of its keys, the one before all but one, … */
    int64_t seen = attention->kv_lens[sequence] - (attention->q_ends[sequence] - 1 - (int64_t)token);
    size_t keys = seen > 0 ? (size_t)seen : 0;

    struct gathered in = {.q = pool_thread_scratch(attention->pool, thread)};
    in.out = in.q + heads * (l + d);
    for (size_t h = 0; h < heads; h++) {
        load_query(attention, token * attention->heads + head + h, in.q + h * (l + d), (int8_t *)in.out);
        in.largest[h] = -INFINITY;
    }
    memset(in.out, 0, heads * l * sizeof *in.out);
    struct place now = find_keys(attention, sequence, 0, keys);
    for (size_t key = 0; key < keys;) {
        key += now.keys;
        struct place next = find_keys(attention, sequence, key, keys);
        attend_heads(attention, &now, &next, heads, &in);
        now = next;
    }
    for (size_t h = 0; h < heads; h++) {
        float total = in.total[h], *out = in.out + h * l;
        float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
        for (size_t c = 0; c < l; c++) out[c] *= share;
        if (cache->latent.scale != NULL) {
            for (size_t c = 0; c < l; c++) out[c] *= cache->latent.scale[c];
        }
        size_t row = token * attention->heads + head + h;
        char *to = attention->out + row * l * size_of(cache->rope.dtype);
        attention->kernels->from_float(out, l, to, cache->rope.dtype);
    }
}

/* As many heads as share their keys best, but several tasks for every thread; and one, where there are very few. */
static size_t heads_per_task(size_t tokens, size_t heads, size_t threads) {
    size_t most = TASK_HEADS;
    while (most > ATTENTION_HEADS && tokens * ((heads + most - 1) / most) < threads * 4) most /= 2;
    while (most > 1 && tokens * ((heads + most - 1) / most) < threads) most /= 2;
    return most;
}

int npuq_attention_paged(npuq_pool *pool, const npuq_latent_cache *cache, const void *q_latent, const void *q_rope,
                         int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                         const int32_t *table, int64_t table_stride, float softmax_scale, void *out) {
    if (!latent_cache_fits(cache) || heads < 1) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(&cache->latent, kv_lens, sequences, table, table_stride)) {
        return NPUQ_BAD_INDEX;
    }
    if (sequences == 0) return NPUQ_OK;
    size_t tokens = (size_t)q_ends[sequences - 1];
    size_t per_task = heads_per_task(tokens, (size_t)heads, (size_t)pool_threads(pool));
    struct attention attention = {
        .pool = pool, .kernels = pool_kernels(pool), .cache = cache, .q_latent = q_latent, .q_rope = q_rope,
        .heads = (size_t)heads, .heads_per_task = per_task, .tasks_per_token = ((size_t)heads + per_task - 1) / per_task,
        .q_ends = q_ends, .kv_lens = kv_lens, .table = table, .sequences = (size_t)sequences,
        .table_stride = (size_t)table_stride, .scale = softmax_scale, .out = out,
    };
    size_t floats = per_task * (size_t)(2 * cache->latent.channels + cache->rope.channels);
    pool_begin(pool);
    int status = pool_scratch(pool, floats * sizeof(float), 0);
    if (status == NPUQ_OK) pool_run(pool, attention_task, &attention, tokens * attention.tasks_per_token);
    pool_end(pool);
    return status;
}
