/* Attention of many queries over decompressed keys and values, a block of queries of one head at a time: keys pass by
 * in blocks, turned so that a vector holds one channel of several keys, and the softmax is kept up as they do. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "inference/prefill/prefill.h"

/* One task's floats, all in the thread's scratch. */
struct buffers {
    float *q, *keys, *values, *score, *out, *row;
    float largest[QUERIES], total[QUERIES];
};

static size_t buffer_floats(const struct prefill *prefill) {
    return (QUERIES + KEYS) * (prefill->wide + prefill->value) + QUERIES * KEYS + prefill->wide;
}

static void load_queries(const struct prefill *prefill, const struct block *block, size_t head, struct buffers *to) {
    const npuq_heads *heads = prefill->heads;
    for (int64_t i = 0; i < block->count; i++) {
        float *q = to->q + (size_t)i * prefill->wide;
        prefill->kernels->to_float(at(&heads->q_nope, block->first + i, head, heads->dtype), heads->dtype, prefill->nope, q);
        prefill->kernels->to_float(at(&heads->q_rope, block->first + i, head, heads->dtype), heads->dtype, prefill->rope,
                                   q + prefill->nope);
        prefill->kernels->multiply_row(prefill->scale, prefill->wide, q);
        to->largest[i] = -INFINITY;
        to->total[i] = 0;
    }
    memset(to->out, 0, (size_t)block->count * prefill->value * sizeof(float));
}

/* Keys turned to [channels, KEYS] (zeros past the last), values as they are; whether all values are numbers. */
static int load_keys(const struct prefill *prefill, int64_t first, size_t count, size_t head, struct buffers *to) {
    const npuq_heads *heads = prefill->heads;
    float poison = 0;
    if (count < KEYS) memset(to->keys, 0, prefill->wide * KEYS * sizeof(float));
    for (size_t j = 0; j < count; j++) {
        int64_t token = first + (int64_t)j;
        prefill->kernels->to_float(at(&heads->k_nope, token, head, heads->dtype), heads->dtype, prefill->nope, to->row);
        prefill->kernels->to_float(at(&heads->k_rope, token, 0, heads->dtype), heads->dtype, prefill->rope,
                                   to->row + prefill->nope);
        for (size_t c = 0; c < prefill->wide; c++) to->keys[c * KEYS + j] = to->row[c];
        float *value = to->values + j * prefill->value;
        prefill->kernels->to_float(at(&heads->value, token, head, heads->dtype), heads->dtype, prefill->value, value);
        for (size_t c = 0; c < prefill->value; c++) poison += value[c] * 0;
    }
    return poison == 0;
}

/* Merges some keys into the block's queries. past: the number of keys before the block's first query. */
static void attend_keys(const struct prefill *prefill, const struct block *block, int64_t past, int64_t first,
                        size_t keys, int values_finite, struct buffers *in) {
    size_t from = 0, n = prefill->value;
    while (visible(prefill, past, (int64_t)from, first, keys) == 0) from++;
    size_t queries = (size_t)block->count - from;
    float *score = in->score + from * KEYS, *out = in->out + from * n;
    int all_see_all = visible(prefill, past, (int64_t)from, first, keys) == keys;
    prefill->kernels->axpy_float(in->keys, NPUQ_F32, KEYS, prefill->wide, KEYS, in->q + from * prefill->wide,
                                 prefill->wide, queries, score, KEYS);
    for (size_t i = from; i < (size_t)block->count; i++) {
        size_t seen = visible(prefill, past, (int64_t)i, first, keys);
        float *row = in->score + i * KEYS;
        float keep = prefill->kernels->online_softmax(row, seen, keys, in->largest + i, in->total + i);
        if (keep != 1) prefill->kernels->multiply_row(keep, n, in->out + i * n);
        /* A weight of 0 does not undo a value that is no number. */
        if (!values_finite && !all_see_all) prefill->kernels->axpy_add(in->values, NPUQ_F32, n, seen, n, row, KEYS, 1, in->out + i * n, n);
    }
    if (values_finite || all_see_all) prefill->kernels->axpy_add(in->values, NPUQ_F32, n, keys, n, score, KEYS, queries, out, n);
}

