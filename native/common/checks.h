/* Checks of the public functions' arguments before a thread starts: a few comparisons a call.
 *
 * Sizes come from tensors, so that products of two of them do not overflow. */
#ifndef NPUQ_COMMON_CHECKS_H
#define NPUQ_COMMON_CHECKS_H

#include <stdbool.h>

#include "common/dtypes.h"
#include "npuq.h"

/* Dtypes that have kernels, and channels that fill whole NZ tiles. */
static inline bool cache_fits(const npuq_cache *cache) {
    int64_t tile = (int64_t)nz_channels(cache->latent_scale != NULL ? NPUQ_I8 : cache->dtype);
    return computes(cache->dtype) && cache->blocks >= 0 && cache->block_size > 0 && cache->latent_dim > 0 &&
           cache->latent_dim % tile == 0 && cache->rope_dim > 0 && cache->rope_dim % (int64_t)nz_channels(cache->dtype) == 0;
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

/* Every key of a sequence is in a block of the table's row, and that block in the cache. */
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
