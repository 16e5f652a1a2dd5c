/* Grouped-query attention: query heads that share a head of keys and values are rows of one product.
 *
 * A task takes some queries of one sequence, all heads of one group, and goes through their keys in tiles. A query that is
 * alone in its sequence has its keys divided into spans, so that threads share a long context: their results are merged.
 * Neither depends on the number of threads, nor on that of heads. */
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "common/checks.h"
#include "inference/grouped/grouped.h"

enum { ROWS = 128, SPAN = 16 * KEYS };

static void store(const struct grouped *grouped, int64_t token, size_t head, float total, float *row) {
    float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
    grouped->kernels->multiply_row(share, grouped->dim, row);
    size_t place = (size_t)token * grouped->heads + head;
    grouped->kernels->from_float(row, grouped->dim, grouped->out + place * grouped->dim * size_of(grouped->dtype), grouped->dtype);
}

static void grouped_task(const void *context, size_t index, int thread) {
    const struct grouped *grouped = context;
    const struct block *block = &grouped->blocks[index / grouped->kv_heads];
    size_t head = index % grouped->kv_heads, group = grouped->group, dim = grouped->dim;
    const struct gathered in = grouped->arithmetic->attend(grouped, block, head, pool_thread_scratch(grouped->pool, thread));
    for (size_t row = 0; row < (size_t)block->count * group; row++) {
        float *out = in.out + row * dim;
        if (block->partial == NULL) {
            store(grouped, block->first + (int64_t)(row / group), head * group + row % group, in.total[row], out);
        } else {
            float *to = block->partial + (head * group + row) * (dim + 2);
            to[0] = in.largest[row];
            to[1] = in.total[row];
            memcpy(to + 2, out, dim * sizeof *out);
        }
    }
}

/* The spans of one head of one query, into the first of them. `index`: block after block, head after head. */
static void merge_task(const void *context, size_t index, int thread) {
    (void)thread;
    const struct grouped *grouped = context;
    const struct block *block = &grouped->blocks[index / grouped->heads];
    if (block->partial == NULL || block->key > 0) return; /* no span, or not the first */
    size_t head = index % grouped->heads, dim = grouped->dim;
    size_t spans = 1;
    while (block[spans - 1].end < seen_by(grouped, block, 0)) spans++;
    float largest = -INFINITY;
    for (size_t s = 0; s < spans; s++) {
        const float *part = block[s].partial + head * (dim + 2);
        largest = part[0] > largest ? part[0] : largest;
    }
    float total = 0, *sum = block->partial + head * (dim + 2) + 2;
    for (size_t s = 0; s < spans; s++) {
        const float *part = block[s].partial + head * (dim + 2);
        float weight = part[0] == -INFINITY ? 0 : expf(part[0] - largest);
        total += weight * part[1];
        if (s == 0) grouped->kernels->multiply_row(weight, dim, sum);
        else grouped->kernels->scale_add_row(weight, part + 2, dim, sum);
    }
    store(grouped, block->first, head, total, sum);
}

/* Lists the blocks of a step, `blocks` NULL to count them; `floats`: of spans' results. */
static size_t list_blocks(const struct grouped *grouped, int64_t sequences, struct block *blocks, float *partial, size_t *floats) {
    size_t count = 0, part = grouped->heads * (grouped->dim + 2);
    int64_t most = (int64_t)(grouped->rows / grouped->group);
    *floats = 0;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t start = s > 0 ? grouped->q_ends[s - 1] : 0, stop = grouped->q_ends[s];
        for (int64_t first = start; first < stop; first += most) {
            struct block block = {.sequence = s, .first = first, .count = stop - first < most ? stop - first : most};
            int64_t seen = seen_by(grouped, &block, block.count - 1);
            bool divided = stop - start == 1 && seen > SPAN;
            do {
                block.end = divided && seen - block.key > SPAN ? block.key + SPAN : seen;
                if (blocks != NULL) {
                    if (divided) block.partial = partial + *floats;
                    blocks[count] = block;
                }
                if (divided) *floats += part;
                count++;
                block.key = block.end;
            } while (block.key < seen);
        }
    }
    return count;
}

