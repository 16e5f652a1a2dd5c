/* Grouped-query attention's call, its tasks, and where their keys lie. */
#ifndef NPUQ_INFERENCE_GROUPED_GROUPED_H
#define NPUQ_INFERENCE_GROUPED_GROUPED_H

#include <stdbool.h>

#include "common/dtypes.h"
#include "common/pool.h"

enum { KEYS = ATTENTION_KEYS };

/* Some queries of a sequence (counted from the step's first) and the keys that they attend to. */
struct block {
    int64_t sequence, first, count;
    int64_t key, end;
    float *partial; /* where a span's results go, [kv_heads, group, head_dim + 2]; NULL: all keys, to `out` */
};

struct grouped_arithmetic;

struct grouped {
    npuq_pool *pool;
    const struct kernels *kernels;
    const struct grouped_arithmetic *arithmetic;
    const npuq_kv_cache *cache;
    const int32_t *table; /* NULL: a sequence's slots follow those of the sequence before */
    size_t table_stride;
    const int64_t *q_ends, *kv_lens;
    const char *q;
    size_t heads, kv_heads, group, dim, rows; /* rows: the most of a task */
    int causal, dtype;
    float scale;
    char *out;
    const struct block *blocks;
};

/* What a block's rows gathered: row i · group + g is head g of query i. out: [rows, dim], times `total`. */
struct gathered {
    float *largest, *total, *out;
};

/* How a block attends with the heads of one group. `memory`: task_bytes of it. */
struct grouped_arithmetic {
    size_t (*task_bytes)(const struct grouped *grouped);
    struct gathered (*attend)(const struct grouped *grouped, const struct block *block, size_t head, void *memory);
};

extern const struct grouped_arithmetic grouped_float, grouped_bf16;

/* Whether products of bf16 can do it: the level has them, and all is bf16 in whole groups of channels. */
int grouped_takes_bf16(const struct grouped *grouped);

/* The slot of a sequence's key, and how many keys from it on lie in consecutive slots. */
static inline size_t find_slot(const struct grouped *grouped, const struct block *block, int64_t key, size_t *together) {
    size_t block_size = (size_t)grouped->cache->key.block_size, at = (size_t)key % block_size;
    if (grouped->table == NULL) {
        int64_t before = 0;
        for (int64_t s = 0; s < block->sequence; s++) before += grouped->kv_lens[s];
        *together = KEYS;
        return (size_t)(before + key);
    }
    *together = block_size - at;
    size_t page = (size_t)grouped->table[(size_t)block->sequence * grouped->table_stride + (size_t)key / block_size];
    return page * block_size + at;
}

/* Keys from `key` on that make a tile: up to KEYS of one page. */
static inline size_t find_tile(const struct grouped *grouped, const struct block *block, int64_t key, size_t *slot) {
    size_t together, count = (size_t)(block->end - key < KEYS ? block->end - key : KEYS);
    *slot = find_slot(grouped, block, key, &together);
    return count < together ? count : together;
}

/* Keys that the block's query `i` sees. */
static inline int64_t seen_by(const struct grouped *grouped, const struct block *block, int64_t i) {
    int64_t keys = grouped->kv_lens[block->sequence];
    return grouped->causal ? keys - (grouped->q_ends[block->sequence] - 1 - block->first - i) : keys;
}

/* The number of `keys` keys from `key` on that the block's query `i` sees. */
static inline size_t visible(const struct grouped *grouped, const struct block *block, int64_t i, int64_t key, size_t keys) {
    int64_t seen = seen_by(grouped, block, i) - key;
    return seen < 0 ? 0 : (size_t)seen < keys ? (size_t)seen : keys;
}

/* The row of query `i` of the block with head `head` of all. */
static inline const char *query_at(const struct grouped *grouped, const struct block *block, size_t i, size_t head) {
    return grouped->q + (((size_t)block->first + i) * grouped->heads + head) * grouped->dim * size_of(grouped->dtype);
}

#endif
