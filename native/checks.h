/* What the public functions ask of their arguments before a thread starts; a few comparisons a call.
 *
 * Sizes come from tensors, so that products of two of them do not overflow. */
#ifndef NPUQ_CHECKS_H
#define NPUQ_CHECKS_H

#include <stdbool.h>

#include "npuq.h"

/* Dtypes of activations. */
static inline bool computes(int dtype) { return dtype == NPUQ_F32 || dtype == NPUQ_BF16; }

static inline bool is_integer(int dtype) { return dtype == NPUQ_I4 || dtype == NPUQ_I8; }

/* Dtypes of stored float weights. */
static inline bool is_float(int dtype) { return computes(dtype) || dtype == NPUQ_F16; }

/* NZ tiles hold 16 channels, or 32 of int8: whole ones only. */
static inline bool cache_fits(const npuq_cache *cache) {
    int64_t tile = cache->latent_scale != NULL ? 32 : 16;
    return computes(cache->dtype) && cache->blocks >= 0 && cache->block_size > 0 && cache->latent_dim > 0 &&
           cache->latent_dim % tile == 0 && cache->rope_dim > 0 && cache->rope_dim % 16 == 0;
}

static inline bool all_below(const int32_t *index, int64_t count, int64_t limit) {
    bool good = true;
    for (int64_t i = 0; i < count; i++) good &= index[i] >= 0 && index[i] < limit;
    return good;
}

/* Rows of each group, of `rows` in all or fewer. */
static inline bool groups_fit(const int64_t *group_rows, int64_t groups, int64_t rows) {
    bool good = true;
    for (int64_t g = 0; g < groups && good; g++) {
        good = group_rows[g] >= 0 && group_rows[g] <= rows;
        rows -= group_rows[g];
    }
    return good;
}

/* Cumulative lengths: none below the one before. */
static inline bool is_cumulative(const int64_t *ends, int64_t count) {
    bool good = count >= 0;
    for (int64_t i = 0; i < count; i++) good &= ends[i] >= (i > 0 ? ends[i - 1] : 0);
    return good;
}

/* Slots of a cache; negative ones are not written. */
static inline bool slots_fit(const npuq_cache *cache, const int64_t *slots, int64_t count) {
    int64_t all = cache->blocks * cache->block_size;
    bool good = true;
    for (int64_t i = 0; i < count; i++) good &= slots[i] < all;
    return good;
}

/* Every key that a sequence has lies in a block of the table's row, and that block in the cache. */
static inline bool tables_fit(const npuq_cache *cache, const int64_t *kv_lens, int64_t sequences, const int32_t *table,
                              int64_t table_stride) {
    bool good = true;
    for (int64_t s = 0; s < sequences && good; s++) {
        int64_t blocks = kv_lens[s] / cache->block_size + (kv_lens[s] % cache->block_size != 0);
        good = kv_lens[s] >= 0 && blocks <= table_stride && all_below(table + s * table_stride, blocks, cache->blocks);
    }
    return good;
}

#endif
