/* Absorbed attention of some heads over some keys of one cache block, merged into what came before (online softmax).
 *
 * In the NZ layout 16 channels of one token lie together (32 of int8), and the tokens of a block follow each other: a
 * group of channels is a small [keys, 16] or [keys, 32] matrix. Scores run over the groups with a vector of channels of
 * each key; outputs run over the keys with a vector of channels of each head. Both read the cache where it lies. */
#ifndef NPUQ_INFERENCE_KERNELS_PAGED_ATTENTION_H
#define NPUQ_INFERENCE_KERNELS_PAGED_ATTENTION_H

#include "common/levels.h"
#include "common/vectors.h"

#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_NEON)
enum { SCORE_HEADS = 4, SCORE_KEYS = 4, WEIGH_HEADS = 8, WEIGH_VECTORS = 2 };
#elif defined(NPUQ_LEVEL_AVX2)
/* 12 sums: a product takes 4 cycles and two begin in each, so that 8 would be the least that keeps the units busy. */
enum { SCORE_HEADS = 4, SCORE_KEYS = 3, WEIGH_HEADS = 4, WEIGH_VECTORS = 3 };
#else
enum { SCORE_HEADS = 4, SCORE_KEYS = 2, WEIGH_HEADS = 8, WEIGH_VECTORS = 1 };
#endif

/* Adds q[h] · key[j] over `channels` channels, of keys at rows `row` of each group. */
INLINE void score_groups(const char *cache, const int dtype, size_t block_size, const size_t *row,
                         const float *const *query, size_t channels, vf sum[SCORE_HEADS][SCORE_KEYS]) {
    const size_t size = size_of(dtype), width = nz_channels(dtype);
    for (size_t first = 0; first < channels; first += width) {
        const char *group = cache + first * block_size * size;
        for (size_t part = 0; part < width; part += VW) {
            vf keys_now[SCORE_KEYS];
#pragma GCC unroll 8
            for (int j = 0; j < SCORE_KEYS; j++) keys_now[j] = vf_load_crowded(group, dtype, row[j] * width + part);
#pragma GCC unroll 8
            for (int h = 0; h < SCORE_HEADS; h++) {
                vf now = vf_load(query[h] + first + part);
#pragma GCC unroll 8
                for (int j = 0; j < SCORE_KEYS; j++) sum[h][j] = vf_add_product(sum[h][j], now, keys_now[j]);
            }
        }
    }
}

/* score[h][j] = q[h] · key[j], latent and rope channels together. Heads and keys past the last repeat it. */
INLINE void score_tile(const struct attention_tile *tile, const int dtype, const int latent_dtype, size_t head,
                       size_t key, float *score) {
    const size_t ldq = tile->latent_dim + tile->rope_dim, heads = tile->heads - head, keys = tile->keys - key;
    vf sum[SCORE_HEADS][SCORE_KEYS];
    const float *query[SCORE_HEADS], *rope_query[SCORE_HEADS];
    size_t row[SCORE_KEYS];
#pragma GCC unroll 8
    for (size_t h = 0; h < SCORE_HEADS; h++) {
        query[h] = tile->q + (head + (h < heads ? h : heads - 1)) * ldq;
        rope_query[h] = query[h] + tile->latent_dim;
#pragma GCC unroll 8
        for (int j = 0; j < SCORE_KEYS; j++) sum[h][j] = vf_set(0);
    }
    for (size_t j = 0; j < SCORE_KEYS; j++) row[j] = tile->first + key + (j < keys ? j : keys - 1);
    score_groups(tile->latent, latent_dtype, tile->block_size, row, query, tile->latent_dim, sum);
    score_groups(tile->rope, dtype, tile->block_size, row, rope_query, tile->rope_dim, sum);
#pragma GCC unroll 8
    for (size_t j = 0; j < SCORE_KEYS; j++) {
        float found[SCORE_HEADS];
        vf_sum4(sum[0][j], sum[1][j], sum[2][j], sum[3][j], found);
        for (size_t h = 0; h < SCORE_HEADS && j < keys; h++) {
            if (h < heads) score[(head + h) * ATTENTION_KEYS + key + j] = found[h];
        }
    }
}

static float online_softmax(float *score, size_t seen, size_t keys, float *largest, float *total) {
    vf maxima = vf_set(*largest);
    size_t whole = seen / VW * VW;
    for (size_t j = 0; j < whole; j += VW) maxima = vf_max(vf_load(score + j), maxima);
    float most = vf_largest(maxima);
    for (size_t j = whole; j < seen; j++) most = score[j] > most ? score[j] : most;
    /* Before the first key the maximum is −inf: exp(−inf) must be 0, and vf_exp saturates. */
    float keep = *largest == -INFINITY ? 0 : expf(*largest - most);
    vf sum = vf_set(0), poison = vf_set(0); /* a score that is no number makes the sum none: vf_exp would not */
    for (size_t j = 0; j < whole; j += VW) {
        vf now = vf_load(score + j), weight = vf_exp(now - most);
        poison = poison + now * 0.0f;
        vf_store(score + j, weight);
        sum = sum + weight;
    }
    if (whole < seen) {
        vf now = vf_load_part(score + whole, seen - whole);
        poison = poison + now * 0.0f;
        vf_store_part(score + whole, vf_exp(now - most), seen - whole);
        sum = sum + vf_load_part(score + whole, seen - whole);
    }
    for (size_t j = seen; j < keys; j++) score[j] = 0;
    *total = *total * keep + vf_sum(sum + poison);
    *largest = most;
    return keep;
}

