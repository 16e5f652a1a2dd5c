/* Attention over decompressed keys and values in products of bf16: a vector has one head of sixteen queries. Keys and values
 * are read where they lie. */
#include <math.h>
#include <string.h>

#include "inference/prefill/prefill.h"

enum { LANES = 16, VECTORS = QUERIES / LANES };

struct buffers {
    uint32_t *nope, *rope; /* queries [VECTORS][channels / 2][LANES] */
    float *score, *out;    /* [VECTORS][KEYS][LANES], [QUERIES][value] */
    uint32_t weight[KEYS / 2 * LANES];
    float largest[QUERIES], total[QUERIES];
};

int prefill_takes_bf16(const struct prefill *prefill) {
    return prefill->kernels->bf16_scores != NULL && prefill->heads->dtype == NPUQ_BF16 && prefill->nope % 16 == 0 &&
           prefill->rope % 16 == 0 && prefill->value % 16 == 0;
}

size_t prefill_bf16_bytes(const struct prefill *prefill) {
    return (QUERIES * prefill->wide / 2 + QUERIES * KEYS + QUERIES * prefill->value) * sizeof(float);
}

static void place_queries(const struct prefill *prefill, const struct block *block, size_t head, const npuq_strided *rows,
                          size_t channels, uint32_t *to) {
    memset(to, 0, QUERIES * channels / 2 * sizeof *to);
    for (int64_t i = 0; i < block->count; i++) {
        uint32_t *lane = to + (size_t)i / LANES * (channels / 2) * LANES + (size_t)i % LANES;
        const char *q = at(rows, block->first + i, head, prefill->heads->dtype);
        for (size_t pair = 0; pair < channels / 2; pair++) memcpy(lane + pair * LANES, q + 4 * pair, 4);
    }
}

static struct key_rows rows_at(const npuq_strided *rows, int64_t token, size_t head) {
    return (struct key_rows){at(rows, token, head, NPUQ_BF16), (size_t)rows->token_stride * 2, 32, 0};
}

static int all_finite(const struct key_rows *values, size_t count, size_t channels) {
    unsigned bad = 0;
    for (size_t j = 0; j < count; j++) {
        const char *row = (const char *)values->rows + j * values->row_stride;
        for (size_t c = 0; c < channels; c++) {
            uint16_t bits;
            memcpy(&bits, row + 2 * c, sizeof bits);
            bad |= (bits & 0x7F80) == 0x7F80;
        }
    }
    return !bad;
}

static float bf16_float(uint32_t bits) {
    float value;
    bits <<= 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* bf16_weigh where a value is no number: one that a query does not see must not meet its weight of 0. */
static void weigh_seen(const uint32_t *weight, const struct key_rows *values, size_t channels, const int32_t *seen,
                       const float *keep, float *out) {
    for (size_t lane = 0; lane < LANES; lane++) {
        float *to = out + lane * channels;
        for (size_t c = 0; c < channels; c++) to[c] *= keep[lane];
        for (size_t j = 0; j < (size_t)seen[lane]; j++) {
            const float factor = bf16_float(weight[j / 2 * LANES + lane] >> 16 * (j % 2) & 0xFFFF);
            const char *row = (const char *)values->rows + j * values->row_stride;
            for (size_t c = 0; c < channels; c++) {
                uint16_t bits;
                memcpy(&bits, row + 2 * c, sizeof bits);
                to[c] += factor * bf16_float(bits);
            }
        }
    }
}

/* Merges keys [first, first + keys) of the sequence into the block's queries. */
static void attend_keys(const struct prefill *prefill, const struct block *block, size_t head, const struct range *range,
                        int64_t first, size_t keys, struct buffers *in) {
    const npuq_heads *heads = prefill->heads;
    const struct kernels *kernels = prefill->kernels;
    const int64_t token = range->first + first;
    const struct key_rows nope = rows_at(&heads->k_nope, token, head), rope = rows_at(&heads->k_rope, token, 0);
    const struct key_rows values = rows_at(&heads->value, token, head);
    const size_t vectors = ((size_t)block->count + LANES - 1) / LANES, n = prefill->value;
    size_t from = 0;
    while (visible(prefill, range->past, (int64_t)(from + 1) * LANES - 1, first, keys) == 0) from++;
    if (from >= vectors) return;
    float *score = in->score + from * KEYS * LANES;
    kernels->bf16_scores(in->nope + from * prefill->nope / 2 * LANES, vectors - from, &nope, prefill->nope, keys, 0, score);
    kernels->bf16_scores(in->rope + from * prefill->rope / 2 * LANES, vectors - from, &rope, prefill->rope, keys, 1, score);
    const int all_see_all = visible(prefill, range->past, (int64_t)(from * LANES), first, keys) == keys;
    const int plain = all_see_all || all_finite(&values, keys, n);
    for (size_t vector = from; vector < vectors; vector++) {
        const size_t row = vector * LANES, left = (size_t)block->count - row, rows = left < LANES ? left : LANES;
        int32_t seen[LANES];
        float keep[LANES];
        for (size_t lane = 0; lane < LANES; lane++) {
            seen[lane] = lane < rows ? (int32_t)visible(prefill, range->past, (int64_t)(row + lane), first, keys) : 0;
        }
        kernels->bf16_softmax(in->score + vector * KEYS * LANES, keys, prefill->scale, seen, in->largest + row, in->total + row,
                              keep, in->weight);
        if (plain) kernels->bf16_weigh(in->weight, &values, n, keys, rows, keep, in->out + row * n, n);
        else weigh_seen(in->weight, &values, n, seen, keep, in->out + row * n);
    }
}

void prefill_bf16_task(const void *context, size_t index, int thread) {
    const struct prefill *prefill = context;
    const npuq_heads *heads = prefill->heads;
    const struct block *block = &prefill->blocks[index / (size_t)heads->count];
    const size_t head = index % (size_t)heads->count;
    const struct range range = find_range(prefill, block);
    struct buffers in;
    in.nope = pool_thread_scratch(prefill->pool, thread);
    in.rope = in.nope + QUERIES * prefill->nope / 2;
    in.score = (float *)(in.rope + QUERIES * prefill->rope / 2);
    in.out = in.score + QUERIES * KEYS;
    place_queries(prefill, block, head, &heads->q_nope, prefill->nope, in.nope);
    place_queries(prefill, block, head, &heads->q_rope, prefill->rope, in.rope);
    memset(in.out, 0, QUERIES * prefill->value * sizeof *in.out);
    for (size_t i = 0; i < QUERIES; i++) {
        in.largest[i] = -INFINITY;
        in.total[i] = 0;
    }
    for (int64_t key = 0; key < range.end; key += KEYS) {
        attend_keys(prefill, block, head, &range, key, (size_t)(range.end - key < KEYS ? range.end - key : KEYS), &in);
    }
    prefill_store(prefill, block, head, in.largest, in.total, in.out);
}