static int run(struct grouped *grouped, int64_t sequences) {
    npuq_pool *pool = grouped->pool;
    size_t floats = 0;
    grouped->kernels = pool_kernels(pool);
    grouped->group = grouped->heads / grouped->kv_heads;
    grouped->rows = grouped->group > ROWS ? grouped->group : ROWS / grouped->group * grouped->group;
    grouped->arithmetic = grouped_takes_bf16(grouped) ? &grouped_bf16 : &grouped_float;
    size_t blocks = list_blocks(grouped, sequences, NULL, NULL, &floats);
    pool_begin(pool);
    int status = pool_scratch(pool, grouped->arithmetic->task_bytes(grouped), (floats + 1) * sizeof(float) + blocks * sizeof(struct block));
    if (status == NPUQ_OK) {
        float *partial = pool_shared_scratch(pool);
        struct block *listed = (struct block *)(partial + floats + floats % 2);
        list_blocks(grouped, sequences, listed, partial, &floats);
        grouped->blocks = listed;
        pool_run(pool, grouped_task, grouped, blocks * grouped->kv_heads);
        if (floats > 0) pool_run(pool, merge_task, grouped, blocks * grouped->heads);
    }
    pool_end(pool);
    return status;
}

static bool heads_fit(const npuq_kv_cache *cache, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    return kv_cache_fits(cache) && kv_heads > 0 && head_dim > 0 && heads > 0 && heads % kv_heads == 0 &&
           cache->key.channels == kv_heads * head_dim;
}

int npuq_grouped_attention_paged(npuq_pool *pool, const npuq_kv_cache *cache, const void *q, int32_t dtype,
                                 int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                                 const int64_t *kv_lens, int64_t sequences, const int32_t *table, int64_t table_stride,
                                 float softmax_scale, void *out) {
    if (!heads_fit(cache, heads, kv_heads, head_dim) || !computes(dtype)) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(&cache->key, kv_lens, sequences, table, table_stride)) {
        return NPUQ_BAD_INDEX;
    }
    struct grouped grouped = {
        .pool = pool, .cache = cache, .table = table, .table_stride = (size_t)table_stride, .q_ends = q_ends,
        .kv_lens = kv_lens, .q = q, .heads = (size_t)heads, .kv_heads = (size_t)kv_heads, .dim = (size_t)head_dim,
        .causal = 1, .dtype = dtype, .scale = softmax_scale, .out = out,
    };
    return run(&grouped, sequences);
}

int npuq_grouped_attention(npuq_pool *pool, const void *q, const void *key, const void *value, int32_t dtype,
                           int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                           const int64_t *kv_lens, int64_t sequences, int64_t keys, float softmax_scale, int32_t causal,
                           void *out) {
    npuq_pages rows = {.blocks = 1, .block_size = keys > 0 ? keys : 1, .channels = kv_heads * head_dim, .dtype = dtype,
                       .layout = NPUQ_ND};
    npuq_kv_cache cache = {rows, rows};
    cache.key.rows = (void *)key;
    cache.value.rows = (void *)value;
    if (keys < 0 || !heads_fit(&cache, heads, kv_heads, head_dim)) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !groups_fit(kv_lens, sequences, keys)) return NPUQ_BAD_INDEX;
    struct grouped grouped = {
        .pool = pool, .cache = &cache, .q_ends = q_ends, .kv_lens = kv_lens, .q = q, .heads = (size_t)heads,
        .kv_heads = (size_t)kv_heads, .dim = (size_t)head_dim, .causal = causal, .dtype = dtype,
        .scale = softmax_scale, .out = out,
    };
    return run(&grouped, sequences);
}