void prefill_store(const struct prefill *prefill, const struct block *block, size_t head, const float *largest,
                   const float *totals, float *out) {
    const npuq_heads *heads = prefill->heads;
    size_t n = prefill->value;
    for (int64_t i = 0; i < block->count; i++) {
        float total = totals[i], *row = out + (size_t)i * n;
        int blind = total == 0; /* no key seen: zeros, as the sum of none */
        prefill->kernels->multiply_row(blind ? 0 : 1 / total, n, row);
        size_t place = (size_t)(block->first + i) * (size_t)heads->count + head;
        prefill->kernels->from_float(row, n, prefill->out + place * n * size_of(heads->dtype), heads->dtype);
        prefill->lse[place] = blind ? -INFINITY : largest[i] + logf(total);
    }
}

static void prefill_task(const void *context, size_t index, int thread) {
    const struct prefill *prefill = context;
    const struct block *block = &prefill->blocks[index / (size_t)prefill->heads->count];
    size_t head = index % (size_t)prefill->heads->count, wide = prefill->wide;
    struct buffers in;
    in.q = pool_thread_scratch(prefill->pool, thread);
    in.keys = in.q + QUERIES * wide;
    in.values = in.keys + KEYS * wide;
    in.out = in.values + KEYS * prefill->value;
    in.score = in.out + QUERIES * prefill->value;
    in.row = in.score + QUERIES * KEYS;

    const struct range range = find_range(prefill, block);
    load_queries(prefill, block, head, &in);
    for (int64_t key = 0; key < range.end; key += KEYS) {
        size_t keys = (size_t)(range.end - key < KEYS ? range.end - key : KEYS);
        int finite = load_keys(prefill, range.first + key, keys, head, &in);
        attend_keys(prefill, block, range.past, key, keys, finite, &in);
    }
    prefill_store(prefill, block, head, in.largest, in.total, in.out);
}

static size_t list_blocks(const int64_t *q_ends, int64_t sequences, struct block *blocks) {
    size_t count = 0;
    for (int64_t s = 0; s < sequences; s++) {
        for (int64_t first = s > 0 ? q_ends[s - 1] : 0; first < q_ends[s]; first += QUERIES) {
            int64_t left = q_ends[s] - first;
            if (blocks != NULL) blocks[count] = (struct block){s, first, left < QUERIES ? left : QUERIES};
            count++;
        }
    }
    return count;
}

int npuq_attention(npuq_pool *pool, const npuq_heads *heads, const int64_t *q_ends, const int64_t *kv_ends,
                   int64_t sequences, float softmax_scale, int32_t causal, void *out, float *lse) {
    if (!computes(heads->dtype) || heads->count < 1 || heads->nope_dim < 0 || heads->rope_dim < 0 || heads->value_dim < 0) {
        return NPUQ_BAD_SIZE;
    }
    if (!is_cumulative(q_ends, sequences) || !is_cumulative(kv_ends, sequences)) return NPUQ_BAD_INDEX;
    struct prefill prefill = {
        .pool = pool, .kernels = pool_kernels(pool), .heads = heads, .q_ends = q_ends, .kv_ends = kv_ends,
        .nope = (size_t)heads->nope_dim, .rope = (size_t)heads->rope_dim,
        .wide = (size_t)(heads->nope_dim + heads->rope_dim), .value = (size_t)heads->value_dim, .causal = causal,
        .scale = softmax_scale, .out = out, .lse = lse,
    };
    size_t blocks = list_blocks(q_ends, sequences, NULL);
    pool_begin(pool);
    const int bf16 = prefill_takes_bf16(&prefill);
    const size_t bytes = bf16 ? prefill_bf16_bytes(&prefill) : buffer_floats(&prefill) * sizeof(float);
    int status = pool_scratch(pool, bytes, blocks * sizeof(struct block));
    if (status == NPUQ_OK) {
        list_blocks(q_ends, sequences, pool_shared_scratch(pool));
        prefill.blocks = pool_shared_scratch(pool);
        pool_run(pool, bf16 ? prefill_bf16_task : prefill_task, &prefill, blocks * (size_t)heads->count);
    }
    pool_end(pool);
    return status;
}
