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
    uint32_t *weight;        /* [ATTENTION_KEYS / 4][LANES] */
    float *row;              /* a query, as codes are made of it */
    int8_t *codes;
};

static struct buffers divide(const struct attention *attention, size_t heads, char *memory, size_t *bytes) {
    const size_t latent = attention->latent_width, rope = attention->rope_width, vectors = vectors_of(heads);
    char *at = memory;
    struct buffers to = {.latent = take(&at, vectors * latent / 4 * LANES * sizeof(uint32_t))};
    to.rope = take(&at, vectors * rope / 2 * LANES * sizeof(uint32_t));
    to.factor = take(&at, vectors * LANES * sizeof(float));
    to.offset = take(&at, vectors * LANES * sizeof(int32_t));
    to.score = take(&at, vectors * ATTENTION_KEYS * LANES * sizeof(float));
    to.weight = take(&at, ATTENTION_KEYS / 4 * LANES * sizeof(uint32_t));
    to.row = take(&at, latent * sizeof(float));
    to.codes = take(&at, latent);
    *bytes = (size_t)(at - memory);
    return to;
}

static size_t span_bytes(const struct attention *attention, size_t heads) {
    size_t bytes;
    char none;
    divide(attention, heads, &none, &bytes);
    return bytes + 64;
}

static struct buffers buffers_of(const struct attention *attention, size_t heads, void *memory) {
    size_t bytes;
    return divide(attention, heads, first_line(memory), &bytes);
}

/* A query as codes see it: times their channels' scales, and rounded to int8, in the lane of head `h`. */
static void place_codes(const struct attention *attention, const char *q, size_t h, struct buffers *to) {
    const size_t l = (size_t)attention->cache->latent.channels;
    uint32_t *lane = to->latent + h / LANES * (l / 4) * LANES + h % LANES;
    int64_t sum = 0;
    attention->kernels->to_float(q, NPUQ_BF16, l, to->row);
    for (size_t i = 0; i < l; i++) to->row[i] *= attention->cache->latent.scale[i];
    attention->kernels->quant_row(to->row, l, to->codes, &to->factor[h]);
    for (size_t i = 0; i < l; i++) sum += to->codes[i];
    for (size_t four = 0; four < l / 4; four++) memcpy(lane + four * LANES, to->codes + 4 * four, 4);
    to->offset[h] = (int32_t)(uint32_t)(sum * 128); /* wraps where the products' sum does */
}

static void load_queries(const struct attention *attention, const struct span *span, void *memory) {
    const size_t l = (size_t)attention->cache->latent.channels, lanes = vectors_of(span->heads) * LANES;
    struct buffers to = buffers_of(attention, span->heads, memory);
    /* Lanes without a head compute zeros. */
    memset(to.latent, 0, lanes * (l / 4) * sizeof *to.latent);
    memset(to.factor, 0, lanes * sizeof *to.factor);
    memset(to.offset, 0, lanes * sizeof *to.offset);
    for (size_t h = 0; h < span->heads; h++) {
        const size_t row = span->token * attention->heads + span->head + h;
        place_codes(attention, attention->q_latent + row * l * sizeof(uint16_t), h, &to);
    }
    place_rope(attention, span, to.rope);
}

static void attend_keys(const struct attention *attention, const struct place *now, const struct place *next, size_t heads,
                        struct buffers *with, struct running *in) {
    const struct kernels *kernels = attention->kernels;
    const size_t vectors = vectors_of(heads), width = attention->latent_width;
    const struct key_rows latent = latent_rows(now, next), rope = rope_rows(now, next);
    kernels->int8_scores(with->latent, vectors, &latent, width, now->keys, with->factor, with->offset, with->score);
    kernels->bf16_scores(with->rope, vectors, &rope, attention->rope_width, now->keys, 1, with->score);
    for (size_t vector = 0; vector < vectors; vector++) {
        const size_t head = vector * LANES, some = heads - head < LANES ? heads - head : LANES;
        float keep[LANES], factor[LANES];
        kernels->int8_softmax(with->score + head * ATTENTION_KEYS, now->keys, attention->scale, in->largest + head,
                              in->total + head, keep, factor, with->weight);
        kernels->int8_weigh(with->weight, &latent, width, now->keys, some, keep, factor, in->out + head * width, width);
    }
}

static void attend_span(const struct attention *attention, const struct span *span, struct running *in, void *memory) {
    struct buffers with = buffers_of(attention, span->heads, memory);
    struct place now = find_keys(attention, span->sequence, span->first, span->end);
    for (size_t key = span->first; key < span->end;) {
        key += now.keys;
        const struct place next = find_keys(attention, span->sequence, key, span->end);
        attend_keys(attention, &now, &next, span->heads, &with, in);
        now = next;
    }
}

const struct arithmetic int8_attention = {span_bytes, load_queries, attend_span};
