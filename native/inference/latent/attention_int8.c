/* Absorbed attention over a latent of codes, in products of int8; rotary parts are bf16.
 *
 * Queries are rounded to codes too, as the operator's contract says, and their scores are exact. Weights are rounded to a
 * 255th of their tile's largest. */
#include "inference/latent/lanes.h"

/* A task's memory. */
struct buffers {
    uint32_t *latent, *rope; /* queries [vectors][channels / 4 or / 2][LANES] */
    float *factor;           /* [MOST_VECTORS][LANES]: of a query's codes */
    int32_t *offset;         /* [MOST_VECTORS][LANES]: 128 times their sum */
    float *score;            /* [MOST_VECTORS][ATTENTION_KEYS][LANES] */
    uint32_t *weight;        /* [ATTENTION_KEYS / 4][LANES]; of lanes behind the last, some are read */
    float *row;              /* a query, as codes are made of it */
    int8_t *codes;
};

static struct buffers divide(const struct attention *attention, size_t rows, char *memory, size_t *bytes) {
    const size_t latent = attention->latent_width, rope = attention->rope_width, vectors = vectors_of(rows);
    char *at = memory;
    struct buffers to = {.latent = take(&at, vectors * latent / 4 * LANES * sizeof(uint32_t))};
    to.rope = take(&at, vectors * rope / 2 * LANES * sizeof(uint32_t));
    to.factor = take(&at, vectors * LANES * sizeof(float));
    to.offset = take(&at, vectors * LANES * sizeof(int32_t));
    to.score = take(&at, vectors * ATTENTION_KEYS * LANES * sizeof(float));
    to.weight = take(&at, (ATTENTION_KEYS / 4 + 1) * LANES * sizeof(uint32_t));
    to.row = take(&at, latent * sizeof(float));
    to.codes = take(&at, latent);
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

/* A query as codes see it: times their channels' scales, and rounded to int8, in the lane of row `row`. */
static void place_codes(const struct attention *attention, const char *q, size_t row, struct buffers *to) {
    const size_t l = (size_t)attention->cache->latent.channels;
    uint32_t *lane = to->latent + row / LANES * (l / 4) * LANES + row % LANES;
    int64_t sum = 0;
    attention->kernels->to_float(q, NPUQ_BF16, l, to->row);
    for (size_t i = 0; i < l; i++) to->row[i] *= attention->cache->latent.scale[i];
    attention->kernels->quant_row(to->row, l, to->codes, &to->factor[row]);
    for (size_t i = 0; i < l; i++) sum += to->codes[i];
    for (size_t four = 0; four < l / 4; four++) memcpy(lane + four * LANES, to->codes + 4 * four, 4);
    to->offset[row] = (int32_t)(uint32_t)(sum * 128); /* wraps where the products' sum does */
}

static void load_queries(const struct attention *attention, const struct span *span, void *memory) {
    const size_t l = (size_t)attention->cache->latent.channels, lanes = vectors_of(span->rows) * LANES;
    struct buffers to = buffers_of(attention, span->rows, memory);
    /* Lanes without a row compute zeros. */
    memset(to.latent, 0, lanes * (l / 4) * sizeof *to.latent);
    memset(to.factor, 0, lanes * sizeof *to.factor);
    memset(to.offset, 0, lanes * sizeof *to.offset);
    const char *q = attention->q_latent + first_row(attention, span) * l * sizeof(uint16_t);
    for (size_t row = 0; row < span->rows; row++) place_codes(attention, q + row * l * sizeof(uint16_t), row, &to);
    place_rope(attention, span, to.rope);
}

static void attend_keys(const struct attention *attention, const struct place *now, const struct place *next, const struct span *span,
                        size_t key, struct buffers *with, struct running *in) {
    const struct kernels *kernels = attention->kernels;
    const size_t vectors = vectors_of(span->rows), width = attention->latent_width;
    const bool all = all_see(span, key, now->keys);
    const struct key_rows latent = latent_rows(now, next), rope = rope_rows(now, next);
    kernels->int8_scores(with->latent, vectors, &latent, width, now->keys, with->factor, with->offset, with->score);
    kernels->bf16_scores(with->rope, vectors, &rope, attention->rope_width, now->keys, 1, with->score);
    for (size_t row = 0, end; row < span->rows; row = end) {
        const struct lanes lanes = next_lanes(span, row, all);
        const size_t keys = all ? now->keys : seen_by(span, row, key, now->keys);
        end = row + lanes.count;
        if (keys == 0) continue;
        float largest[LANES], total[LANES], keep[LANES], factor[LANES];
        copy_running(in, lanes.vector, largest, total);
        kernels->int8_softmax(with->score + lanes.vector * ATTENTION_KEYS, keys, attention->scale, largest, total, keep, factor,
                              with->weight);
        keep_running(in, row, &lanes, largest, total);
        kernels->int8_weigh(with->weight + lanes.first, &latent, width, keys, lanes.count, keep + lanes.first,
                            factor + lanes.first, in->out + row * width, width);
    }
}

static void attend_span(const struct attention *attention, const struct span *span, struct running *in, void *memory) {
    struct buffers with = buffers_of(attention, span->rows, memory);
    struct place now = find_keys(attention, span->sequence, span->first, span->end);
    for (size_t key = span->first; key < span->end;) {
        const struct place next = find_keys(attention, span->sequence, key + now.keys, span->end);
        attend_keys(attention, &now, &next, span, key, &with, in);
        key += now.keys;
        now = next;
    }
}

const struct arithmetic int8_attention = {span_bytes, load_queries, attend_span};
