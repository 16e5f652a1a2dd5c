/* Absorbed attention in products of bf16, a vector of sixteen heads at a time: queries and keys are multiplied as they are. */
#include "inference/latent/lanes.h"

/* A task's memory. */
struct buffers {
    uint32_t *latent, *rope; /* queries [vectors][channels / 2][LANES] */
    float *score;            /* [MOST_VECTORS][ATTENTION_KEYS][LANES] */
    uint32_t *weight;        /* [ATTENTION_KEYS / 2][LANES]; of lanes behind the last, some are read */
    char *tile;              /* of copied keys */
};

static struct buffers divide(const struct attention *attention, size_t rows, char *memory, size_t *bytes) {
    const size_t latent = attention->latent_width, rope = attention->rope_width, vectors = vectors_of(rows);
    char *at = memory;
    struct buffers to = {.latent = take(&at, vectors * latent / 2 * LANES * sizeof(uint32_t))};
    to.rope = take(&at, vectors * rope / 2 * LANES * sizeof(uint32_t));
    to.score = take(&at, vectors * ATTENTION_KEYS * LANES * sizeof(float));
    to.weight = take(&at, (ATTENTION_KEYS / 2 + 1) * LANES * sizeof(uint32_t));
    to.tile = take(&at, copies_keys(attention) ? ATTENTION_KEYS * (latent + rope) * sizeof(uint16_t) : 0);
    *bytes = (size_t)(at - memory);
    return to;
}

static size_t span_bytes(const struct attention *attention, size_t rows) {
    size_t bytes;
    char none;
    divide(attention, rows, &none, &bytes);
    return bytes + 64;
}

static struct buffers buffers_of(const struct attention *attention, size_t rows, void *memory) {
    size_t bytes;
    return divide(attention, rows, first_line(memory), &bytes);
}

static void load_queries(const struct attention *attention, const struct span *span, void *memory) {
    const size_t l = (size_t)attention->cache->latent.channels, width = attention->latent_width;
    struct buffers to = buffers_of(attention, span->rows, memory);
    /* Lanes without a row compute zeros. */
    memset(to.latent, 0, vectors_of(span->rows) * width / 2 * LANES * sizeof *to.latent);
    const uint16_t *q = (const uint16_t *)(const void *)attention->q_latent + first_row(attention, span) * l;
    for (size_t row = 0; row < span->rows; row++) {
        place_query(q + row * l, l, width, row % LANES, to.latent + row / LANES * (width / 2) * LANES);
    }
    place_rope(attention, span, to.rope);
}

static void attend_keys(const struct attention *attention, const struct place *now, const struct place *next, const struct span *span,
                        size_t key, struct buffers *with, struct running *in) {
    const struct kernels *kernels = attention->kernels;
    const size_t vectors = vectors_of(span->rows), width = attention->latent_width;
    const bool all = all_see(span, key, now->keys);
    const struct key_rows latent = latent_rows(now, next), rope = rope_rows(now, next);
    kernels->bf16_scores(with->latent, vectors, &latent, width, now->keys, 0, with->score);
    kernels->bf16_scores(with->rope, vectors, &rope, attention->rope_width, now->keys, 1, with->score);
    for (size_t row = 0, end; row < span->rows; row = end) {
        const struct lanes lanes = next_lanes(span, row, all);
        const size_t keys = all ? now->keys : seen_by(span, row, key, now->keys);
        end = row + lanes.count;
        if (keys == 0) continue;
        float largest[LANES], total[LANES], keep[LANES];
        copy_running(in, lanes.vector, largest, total);
        kernels->bf16_softmax(with->score + lanes.vector * ATTENTION_KEYS, keys, attention->scale, NULL, largest, total, keep,
                              with->weight);
        keep_running(in, row, &lanes, largest, total);
        kernels->bf16_weigh(with->weight + lanes.first, &latent, width, keys, lanes.count, keep + lanes.first,
                            in->out + row * width, width);
    }
}

static void attend_span(const struct attention *attention, const struct span *span, struct running *in, void *memory) {
    struct buffers with = buffers_of(attention, span->rows, memory);
    if (copies_keys(attention)) {
        const struct place none = {0};
        for (size_t key = span->first; key < span->end; key += ATTENTION_KEYS) {
            struct place now = copy_keys(attention, span->sequence, span->selected, key, span->end, with.tile);
            attend_keys(attention, &now, &none, span, key, &with, in);
        }
        return;
    }
    struct place now = find_keys(attention, span->sequence, span->first, span->end);
    for (size_t key = span->first; key < span->end;) {
        const struct place next = find_keys(attention, span->sequence, key + now.keys, span->end);
        attend_keys(attention, &now, &next, span, key, &with, in);
        key += now.keys;
        now = next;
    }
}

const struct arithmetic bf16_attention = {span_bytes, load_queries, attend_span};
