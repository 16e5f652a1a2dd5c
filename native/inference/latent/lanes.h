/* Rows as lanes: what absorbed attention in products of bf16 and of int8 share. A vector has sixteen rows: heads
 * of one token or of several. */
#ifndef NPUQ_INFERENCE_LATENT_LANES_H
#define NPUQ_INFERENCE_LATENT_LANES_H

#include "inference/latent/keys.h"

enum { LANES = 16, MOST_VECTORS = TASK_ROWS / LANES };

static inline size_t vectors_of(size_t rows) { return (rows + LANES - 1) / LANES; }

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

/* The rotary queries of a span's rows, [vectors][rope_width / 2][LANES]; lanes without a row have zeros. */
static inline void place_rope(const struct attention *attention, const struct span *span, uint32_t *to) {
    const size_t d = (size_t)attention->cache->rope.channels, width = attention->rope_width;
    memset(to, 0, vectors_of(span->rows) * width / 2 * LANES * sizeof *to);
    const uint16_t *q = (const uint16_t *)(const void *)attention->q_rope + first_row(attention, span) * d;
    for (size_t row = 0; row < span->rows; row++) {
        place_query(q + row * d, d, width, row % LANES, to + row / LANES * (width / 2) * LANES);
    }
}

/* Some lanes of a vector: the rows of a task from `vector + first` on. */
struct lanes {
    size_t vector, first, count;
};

/* The lanes of row `row` and of those behind it: to the vector's end, or to its token's where not all see the same keys. */
static inline struct lanes next_lanes(const struct span *span, size_t row, bool all) {
    const size_t vector = row / LANES * LANES;
    size_t end = all ? span->rows : end_of_token(span, row);
    end = end < vector + LANES ? end : vector + LANES;
    return (struct lanes){.vector = vector, .first = row - vector, .count = end - row};
}

/* A softmax changes all lanes of a vector; only those whose turn it is keep the result. */
static inline void copy_running(const struct running *in, size_t vector, float *largest, float *total) {
    memcpy(largest, in->largest + vector, LANES * sizeof *largest);
    memcpy(total, in->total + vector, LANES * sizeof *total);
}

static inline void keep_running(struct running *in, size_t row, const struct lanes *lanes, const float *largest, const float *total) {
    memcpy(in->largest + row, largest + lanes->first, lanes->count * sizeof *largest);
    memcpy(in->total + row, total + lanes->first, lanes->count * sizeof *total);
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
