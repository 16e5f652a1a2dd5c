/* Memory that a conversion keeps from row to row, and the error of a row from its exact sums. */
#ifndef NPUQ_CONVERT_SCRATCH_H
#define NPUQ_CONVERT_SCRATCH_H

#include "convert/mse/int4_mse.h"

/* A row in one scratch: as a search for int8 codes and as ones for int4 codes want it. */
struct convert_memory {
    struct optimal_scratch *search;
    int16_t *high, *low; /* int8 */
    struct planes planes; /* int4 */
    struct tables tables; /* int4, of FP8 weights */
    struct changes changes;
};

enum { SEARCH_BYTES = (sizeof(struct optimal_scratch) + 63) / 64 * 64 };

INLINE size_t padded_length(size_t n) { return (n + 63) / 64 * 64; }

/* Bytes of the tables of so many segments. Tables of an even number are searched. */
INLINE size_t table_bytes(size_t segments) {
    const size_t each = sizeof(struct segment) + 4 * sizeof(float) + 8 * sizeof(int16_t) + 2 * sizeof(double) + COUNT_BYTES;
    return (segments + 1) * (each + SUM_PLANES * (2 * MOST_PARTS - TOP_PART) * TABLE_PART) + 6 * 64;
}

/* Bytes of scratch that a row of n needs, at a multiple of 64. */
static size_t convert_scratch(size_t n) {
    /* int8: two halves of 2 bytes. int4: planes of 3 bytes, or tables, and the changes of layout_changes. */
    const size_t int4 = padded_length(n) * 24 + table_bytes(n / LEAST_SEGMENT + 1);
    return SEARCH_BYTES + int4 + 1024;
}

/* Places are written eight at a time, the rest in whole vectors. */
static struct changes layout_changes(void *memory, size_t padded) {
    struct changes changes = {.words = memory};
    changes.places = (uint32_t *)(changes.words + padded / 64);
    changes.magnitude = (int32_t *)(changes.places + padded + 16);
    changes.odd = changes.magnitude + padded + VW;
    changes.times = changes.odd + padded + VW;
    changes.kappa = (float *)(changes.times + padded + VW);
    return changes;
}

static struct convert_memory convert_layout(void *memory, size_t n) {
    const size_t padded = padded_length(n);
    struct convert_memory layout = {.search = memory};
    char *row = (char *)memory + SEARCH_BYTES;
    layout.high = (int16_t *)row;
    layout.low = layout.high + padded;
    layout.planes = (struct planes){(int16_t *)row, (int8_t *)((int16_t *)row + padded), padded, 0};
    layout.changes = layout_changes(layout.planes.low + padded, padded);
    return layout;
}

/* The next `size` bytes of *at, from a multiple of 64 on. */
INLINE void *take_bytes(char **at, size_t size) {
    void *taken = *at;
    *at += (size + 63) / 64 * 64;
    return taken;
}

static struct convert_memory table_layout(void *memory, size_t n, size_t segments) {
    struct convert_memory layout = {.search = memory};
    struct tables *tables = &layout.tables;
    const size_t even = (segments + 1) / 2 * 2;
    char *at = (char *)memory + SEARCH_BYTES;
    prepare_rows(&layout.search->rows);
    tables->rows = &layout.search->rows;
    tables->segments = segments;
    tables->segments_at = take_bytes(&at, even * sizeof(struct segment));
    tables->inverse = take_bytes(&at, even * 4 * sizeof(float));
    tables->origin = take_bytes(&at, even * 8 * sizeof(int16_t));
    tables->worth = take_bytes(&at, even * 2 * sizeof(double));
    tables->counts = take_bytes(&at, even * COUNT_BYTES);
    tables->sums = take_bytes(&at, even * SUM_PLANES * (2 * MOST_PARTS - TOP_PART) * TABLE_PART);
    layout.changes = layout_changes(at, padded_length(n));
    return layout;
}

/* An FP8 row and its scales. */
struct fp8_row {
    const uint8_t *x;
    size_t n, block;
    const float *block_scale;
};

/* A row whose largest magnitude is below is taken for zeros. */
#define LEAST_MAGNITUDE 0x1p-100f

/* Bits of the fixed point that the error of int4 codes by min-max is computed in (ERROR_BITS of quant/scales.py). */
enum { ERROR_BITS = 14 };

/* The unit of a fixed point of so many bits for a row with that largest magnitude, 2^(bits − exponent). */
INLINE float unit_of(int bits, float largest, int *exponent) {
    (void)frexpf(largest, exponent);
    return ldexpf(1, bits - *exponent);
}

INLINE float fixed_unit(float largest, int *exponent) { return unit_of(FIXED_BITS, largest, exponent); }

/* The error of codes with the exact sums A and B, and the norm, of a row whose fixed point has that many bits. */
INLINE void account_in(struct converted *out, double norm, struct exact_state state, int exponent, int bits) {
    double sigma = ldexp((double)out->scale, bits - exponent);
    double error = norm - 2 * sigma * (double)state.a + sigma * sigma * (double)state.b;
    out->error = ldexp(error > 0 ? error : 0, 2 * (exponent - bits));
    out->norm = ldexp(norm, 2 * (exponent - bits));
}

INLINE void account(struct converted *out, double norm, struct exact_state state, int exponent) {
    account_in(out, norm, state, exponent, FIXED_BITS);
}

#endif
