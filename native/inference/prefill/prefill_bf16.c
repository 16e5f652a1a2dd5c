/* Attention over decompressed keys and values in products of bf16: a row is one head of a query. */
#include "inference/bf16_rows.h"
#include "inference/prefill/prefill.h"

int prefill_takes_bf16(const struct prefill *prefill) {
    return prefill->kernels->bf16_scores != NULL && prefill->heads->dtype == NPUQ_BF16 && prefill->nope % 16 == 0 &&
           prefill->rope % 16 == 0 && prefill->value % 16 == 0;
}

size_t prefill_bf16_bytes(const struct prefill *prefill) { return bf16_rows_bytes(QUERIES, prefill->wide, prefill->value); }

/* A tile's rows; past the last key there is nothing, which prefetching survives. */
static struct key_rows rows_at(const npuq_strided *rows, int64_t token, size_t head) {
    const char *first = at(rows, token, head, NPUQ_BF16);
    const size_t stride = (size_t)rows->token_stride * 2;
    return (struct key_rows){.rows = first, .row_stride = stride, .group_stride = 32, .next = first + KEYS * stride};
}

void prefill_bf16_task(const void *context, size_t index, int thread) {
    const struct prefill *prefill = context;
    const npuq_heads *heads = prefill->heads;
    const struct block *block = &prefill->blocks[index / (size_t)heads->count];
    const size_t head = index % (size_t)heads->count, queries = (size_t)block->count;
    const struct range range = find_range(prefill, block);
    struct bf16_rows rows = bf16_rows_begin(prefill->kernels, queries, prefill->wide, prefill->value, prefill->scale,
                                            pool_thread_scratch(prefill->pool, thread));
    for (size_t i = 0; i < queries; i++) {
        const int64_t token = block->first + (int64_t)i;
        bf16_rows_place(&rows, i, 0, at(&heads->q_nope, token, head, NPUQ_BF16), prefill->nope);
        bf16_rows_place(&rows, i, prefill->nope, at(&heads->q_rope, token, head, NPUQ_BF16), prefill->rope);
    }
    for (int64_t first = 0; first < range.end; first += KEYS) {
        const size_t keys = (size_t)(range.end - first < KEYS ? range.end - first : KEYS);
        const int64_t token = range.first + first;
        const struct bf16_keys tile = {{rows_at(&heads->k_nope, token, head), rows_at(&heads->k_rope, token, 0)},
                                       {prefill->nope, prefill->rope}};
        const struct key_rows values = rows_at(&heads->value, token, head);
        int32_t seen[QUERIES] = {0};
        for (size_t i = 0; i < queries; i++) seen[i] = (int32_t)visible(prefill, range.past, (int64_t)i, first, keys);
        bf16_rows_merge(&rows, &tile, &values, keys, seen);
    }
    prefill_store(prefill, block, head, rows.largest, rows.total, rows.out);
}
