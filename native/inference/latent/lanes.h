/* Heads as lanes: what absorbed attention in products of bf16 and of int8 share. A vector has sixteen heads of a query. */
#ifndef NPUQ_INFERENCE_LATENT_LANES_H
#define NPUQ_INFERENCE_LATENT_LANES_H

#include "inference/latent/keys.h"

enum { LANES = 16, MOST_VECTORS = TASK_HEADS / LANES };

static inline size_t vectors_of(size_t heads) { return (heads + LANES - 1) / LANES; }

/* The next `bytes` of a task's memory, of which each part begins at a line. */
static inline void *take(char **at, size_t bytes) {
    void *taken = *at;
    *at += (bytes + 63) / 64 * 64;
    return taken;
}

static inline char *first_line(void *memory) { return (char *)(((uintptr_t)memory + 63) / 64 * 64); }

/* A query's bf16 channels into its lane, zeros past the last. */
static inline void place_query(const uint16_t *q, size_t channels, size_t width, size_t lane, uint32_t *to) {
    for (size_t pair = 0; pair < width / 2; pair++) {
        const uint32_t low = 2 * pair < channels ? q[2 * pair] : 0, high = 2 * pair + 1 < channels ? q[2 * pair + 1] : 0;
        to[pair * LANES + lane] = low | high << 16;
    }
}

/* The rotary queries of a span's heads, [vectors][rope_width / 2][LANES]; lanes without a head have zeros. */
static inline void place_rope(const struct attention *attention, const struct span *span, uint32_t *to) {
    const size_t d = (size_t)attention->cache->rope.channels, width = attention->rope_width;
    memset(to, 0, vectors_of(span->heads) * width / 2 * LANES * sizeof *to);
    for (size_t h = 0; h < span->heads; h++) {
        const size_t row = span->token * attention->heads + span->head + h;
        const uint16_t *q = (const uint16_t *)(const void *)attention->q_rope + row * d;
        place_query(q, d, width, h % LANES, to + h / LANES * (width / 2) * LANES);
    }
}

/* Rows of a tile in groups of 32 bytes, from the first key on; `next_block` (or NULL): where the rows after them are. */
static inline struct key_rows rows_of(const char *block, size_t block_size, size_t first, const char *next_block, size_t next_first) {
    return (struct key_rows){
        .rows = block + first * 32,
        .row_stride = 32,
        .group_stride = block_size * 32,
        .next = next_block == NULL ? NULL : next_block + next_first * 32,
    };
}

static inline struct key_rows latent_rows(const struct place *now, const struct place *next) {
    return rows_of(now->latent, now->block_size, now->first, next->latent, next->first);
}

static inline struct key_rows rope_rows(const struct place *now, const struct place *next) {
    return rows_of(now->rope, now->block_size, now->first, next->rope, next->first);
}

#endif
