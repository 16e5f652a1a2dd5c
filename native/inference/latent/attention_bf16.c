/* Absorbed attention in products of bf16, a vector of sixteen heads at a time.
 *
 * Queries and keys in bf16 are multiplied as they are. Over a latent of codes, queries are codes too; bf16 holds both exactly,
 * and float32 their sums. */
#include "inference/latent/keys.h"

enum { LANES = 16, MOST_VECTORS = TASK_HEADS / LANES };

/* A task's memory. */
struct buffers {
    uint32_t *latent, *rope; /* queries [vectors][channels / 2][LANES] */
    float *factor;           /* [MOST_VECTORS][LANES]: of codes */
    float *score;            /* [MOST_VECTORS][ATTENTION_KEYS][LANES] */
    uint32_t *weight;        /* [ATTENTION_KEYS / 2][LANES] */
    uint16_t *decoded;       /* latents of a tile of codes [latent_width / 16][ATTENTION_KEYS][16] */
    float *row;              /* a query, as codes are made of it */
    char *tile;              /* of copied keys */
};

static size_t vectors_of(size_t heads) { return (heads + LANES - 1) / LANES; }

static void *take(char **at, size_t bytes) {
    void *taken = *at;
    *at += (bytes + 63) / 64 * 64;
    return taken;
}

static struct buffers divide(const struct attention *attention, size_t heads, char *memory, size_t *bytes) {
    const size_t latent = attention->latent_width, rope = attention->rope_width, vectors = vectors_of(heads);
    const bool codes = attention->cache->latent.scale != NULL;
    char *at = memory;
    struct buffers to = {.latent = take(&at, vectors * latent / 2 * LANES * sizeof(uint32_t))};
    to.rope = take(&at, vectors * rope / 2 * LANES * sizeof(uint32_t));
    to.factor = take(&at, vectors * LANES * sizeof(float));
    to.score = take(&at, vectors * ATTENTION_KEYS * LANES * sizeof(float));
    to.weight = take(&at, ATTENTION_KEYS / 2 * LANES * sizeof(uint32_t));
    to.decoded = take(&at, codes ? ATTENTION_KEYS * latent * sizeof(uint16_t) : 0);
    to.row = take(&at, codes ? 2 * latent * sizeof(float) : 0);
    to.tile = take(&at, copies_keys(attention) ? ATTENTION_KEYS * (latent + rope) * sizeof(uint16_t) : 0);
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
    return divide(attention, heads, (char *)(((uintptr_t)memory + 63) / 64 * 64), &bytes);
}

/* A query's bf16 channels into its lane, zeros past the last. */
static void place_query(const uint16_t *q, size_t channels, size_t width, size_t lane, uint32_t *to) {
    for (size_t pair = 0; pair < width / 2; pair++) {
        const uint32_t low = 2 * pair < channels ? q[2 * pair] : 0, high = 2 * pair + 1 < channels ? q[2 * pair + 1] : 0;
        to[pair * LANES + lane] = low | high << 16;
    }
}

/* A query as codes see it: times their channels' scales, and rounded to int8; returns the scale of its codes. */
static float code_query(const struct attention *attention, const uint16_t *q, float *row, uint16_t *to) {
    const size_t l = (size_t)attention->cache->latent.channels;
    int8_t *codes = (int8_t *)(row + l);
    float scale;
    attention->kernels->to_float(q, NPUQ_BF16, l, row);
    for (size_t i = 0; i < l; i++) row[i] *= attention->cache->latent.scale[i];
    attention->kernels->quant_row(row, l, codes, &scale);
    attention->kernels->bf16_codes(codes, 16, l / 16, to);
    return scale;
}

