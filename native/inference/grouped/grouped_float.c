/* Grouped attention in float32. Keys and values are read where they lie; those of NZ pages and codes are decoded first. */
#include <math.h>
#include <string.h>

#include "inference/grouped/grouped.h"

enum {
    FEW_ROWS = 16, /* up to so many rows a task waits for memory: */
    STRIP = 4,     /* it scores so many keys at a time, */
    AHEAD = 16,    /* and fetches others that far ahead, and the values of these. */
};

/* A task's floats, in the thread's scratch. */
struct buffers {
    float *q, *out, *score, *largest, *total, *keys, *values;
};

/* A tile of one head's keys or values. */
struct tile {
    const void *rows;
    int dtype;
    size_t stride;
};

static bool decodes(const npuq_pages *pages) { return pages->layout == NPUQ_NZ || pages->scale != NULL; }

static size_t task_bytes(const struct grouped *grouped) {
    size_t tiles = decodes(&grouped->cache->key) || decodes(&grouped->cache->value) ? 2 * KEYS * grouped->dim : 0;
    return (grouped->rows * (2 * grouped->dim + KEYS + 2) + tiles) * sizeof(float);
}

static struct buffers divide(const struct grouped *grouped, float *memory) {
    struct buffers to = {.q = memory};
    to.out = to.q + grouped->rows * grouped->dim;
    to.score = to.out + grouped->rows * grouped->dim;
    to.largest = to.score + grouped->rows * KEYS;
    to.total = to.largest + grouped->rows;
    to.keys = to.total + grouped->rows;
    to.values = to.keys + KEYS * grouped->dim;
    return to;
}

/* Channels of `head` at `count` slots of one page, as floats [count, dim]. */
static void decode(const struct grouped *grouped, const npuq_pages *pages, size_t slot, size_t count, size_t head, float *to) {
    size_t size = size_of(pages->dtype), block_size = (size_t)pages->block_size, dim = grouped->dim;
    size_t channels = (size_t)pages->channels, width = nz_channels(pages->dtype), first = head * dim;
    const char *page = (const char *)pages->rows + slot / block_size * block_size * channels * size;
    for (size_t j = 0; j < count; j++) {
        size_t offset = slot % block_size + j;
        for (size_t c = 0; c < dim;) {
            size_t channel = first + c, some = dim - c, at = offset * channels + channel;
            if (pages->layout == NPUQ_NZ) {
                size_t left = width - channel % width;
                some = some < left ? some : left;
                at = (channel / width * block_size + offset) * width + channel % width;
            }
            if (pages->scale == NULL) {
                grouped->kernels->to_float(page + at * size, pages->dtype, some, to + j * dim + c);
            } else {
                const int8_t *code = (const int8_t *)page + at;
                for (size_t i = 0; i < some; i++) to[j * dim + c + i] = (float)code[i] * pages->scale[channel + i];
            }
            c += some;
        }
    }
}

static struct tile read_tile(const struct grouped *grouped, const npuq_pages *pages, size_t slot, size_t count,
                             size_t head, float *decoded) {
    if (decodes(pages)) {
        decode(grouped, pages, slot, count, head, decoded);
        return (struct tile){decoded, NPUQ_F32, grouped->dim};
    }
    size_t channels = (size_t)pages->channels, at = slot * channels + head * grouped->dim;
    return (struct tile){(const char *)pages->rows + at * size_of(pages->dtype), pages->dtype, channels};
}

static void load_queries(const struct grouped *grouped, const struct block *block, size_t head, struct buffers *to) {
    size_t dim = grouped->dim, group = grouped->group;
    for (size_t i = 0; i < (size_t)block->count; i++) {
        for (size_t g = 0; g < group; g++) {
            size_t row = i * group + g;
            float *q = to->q + row * dim;
            grouped->kernels->to_float(query_at(grouped, block, i, head * group + g), grouped->dtype, dim, q);
            grouped->kernels->multiply_row(grouped->scale, dim, q);
            to->largest[row] = -INFINITY;
            to->total[row] = 0;
        }
    }
    memset(to->out, 0, (size_t)block->count * group * dim * sizeof(float));
}

static void fetch_rows(const struct tile *tile, size_t row, size_t rows, size_t dim) {
    size_t size = size_of(tile->dtype), bytes = dim * size;
    for (size_t j = row; j < row + rows; j++) {
        const char *at = (const char *)tile->rows + j * tile->stride * size;
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    }
}

/* Scores of `count` keys for `rows` queries from `q` on. */
static void score_keys(const struct grouped *grouped, const struct tile *keys, const struct tile *values, size_t count,
                       const float *q, size_t rows, float *score) {
    size_t dim = grouped->dim, size = size_of(keys->dtype), strip = rows > FEW_ROWS ? count : STRIP;
    for (size_t j = 0; j < count; j += strip) {
        size_t some = count - j < strip ? count - j : strip;
        if (rows <= FEW_ROWS) {
            fetch_rows(keys, j + AHEAD, some, dim); /* maybe behind the page's end, where it does nothing */
            fetch_rows(values, j, some, dim);
        }
        grouped->kernels->dot_float((const char *)keys->rows + j * keys->stride * size, keys->dtype, keys->stride, some, q,
                                    dim, rows, dim, score + j, KEYS, (struct following){0});
    }
}

/* Merges a tile's keys into the block's queries. A value behind those that a query sees does not meet its weight of 0: it
 * may be no number. */
static void attend_tile(const struct grouped *grouped, const struct block *block, const struct tile *keys,
                        const struct tile *values, int64_t key, size_t count, struct buffers *in) {
    const struct kernels *kernels = grouped->kernels;
    size_t dim = grouped->dim, group = grouped->group, queries = (size_t)block->count, from = 0;
    while (from < queries && visible(grouped, block, (int64_t)from, key, count) == 0) from++;
    if (from == queries) return;
    score_keys(grouped, keys, values, count, in->q + from * group * dim, (queries - from) * group,
               in->score + from * group * KEYS);
    size_t whole = queries;
    for (size_t i = queries; i-- > from;) {
        size_t seen = visible(grouped, block, (int64_t)i, key, count), first = i * group;
        for (size_t row = first; row < first + group; row++) {
            float keep = kernels->online_softmax(in->score + row * KEYS, seen, count, in->largest + row, in->total + row);
            if (keep != 1) kernels->multiply_row(keep, dim, in->out + row * dim);
        }
        if (seen == count) whole = i;
        else kernels->axpy_add(values->rows, values->dtype, values->stride, seen, dim, in->score + first * KEYS, KEYS, group, in->out + first * dim, dim);
    }
    kernels->axpy_add(values->rows, values->dtype, values->stride, count, dim, in->score + whole * group * KEYS, KEYS,
                      (queries - whole) * group, in->out + whole * group * dim, dim);
}

static struct gathered attend(const struct grouped *grouped, const struct block *block, size_t head, void *memory) {
    struct buffers in = divide(grouped, memory);
    load_queries(grouped, block, head, &in);
    for (int64_t key = block->key; key < block->end;) {
        size_t slot, count = find_tile(grouped, block, key, &slot);
        struct tile keys = read_tile(grouped, &grouped->cache->key, slot, count, head, in.keys);
        struct tile values = read_tile(grouped, &grouped->cache->value, slot, count, head, in.values);
        attend_tile(grouped, block, &keys, &values, key, count, &in);
        key += (int64_t)count;
    }
    return (struct gathered){in.largest, in.total, in.out};
}

const struct grouped_arithmetic grouped_float = {task_bytes, attend};
