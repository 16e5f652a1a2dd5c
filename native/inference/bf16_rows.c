/* Tiles for rows of queries: copied once for all of many rows, and read where they lie by few. */
#include "inference/bf16_rows.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

/* More rows than these are worth a copy: keys then lie together, where those of one head would share few sets of the cache, and
 * values are interleaved once. Keys in two parts are always copied. */
enum { LANES = BF16_LANES, FEW_ROWS = 2 * LANES };

static size_t lanes_of(size_t rows) { return (rows + LANES - 1) / LANES * LANES; }

static void *take(char **at, size_t bytes) {
    void *taken = *at;
    *at += (bytes + 63) / 64 * 64;
    return taken;
}

static struct bf16_rows divide(size_t rows, size_t channels, size_t value, char *memory, size_t *bytes) {
    const size_t lanes = lanes_of(rows);
    char *at = memory;
    struct bf16_rows to = {.rows = rows, .channels = channels, .value = value};
    to.q = take(&at, lanes * channels / 2 * sizeof *to.q);
    to.score = take(&at, lanes * ATTENTION_KEYS * sizeof *to.score);
    to.weight = take(&at, ATTENTION_KEYS / 2 * LANES * sizeof *to.weight);
    to.largest = take(&at, lanes * sizeof *to.largest);
    to.total = take(&at, lanes * sizeof *to.total);
    to.out = take(&at, lanes * value * sizeof *to.out);
    to.keys = take(&at, ATTENTION_KEYS * channels * sizeof *to.keys);
    to.values = take(&at, ATTENTION_KEYS * value * sizeof *to.values);
    *bytes = (size_t)(at - memory);
    return to;
}

size_t bf16_rows_bytes(size_t rows, size_t channels, size_t value) {
    size_t bytes;
    char none;
    divide(rows, channels, value, &none, &bytes);
    return bytes + 64;
}

struct bf16_rows bf16_rows_begin(const struct kernels *kernels, size_t rows, size_t channels, size_t value, float scale, void *memory) {
    const size_t lanes = lanes_of(rows);
    size_t bytes;
    struct bf16_rows to = divide(rows, channels, value, (char *)(((uintptr_t)memory + 63) / 64 * 64), &bytes);
    to.kernels = kernels;
    to.scale = scale;
    memset(to.q, 0, lanes * channels / 2 * sizeof *to.q);
    memset(to.out, 0, lanes * value * sizeof *to.out);
    for (size_t lane = 0; lane < lanes; lane++) {
        to.largest[lane] = -INFINITY;
        to.total[lane] = 0;
    }
    return to;
}

void bf16_rows_place(struct bf16_rows *rows, size_t row, size_t first, const void *q, size_t channels) {
    uint32_t *lane = rows->q + row / LANES * (rows->channels / 2) * LANES + first / 2 * LANES + row % LANES;
    for (size_t pair = 0; pair < channels / 2; pair++) memcpy(lane + pair * LANES, (const char *)q + 4 * pair, 4);
}

static const char *group_at(const struct key_rows *from, size_t key, size_t group) {
    return (const char *)from->rows + key * from->row_stride + group * from->group_stride;
}

/* Copies a tile's keys, whole rows after each other. */
static struct key_rows copy_keys(const struct bf16_rows *rows, const struct bf16_keys *keys, size_t count) {
    const size_t stride = rows->channels * sizeof(uint16_t);
    char *to = (char *)rows->keys;
    for (size_t j = 0; j < count; j++) {
        char *at = to + j * stride;
        for (int p = 0; p < 2; p++) {
            for (size_t group = 0; group < keys->channels[p] / 16; group++, at += 32) memcpy(at, group_at(&keys->part[p], j, group), 32);
        }
    }
    return (struct key_rows){.rows = to, .row_stride = stride, .group_stride = 32};
}

/* Fetches some rows of those that come next, to where many lines may be on their way. */
static void fetch_rows(const struct key_rows *rows, size_t channels, size_t first, size_t count) {
    if (rows->next == NULL) return;
    const size_t step = rows->group_stride == 32 ? 2 : 1; /* groups of a line */
    for (size_t j = first; j < first + count; j++) {
        const char *row = (const char *)rows->next + j * rows->row_stride;
        for (size_t group = 0; group < channels / 16; group += step) __builtin_prefetch(row + group * rows->group_stride, 0, 2);
    }
}

