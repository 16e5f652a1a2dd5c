/* Absorbed attention in float32: scores and outputs of a span's keys, eight heads at a time. */
#include <math.h>

#include "inference/latent/keys.h"

/* A query as int8 keys see it: times their channels' scales, and rounded to int8 itself. `codes` is scratch. */
static void round_query(const struct attention *attention, float *q, int8_t *codes) {
    const size_t l = (size_t)attention->cache->latent.channels;
    float scale;
    for (size_t i = 0; i < l; i++) q[i] *= attention->cache->latent.scale[i];
    attention->kernels->quant_row(q, l, codes, &scale);
    for (size_t i = 0; i < l; i++) q[i] = (float)codes[i] * scale;
}

/* Floats of `n` channels, zeros after them up to `width`. */
static void load_channels(const struct attention *attention, const void *x, int dtype, size_t n, size_t width, float *q) {
    attention->kernels->to_float(x, dtype, n, q);
    for (size_t i = n; i < width; i++) q[i] = 0;
}

/* The rope's place, written last, is scratch before. */
static void load_query(const struct attention *attention, size_t row, float *q) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels, size = size_of(cache->rope.dtype);
    size_t wide = attention->latent_width, all = wide + attention->rope_width;
    load_channels(attention, attention->q_latent + row * l * size, cache->rope.dtype, l, wide, q);
    if (cache->latent.scale != NULL) round_query(attention, q, (int8_t *)(q + l));
    load_channels(attention, attention->q_rope + row * d * size, cache->rope.dtype, d, attention->rope_width, q + wide);
    for (size_t i = 0; i < all; i++) q[i] *= attention->scale;
}

static const char *row_address(const char *block, int dtype, size_t first) {
    return block == NULL ? NULL : block + first * nz_channels(dtype) * size_of(dtype);
}

/* Merges a tile's keys from number `key` on into all rows of a task: the first of them fetch the keys that follow. Tokens that
 * do not see all of them attend one by one. */
static void attend_keys(const struct attention *attention, const struct place *now, const struct place *next,
                        const struct span *span, size_t key, const float *q, struct running *in) {
    const npuq_latent_cache *cache = attention->cache;
    const bool all = all_see(span, key, now->keys);
    size_t l = attention->latent_width, d = attention->rope_width;
    for (size_t row = 0, end; row < span->rows; row = end) {
        const size_t keys = all ? now->keys : seen_by(span, row, key, now->keys);
        end = all ? span->rows : end_of_token(span, row);
        end = end < row + ATTENTION_HEADS ? end : row + ATTENTION_HEADS;
        if (keys == 0) continue;
        struct attention_tile tile = {
            .latent = now->latent, .rope = now->rope, .dtype = cache->rope.dtype, .latent_dtype = cache->latent.dtype,
            .block_size = now->block_size, .first = now->first, .keys = keys, .latent_dim = l,
            .rope_dim = d, .heads = end - row, .q = q + row * (l + d),
            .next_latent = row > 0 ? NULL : row_address(next->latent, cache->latent.dtype, next->first),
            .next_rope = row > 0 ? NULL : row_address(next->rope, cache->rope.dtype, next->first),
            .largest = in->largest + row, .total = in->total + row, .out = in->out + row * l,
        };
        attention->kernels->attend(&tile);
    }
}

static size_t span_bytes(const struct attention *attention, size_t rows) {
    const size_t width = attention->latent_width + attention->rope_width;
    const size_t tile = copies_keys(attention) ? ATTENTION_KEYS * width * size_of(attention->cache->rope.dtype) : 0;
    /* The last query's codes, where they are longer than its rope. */
    const size_t codes = attention->cache->latent.scale != NULL ? attention->latent_width : 0;
    return rows * width * sizeof(float) + (tile > codes ? tile : codes);
}

/* Queries, times the softmax's scale, at the beginning of `memory`; their codes pass through what is behind each. */
static void load_queries(const struct attention *attention, const struct span *span, void *memory) {
    const size_t all = attention->latent_width + attention->rope_width;
    float *q = memory;
    for (size_t row = 0; row < span->rows; row++) load_query(attention, first_row(attention, span) + row, q + row * all);
}

static void attend_span(const struct attention *attention, const struct span *span, struct running *in, void *memory) {
    const float *q = memory;
    char *tile = (char *)memory + span->rows * (attention->latent_width + attention->rope_width) * sizeof(float);
    const struct place none = {0};
    if (copies_keys(attention)) {
        for (size_t key = span->first; key < span->end; key += ATTENTION_KEYS) {
            struct place now = copy_keys(attention, span->sequence, span->selected, key, span->end, tile);
            attend_keys(attention, &now, &none, span, key, q, in);
        }
        return;
    }
    struct place now = find_keys(attention, span->sequence, span->first, span->end);
    for (size_t key = span->first; key < span->end;) {
        struct place next = find_keys(attention, span->sequence, key + now.keys, span->end);
        attend_keys(attention, &now, &next, span, key, q, in);
        key += now.keys;
        now = next;
    }
}

const struct arithmetic float_attention = {span_bytes, load_queries, attend_span};
