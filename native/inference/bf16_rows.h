/* Rows of queries that attend to tiles of keys in products of bf16: decompressed attention's queries of one head, or grouped
 * attention's queries and heads of one group. */
#ifndef NPUQ_INFERENCE_BF16_ROWS_H
#define NPUQ_INFERENCE_BF16_ROWS_H

#include "common/levels.h"

enum { BF16_LANES = 16 };

/* One task's memory, and what its rows have gathered. Vectors of lanes are whole: a lane without a row has zeros. */
struct bf16_rows {
    const struct kernels *kernels;
    size_t rows, channels, value; /* of a query and key, and of a value: multiples of 16 */
    float scale;
    uint32_t *q;             /* [vectors][channels / 2][LANES] */
    float *score;            /* [vectors][ATTENTION_KEYS][LANES] */
    uint32_t *weight;        /* [ATTENTION_KEYS / 2][LANES] */
    float *largest, *total;  /* [vectors][LANES] */
    float *out;              /* [vectors · LANES][value], times `total` */
    uint16_t *keys, *values; /* a tile's copies: rows of channels, and pairs */
};

/* Keys in up to two parts that follow each other in a query's channels. */
struct bf16_keys {
    struct key_rows part[2];
    size_t channels[2];
};

size_t bf16_rows_bytes(size_t rows, size_t channels, size_t value);

/* Divides `memory` of so many bytes among rows that have seen no key, and whose queries are zeros. */
struct bf16_rows bf16_rows_begin(const struct kernels *kernels, size_t rows, size_t channels, size_t value, float scale, void *memory);

/* Places some of a row's channels, from number `first` on. */
void bf16_rows_place(struct bf16_rows *rows, size_t row, size_t first, const void *q, size_t channels);

/* Merges `count` keys and their values: row r sees the first seen[r], of which there are as many as lanes. A value behind
 * them does not meet its weight of 0, for it may be no number. */
void bf16_rows_merge(struct bf16_rows *rows, const struct bf16_keys *keys, const struct key_rows *values, size_t count, const int32_t *seen);

#endif