static void load_queries(const struct attention *attention, const struct span *span, void *memory) {
    const size_t l = (size_t)attention->cache->latent.channels, d = (size_t)attention->cache->rope.channels;
    const size_t latent = attention->latent_width, rope = attention->rope_width;
    struct buffers to = buffers_of(attention, span->heads, memory);
    /* Lanes without a head compute zeros. */
    memset(to.latent, 0, vectors_of(span->heads) * latent / 2 * LANES * sizeof *to.latent);
    memset(to.rope, 0, vectors_of(span->heads) * rope / 2 * LANES * sizeof *to.rope);
    memset(to.factor, 0, vectors_of(span->heads) * LANES * sizeof *to.factor);
    for (size_t h = 0; h < span->heads; h++) {
        const size_t row = span->token * attention->heads + span->head + h, vector = h / LANES, lane = h % LANES;
        const uint16_t *q = (const uint16_t *)(const void *)attention->q_latent + row * l;
        if (attention->cache->latent.scale != NULL) {
            to.factor[h] = code_query(attention, q, to.row, to.decoded);
            q = to.decoded;
        }
        place_query(q, l, latent, lane, to.latent + vector * latent / 2 * LANES);
        q = (const uint16_t *)(const void *)attention->q_rope + row * d;
        place_query(q, d, rope, lane, to.rope + vector * rope / 2 * LANES);
    }
}

/* Rows of a tile, from the first key on. */
static struct bf16_rows rows_of(const char *block, size_t block_size, size_t first) {
    return (struct bf16_rows){block + first * 32, 32, block_size * 32};
}

/* The latents of a tile in bf16; codes are decoded: [channels / 32, block_size, 32] to [channels / 16, ATTENTION_KEYS, 16]. */
static struct bf16_rows latents(const struct attention *attention, const struct place *now, uint16_t *decoded) {
    if (attention->cache->latent.scale == NULL) return rows_of(now->latent, now->block_size, now->first);
    for (size_t group = 0; group < attention->latent_width / 32; group++) {
        const int8_t *codes = (const int8_t *)now->latent + (group * now->block_size + now->first) * 32;
        for (size_t half = 0; half < 2; half++) {
            attention->kernels->bf16_codes(codes + half * 16, 32, now->keys, decoded + (2 * group + half) * ATTENTION_KEYS * 16);
        }
    }
    return rows_of((const char *)decoded, ATTENTION_KEYS, 0);
}

static void attend_keys(const struct attention *attention, const struct place *now, size_t heads, struct buffers *with,
                        struct running *in) {
    const struct kernels *kernels = attention->kernels;
    const size_t vectors = vectors_of(heads), width = attention->latent_width;
    const bool codes = attention->cache->latent.scale != NULL;
    const struct bf16_rows latent = latents(attention, now, with->decoded), rope = rows_of(now->rope, now->block_size, now->first);
    int32_t all[LANES];
    for (size_t lane = 0; lane < LANES; lane++) all[lane] = (int32_t)now->keys;
    kernels->bf16_scores(with->latent, vectors, &latent, width, now->keys, 0, with->score);
    for (size_t vector = 0; codes && vector < vectors; vector++) {
        float *score = with->score + vector * ATTENTION_KEYS * LANES;
        for (size_t j = 0; j < now->keys; j++) {
            for (size_t lane = 0; lane < LANES; lane++) score[j * LANES + lane] *= with->factor[vector * LANES + lane];
        }
    }
    kernels->bf16_scores(with->rope, vectors, &rope, attention->rope_width, now->keys, 1, with->score);
    for (size_t vector = 0; vector < vectors; vector++) {
        const size_t head = vector * LANES, some = heads - head < LANES ? heads - head : LANES;
        float keep[LANES];
        kernels->bf16_softmax(with->score + head * ATTENTION_KEYS, now->keys, attention->scale, all, in->largest + head,
                              in->total + head, keep, with->weight);
        kernels->bf16_weigh(with->weight, &latent, width, now->keys, some, keep, in->out + head * width, width);
    }
}

static void attend_span(const struct attention *attention, const struct span *span, struct running *in, void *memory) {
    struct buffers with = buffers_of(attention, span->heads, memory);
    for (size_t key = span->first; key < span->end;) {
        struct place now = copies_keys(attention)
                               ? copy_keys(attention, span->sequence, span->selected, key, span->end, with.tile)
                               : find_keys(attention, span->sequence, key, span->end);
        attend_keys(attention, &now, span->heads, &with, in);
        key += now.keys;
    }
}

const struct arithmetic bf16_attention = {span_bytes, load_queries, attend_span};
