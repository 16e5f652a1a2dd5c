/* One row of logits, from which a token is drawn.
 *
 * The ranking of tokens is one integer a token, its key: logits fall as keys rise, and equal logits rank by id. Each filter
 * keeps a beginning of the ranking, so all of them together are one greatest key, the cut. */
#ifndef NPUQ_INFERENCE_SAMPLING_ROW_H
#define NPUQ_INFERENCE_SAMPLING_ROW_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/pool.h"

enum { CHUNK = 1024, DIGIT = 11, DIGITS = 1 << DIGIT };

/* One thread's part of a pass. */
struct partial {
    float least;
    double best;       /* score + noise */
    uint64_t best_key; /* of that token */
    uint32_t order[CHUNK];
    uint64_t key[CHUNK];
    int64_t likelihood[CHUNK];
    int64_t sum[2][DIGITS]; /* by turns: an addition need not wait for the one before it */
};

struct row {
    npuq_pool *pool;
    const struct kernels *kernels;
    const float *logits;
    size_t n, chunks;
    const npuq_draw *draw;
    double inverse; /* of the temperature */
    float least, largest;
    float *group_largest, *chunk_largest; /* [chunks, GROUP_LANES], [chunks] */
    uint64_t cut;                         /* tokens of greater keys are filtered out */
    int by_likelihood;                    /* what a token weighs in a search: its likelihood, or 1 */
    int shift;                            /* behind the digit of a pass over all tokens; of the upper half of keys */
    uint64_t *listed;                     /* [n]: keys */
    _Atomic size_t *list_size;
    uint32_t list_first, list_last; /* the upper halves of listed keys */
};

static inline uint32_t falling(float logit) {
    const float positive = logit + 0.0f; /* as the kernel falling_order */
    uint32_t bits;
    memcpy(&bits, &positive, sizeof bits);
    return bits >> 31 ? bits : 0x7FFFFFFFu - bits;
}

static inline uint64_t key_of(uint32_t order, size_t id) { return (uint64_t)order << 32 | id; }

static inline float logit_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    bits = bits >> 31 ? bits : 0x7FFFFFFFu - bits;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

static inline double score(const struct row *row, float logit) {
    return ((double)logit - (double)row->largest) / row->draw->temperature;
}

static inline size_t chunk_size(const struct row *row, size_t chunk) {
    const size_t left = row->n - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

/* False if the cut leaves none of the chunk's tokens. */
static inline int chunk_has_kept(const struct row *row, size_t chunk) {
    return falling(row->chunk_largest[chunk]) <= row->cut >> 32;
}

/* The greatest key that a filter leaves, of those up to row->cut: of the `count` best tokens; of the least number of tokens that
 * have `fraction` of all likelihoods; of the tokens that min_p leaves. */
uint64_t search_best(struct row *row, int64_t count);
uint64_t search_likely(struct row *row, double fraction);
uint64_t search_min_p(const struct row *row);

#endif
