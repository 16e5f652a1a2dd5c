/* Checks of the public functions' arguments before a thread starts: a few comparisons a call.
 *
 * Sizes come from tensors, so that products of two of them do not overflow. */
#ifndef NPUQ_COMMON_CHECKS_H
#define NPUQ_COMMON_CHECKS_H

#include <stdbool.h>

#include "common/dtypes.h"
#include "npuq.h"

/* A dtype that has kernels; codes, which lie in NZ, come with their scales. Channels of NZ fill whole tiles. */
static inline bool pages_fit(const npuq_pages *pages) {
    bool nz = pages->layout == NPUQ_NZ, codes = pages->scale != NULL;
    return (nz || (pages->layout == NPUQ_ND && !codes)) && (codes ? pages->dtype == NPUQ_I8 : computes(pages->dtype)) &&
           pages->blocks >= 0 && pages->block_size > 0 && pages->channels > 0 &&
           (!nz || pages->channels % (int64_t)nz_channels(pages->dtype) == 0);
}

/* Two pools of as many tokens; the rope's rows are no codes. */
static inline bool latent_cache_fits(const npuq_latent_cache *cache) {
    const npuq_pages *latent = &cache->latent, *rope = &cache->rope;
    return pages_fit(latent) && pages_fit(rope) && rope->scale == NULL && latent->layout == rope->layout &&
           (latent->scale != NULL || latent->dtype == rope->dtype) && latent->blocks == rope->blocks &&
           latent->block_size == rope->block_size;
}

/* Two pools of as many tokens and channels. */
static inline bool kv_cache_fits(const npuq_kv_cache *cache) {
    const npuq_pages *key = &cache->key, *value = &cache->value;
    return pages_fit(key) && pages_fit(value) && key->channels == value->channels && key->blocks == value->blocks &&
           key->block_size == value->block_size;
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

/* Slots of a pool; negative ones are not written. */
static inline bool slots_fit(const npuq_pages *pages, const int64_t *slots, int64_t count) {
    int64_t all = pages->blocks * pages->block_size;
    bool good = true;
    for (int64_t i = 0; i < count; i++) good &= slots[i] < all;
    return good;
}

/* Every key of a sequence is in a block of the table's row, and that block in the pool. */
static inline bool tables_fit(const npuq_pages *pages, const int64_t *kv_lens, int64_t sequences, const int32_t *table,
                              int64_t table_stride) {
    bool good = true;
    for (int64_t s = 0; s < sequences && good; s++) {
        int64_t blocks = kv_lens[s] / pages->block_size + (kv_lens[s] % pages->block_size != 0);
        good = kv_lens[s] >= 0 && blocks <= table_stride && all_below(table + s * table_stride, blocks, pages->blocks);
    }
    return good;
}

#endif
