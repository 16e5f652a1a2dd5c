/* Attention over decompressed keys and values: the call, and what its tasks in float32 and in bf16 share. */
#ifndef NPUQ_INFERENCE_PREFILL_PREFILL_H
#define NPUQ_INFERENCE_PREFILL_PREFILL_H

#include "common/dtypes.h"
#include "common/pool.h"

enum { QUERIES = 256, KEYS = ATTENTION_KEYS };

struct block {
    int64_t sequence, first, count; /* queries, counted from the step's first */
};

struct prefill {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_heads *heads;
    const struct block *blocks;
    const int64_t *q_ends, *kv_ends;
    size_t nope, rope, wide, value; /* wide: nope + rope */
    int causal;
    float scale;
    char *out;
    float *lse;
};

/* The keys of a block's sequence: the number of the first one, of those before the block's first query, and the end of those
 * that its last query sees, counted from the first. */
struct range {
    int64_t first, past, end;
};

static inline const char *at(const npuq_strided *rows, int64_t token, size_t head, int dtype) {
    return (const char *)rows->data + (token * rows->token_stride + (int64_t)head * rows->head_stride) * (int64_t)size_of(dtype);
}

/* The number of keys among [first, first + keys) of the sequence that query `i` of the block may see. */
static inline size_t visible(const struct prefill *prefill, int64_t past, int64_t i, int64_t first, size_t keys) {
    int64_t seen = prefill->causal ? past + i + 1 - first : (int64_t)keys;
    return seen < 0 ? 0 : (size_t)seen < keys ? (size_t)seen : keys;
}

static inline struct range find_range(const struct prefill *prefill, const struct block *block) {
    const int64_t s = block->sequence, first = s > 0 ? prefill->kv_ends[s - 1] : 0, keys = prefill->kv_ends[s] - first;
    const int64_t past = keys - (prefill->q_ends[s] - block->first);
    return (struct range){first, past, prefill->causal ? past + block->count : keys};
}

/* Writes the results of a block's queries, of which `out` has the sums. */
void prefill_store(const struct prefill *prefill, const struct block *block, size_t head, const float *largest,
                   const float *total, float *out);

/* In products of bf16. False where the level has none, or for widths that are no multiples of 16. */
int prefill_takes_bf16(const struct prefill *prefill);
size_t prefill_bf16_bytes(const struct prefill *prefill);
void prefill_bf16_task(const void *context, size_t index, int thread);

#endif