static struct key_rows pair_values(const struct bf16_rows *rows, const struct key_rows *values, size_t count) {
    rows->kernels->bf16_pair_values(values, rows->value, count, (uint32_t *)(void *)rows->values);
    return (struct key_rows){.rows = rows->values, .group_stride = (count + 1) / 2 * 64, .paired = 1};
}

static bool all_finite(const struct key_rows *values, size_t count, size_t channels) {
    unsigned bad = 0;
    for (size_t j = 0; j < count; j++) {
        for (size_t group = 0; group < channels / 16; group++) {
            uint16_t bits[16];
            memcpy(bits, group_at(values, j, group), sizeof bits);
            for (size_t c = 0; c < 16; c++) bad |= (bits[c] & 0x7F80) == 0x7F80;
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

/* bf16_weigh where a value is no number: one that a row does not see must not meet its weight of 0. */
static void weigh_seen(const struct bf16_rows *rows, const struct key_rows *values, const int32_t *seen, const float *keep, float *out) {
    for (size_t lane = 0; lane < LANES; lane++) {
        float *to = out + lane * rows->value;
        for (size_t c = 0; c < rows->value; c++) to[c] *= keep[lane];
        for (size_t j = 0; j < (size_t)seen[lane]; j++) {
            const float factor = bf16_float(rows->weight[j / 2 * LANES + lane] >> 16 * (j % 2) & 0xFFFF);
            for (size_t c = 0; c < rows->value; c++) {
                uint16_t bits;
                memcpy(&bits, group_at(values, j, c / 16) + c % 16 * 2, sizeof bits);
                to[c] += factor * bf16_float(bits);
            }
        }
    }
}

void bf16_rows_merge(struct bf16_rows *rows, const struct bf16_keys *keys, const struct key_rows *values, size_t count, const int32_t *seen) {
    const size_t vectors = lanes_of(rows->rows) / LANES;
    size_t from = vectors, plain = 0, n = rows->value; /* vectors before `from` see none of the keys, and those from `plain` on all */
    for (size_t vector = vectors; vector-- > 0;) {
        int32_t least = (int32_t)count, most = 0;
        for (size_t lane = 0; lane < LANES && vector * LANES + lane < rows->rows; lane++) {
            const int32_t now = seen[vector * LANES + lane];
            least = now < least ? now : least;
            most = now > most ? now : most;
        }
        if (most > 0) from = vector;
        if (least < (int32_t)count && plain <= vector) plain = vector + 1;
    }
    if (from == vectors) return;
    const bool many = rows->rows > FEW_ROWS;
    const struct key_rows tile = many || keys->channels[1] > 0 ? copy_keys(rows, keys, count) : keys->part[0];
    const struct key_rows paired = many ? pair_values(rows, values, count) : *values;
    rows->kernels->bf16_scores(rows->q + from * (rows->channels / 2) * LANES, vectors - from, &tile, rows->channels, count, 0,
                               rows->score + from * ATTENTION_KEYS * LANES);
    const bool finite = plain <= from || all_finite(values, count, n);
    const size_t share = many ? (ATTENTION_KEYS + vectors - from - 1) / (vectors - from) : 0; /* few rows fetch as they read */
    for (size_t vector = from; vector < vectors; vector++) {
        for (int p = 0; p < 2; p++) fetch_rows(&keys->part[p], keys->channels[p], (vector - from) * share, share);
        fetch_rows(values, n, (vector - from) * share, share);
        const size_t row = vector * LANES, left = rows->rows - row, some = left < LANES ? left : LANES;
        const int32_t *sees = vector < plain ? seen + row : NULL;
        float keep[LANES];
        rows->kernels->bf16_softmax(rows->score + vector * ATTENTION_KEYS * LANES, count, rows->scale, sees, rows->largest + row,
                                    rows->total + row, keep, rows->weight);
        float *out = rows->out + row * n;
        if (finite || sees == NULL) rows->kernels->bf16_weigh(rows->weight, &paired, n, count, some, keep, out, n);
        else weigh_seen(rows, values, sees, keep, out);
    }
}