/* The address of the next keys in channel group `number`, latent groups before rope groups; of these keys again, where
 * there is nothing more to fetch. */
INLINE const char *next_group(const struct attention_tile *tile, const int dtype, const int latent_dtype, size_t number) {
    const size_t latent_groups = tile->latent_dim / nz_channels(latent_dtype);
    const size_t rope_groups = tile->rope_dim / nz_channels(dtype);
    if (tile->next_latent == NULL || number >= latent_groups + rope_groups) return tile->latent;
    const int in_latent = number < latent_groups;
    const int stored = in_latent ? latent_dtype : dtype;
    const char *first = in_latent ? tile->next_latent : tile->next_rope;
    if (!in_latent) number -= latent_groups;
    return first + number * tile->block_size * nz_channels(stored) * size_of(stored);
}

/* out[h] = out[h] · keep[h] + Σ_j weight[h][j] · latent[j] for WEIGH_HEADS heads from `head` on, and `vectors` vectors of
 * channels from number `unit` on. `next`: a group of the keys that follow, of which a row is fetched for each key. */
INLINE void weigh_units(const struct attention_tile *tile, const int dtype, const float *weight, const float *keep,
                        size_t head, size_t unit, const int vectors, const char *next) {
    const size_t size = size_of(dtype), width = nz_channels(dtype), heads = tile->heads - head;
    const char *channels[WEIGH_VECTORS];
    float *out = tile->out + head * tile->latent_dim + unit * VW;
    vf sum[WEIGH_HEADS][WEIGH_VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
        size_t channel = (unit + (size_t)v) * VW;
        size_t row = channel / width * tile->block_size + tile->first;
        channels[v] = (const char *)tile->latent + (row * width + channel % width) * size;
#pragma GCC unroll 8
        for (size_t h = 0; h < WEIGH_HEADS; h++) {
            sum[h][v] = vf_set(0);
            if (h < heads) sum[h][v] = vf_load(out + h * tile->latent_dim + (size_t)v * VW) * keep[head + h];
        }
    }
    for (size_t j = 0; j < tile->keys; j++) {
        vf value[WEIGH_VECTORS];
#if defined(NPUQ_LEVEL_AVX2)
        __builtin_prefetch(next + j * width * size, 0, 2);
#else
        (void)next; /* measured with AVX2 only */
#endif
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) value[v] = vf_load_crowded(channels[v], dtype, j * width);
#pragma GCC unroll 8
        for (size_t h = 0; h < WEIGH_HEADS; h++) {
            vf factor = vf_set(weight[(head + h) * ATTENTION_KEYS + j]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sum[h][v] = vf_add_product(sum[h][v], factor, value[v]);
        }
    }
#pragma GCC unroll 8
    for (size_t h = 0; h < WEIGH_HEADS; h++) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            if (h < heads) vf_store(out + h * tile->latent_dim + (size_t)v * VW, sum[h][v]);
        }
    }
}

/* All channels of all heads. Keys that follow are fetched one line at a time between products: a core waits for as few as
 * two dozen lines at once, and a burst of more than that would hold everything up. */
INLINE void weigh_keys(const struct attention_tile *tile, const int dtype, const int latent_dtype, const float *weight,
                       const float *keep) {
    const size_t units = tile->latent_dim / VW;
    size_t group = 0;
    for (size_t unit = 0; unit < units;) {
        const int whole = units - unit >= WEIGH_VECTORS;
        for (size_t head = 0; head < tile->heads; head += WEIGH_HEADS) {
            const char *next = next_group(tile, dtype, latent_dtype, group++);
            if (whole) weigh_units(tile, latent_dtype, weight, keep, head, unit, WEIGH_VECTORS, next);
            else weigh_units(tile, latent_dtype, weight, keep, head, unit, 1, next);
        }
        unit += whole ? WEIGH_VECTORS : 1;
    }
}

INLINE void attend_as(const struct attention_tile *tile, const int dtype, const int latent_dtype) {
    float score[ATTENTION_HEADS * ATTENTION_KEYS] = {0}, keep[ATTENTION_HEADS] = {0};
    for (size_t h = 0; h < tile->heads; h += SCORE_HEADS) {
        for (size_t j = 0; j < tile->keys; j += SCORE_KEYS) score_tile(tile, dtype, latent_dtype, h, j, score);
    }
    for (size_t h = 0; h < tile->heads; h++) {
        keep[h] = online_softmax(score + h * ATTENTION_KEYS, tile->keys, tile->keys, tile->largest + h, tile->total + h);
    }
    weigh_keys(tile, dtype, latent_dtype, score, keep);
}

static void attend(const struct attention_tile *tile) {
    if (tile->latent_dtype == NPUQ_I8) {
        if (tile->dtype == NPUQ_BF16) attend_as(tile, NPUQ_BF16, NPUQ_I8);
        else attend_as(tile, NPUQ_F32, NPUQ_I8);
    } else if (tile->dtype == NPUQ_BF16) {
        attend_as(tile, NPUQ_BF16, NPUQ_BF16);
    } else {
        attend_as(tile, NPUQ_F32, NPUQ_F32);
    }
}

#endif
