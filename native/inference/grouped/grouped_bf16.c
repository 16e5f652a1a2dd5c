/* Grouped attention in products of bf16; keys and values are read from their pages. */
#include "inference/bf16_rows.h"
#include "inference/grouped/grouped.h"

int grouped_takes_bf16(const struct grouped *grouped) {
    const npuq_pages *key = &grouped->cache->key, *value = &grouped->cache->value;
    return grouped->kernels->bf16_scores != NULL && grouped->dtype == NPUQ_BF16 && key->dtype == NPUQ_BF16 &&
           value->dtype == NPUQ_BF16 && grouped->dim % 16 == 0;
}

static size_t task_bytes(const struct grouped *grouped) {
    const size_t lanes = (grouped->rows + BF16_LANES - 1) / BF16_LANES * BF16_LANES;
    return bf16_rows_bytes(grouped->rows, grouped->dim, grouped->dim) + lanes * sizeof(int32_t);
}

static const char *row_at(const struct grouped *grouped, const npuq_pages *pages, size_t slot, size_t head) {
    const size_t block_size = (size_t)pages->block_size, channels = (size_t)pages->channels, first = head * grouped->dim;
    if (pages->layout == NPUQ_ND) return (const char *)pages->rows + (slot * channels + first) * 2;
    return (const char *)pages->rows + (slot / block_size * channels + first) * block_size * 2 + slot % block_size * 32;
}

static struct key_rows rows_at(const struct grouped *grouped, const npuq_pages *pages, size_t slot, const size_t *next, size_t head) {
    const bool nz = pages->layout == NPUQ_NZ;
    return (struct key_rows){
        .rows = row_at(grouped, pages, slot, head),
        .row_stride = nz ? 32 : (size_t)pages->channels * 2,
        .group_stride = nz ? (size_t)pages->block_size * 32 : 32,
        .next = next == NULL ? NULL : row_at(grouped, pages, *next, head),
    };
}

static struct gathered attend(const struct grouped *grouped, const struct block *block, size_t head, void *memory) {
    const size_t group = grouped->group, dim = grouped->dim, queries = (size_t)block->count;
    const size_t lanes = (grouped->rows + BF16_LANES - 1) / BF16_LANES * BF16_LANES;
    int32_t *seen = memory;
    struct bf16_rows rows = bf16_rows_begin(grouped->kernels, queries * group, dim, dim, grouped->scale, seen + lanes);
    for (size_t row = 0; row < queries * group; row++) {
        bf16_rows_place(&rows, row, 0, query_at(grouped, block, row / group, head * group + row % group), dim);
    }
    for (size_t lane = queries * group; lane < lanes; lane++) seen[lane] = 0;
    for (int64_t key = block->key; key < block->end;) {
        size_t slot, next;
        const size_t count = find_tile(grouped, block, key, &slot);
        const int64_t after = key + (int64_t)count;
        const bool more = after < block->end;
        if (more) find_tile(grouped, block, after, &next);
        const struct bf16_keys keys = {{rows_at(grouped, &grouped->cache->key, slot, more ? &next : NULL, head)}, {dim, 0}};
        const struct key_rows values = rows_at(grouped, &grouped->cache->value, slot, more ? &next : NULL, head);
        for (size_t row = 0; row < queries * group; row++) seen[row] = (int32_t)visible(grouped, block, (int64_t)(row / group), key, count);
        bf16_rows_merge(&rows, &keys, &values, count, seen);
        key = after;
    }
    return (struct gathered){rows.largest, rows.total, rows.out};
}

const struct grouped_arithmetic grouped_bf16 = {task_bytes, attend};
