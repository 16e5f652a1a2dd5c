/* Absorbed attention of some heads over some keys of one cache block, merged into what came before (online softmax).
 *
 * In the NZ layout 16 channels of one token lie together, and the tokens of a block follow each other: a group of 16
 * channels is a small [keys, 16] matrix. Scores run over the groups with a vector of channels a key; outputs run over
 * the keys with a vector of channels a head. Both read the cache where it lies. */
#ifndef NPUQ_KERNELS_ATTENTION_H
#define NPUQ_KERNELS_ATTENTION_H

#include "../levels.h"
#include "simd.h"

#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_NEON)
enum { SCORE_HEADS = 4, SCORE_KEYS = 4 };
#else
enum { SCORE_HEADS = 4, SCORE_KEYS = 2 };
#endif

/* score[h][j] += q[h] · key[j] over `groups` groups of 16 channels. */
INLINE void score_tile(const char *cache, const int dtype, size_t block_size, size_t key, size_t keys, const float *q,
                       size_t ldq, size_t heads, size_t groups, float *score) {
    const size_t size = dtype == NPUQ_F32 ? 4 : 2;
    vf sum[SCORE_HEADS][SCORE_KEYS];
    const float *query[SCORE_HEADS];
    size_t row[SCORE_KEYS];
    for (size_t h = 0; h < SCORE_HEADS; h++) query[h] = q + (h < heads ? h : heads - 1) * ldq;
    for (size_t j = 0; j < SCORE_KEYS; j++) row[j] = (key + (j < keys ? j : keys - 1)) * 16;
#pragma GCC unroll 8
    for (int h = 0; h < SCORE_HEADS; h++) {
#pragma GCC unroll 8
        for (int j = 0; j < SCORE_KEYS; j++) sum[h][j] = vf_set(0);
    }
    for (size_t g = 0; g < groups; g++) {
        const char *group = cache + g * block_size * 16 * size;
        for (size_t part = 0; part < 16; part += VW) {
            vf keys_now[SCORE_KEYS];
#pragma GCC unroll 8
            for (int j = 0; j < SCORE_KEYS; j++) keys_now[j] = vf_load_as(group, dtype, row[j] + part);
#pragma GCC unroll 8
            for (int h = 0; h < SCORE_HEADS; h++) {
                vf now = vf_load(query[h] + g * 16 + part);
#pragma GCC unroll 8
                for (int j = 0; j < SCORE_KEYS; j++) sum[h][j] = vf_fma(now, keys_now[j], sum[h][j]);
            }
        }
    }
    for (size_t h = 0; h < SCORE_HEADS && h < heads; h++) {
        for (size_t j = 0; j < SCORE_KEYS && j < keys; j++) score[h * ATTENTION_KEYS + j] += vf_sum(sum[h][j]);
    }
}

/* out[h] = out[h] · keep[h] + Σ_j weight[h][j] · latent[j], one vector of channels at a time. */
INLINE void weigh_keys(const struct attention_tile *tile, const int dtype, const float *weight, const float *keep) {
    const size_t size = dtype == NPUQ_F32 ? 4 : 2;
    for (size_t g = 0; g < tile->latent_dim / 16; g++) {
        const char *group = (const char *)tile->latent + (g * tile->block_size + tile->first) * 16 * size;
        for (size_t part = 0; part < 16; part += VW) {
            float *out = tile->out + g * 16 + part;
            vf sum[ATTENTION_HEADS];
#pragma GCC unroll 8
            for (size_t h = 0; h < ATTENTION_HEADS; h++) {
                sum[h] = vf_set(0);
                if (h < tile->heads) sum[h] = vf_load(out + h * tile->latent_dim) * keep[h];
            }
            for (size_t j = 0; j < tile->keys; j++) {
                vf value = vf_load_as(group, dtype, j * 16 + part);
#pragma GCC unroll 8
                for (size_t h = 0; h < ATTENTION_HEADS; h++) {
                    sum[h] = vf_fma(vf_set(weight[h * ATTENTION_KEYS + j]), value, sum[h]);
                }
            }
#pragma GCC unroll 8
            for (size_t h = 0; h < ATTENTION_HEADS; h++) {
                if (h < tile->heads) vf_store(out + h * tile->latent_dim, sum[h]);
            }
        }
    }
}

INLINE void attend_as(const struct attention_tile *tile, const int dtype) {
    float score[ATTENTION_HEADS * ATTENTION_KEYS] = {0}, keep[ATTENTION_HEADS] = {0};
    size_t ldq = tile->latent_dim + tile->rope_dim;
    for (size_t h = 0; h < tile->heads; h += SCORE_HEADS) {
        for (size_t j = 0; j < tile->keys; j += SCORE_KEYS) {
            const float *q = tile->q + h * ldq;
            float *to = score + h * ATTENTION_KEYS + j;
            size_t heads = tile->heads - h, keys = tile->keys - j, key = tile->first + j;
            score_tile(tile->latent, dtype, tile->block_size, key, keys, q, ldq, heads, tile->latent_dim / 16, to);
            score_tile(tile->rope, dtype, tile->block_size, key, keys, q + tile->latent_dim, ldq, heads,
                       tile->rope_dim / 16, to);
        }
    }
    for (size_t h = 0; h < tile->heads; h++) {
        float *row = score + h * ATTENTION_KEYS, largest = tile->largest[h];
        for (size_t j = 0; j < tile->keys; j++) largest = row[j] > largest ? row[j] : largest;
        /* The first tile has −inf before it: exp(−inf) must be 0, and vf_exp saturates. */
        keep[h] = tile->largest[h] == -INFINITY ? 0 : expf(tile->largest[h] - largest);
        vf sum = vf_set(0);
        size_t j = 0;
        for (; j < tile->keys; j += VW) {
            size_t left = tile->keys - j < VW ? tile->keys - j : VW;
            vf weight = vf_exp(vf_load(row + j) - largest);
            vf_store_part(row + j, weight, left);
            sum = sum + (left == VW ? weight : vf_load_part(row + j, left));
        }
        tile->total[h] = tile->total[h] * keep[h] + vf_sum(sum);
        tile->largest[h] = largest;
    }
    weigh_keys(tile, dtype, score, keep);
}

static void attend(const struct attention_tile *tile) {
    if (tile->dtype == NPUQ_BF16) attend_as(tile, NPUQ_BF16);
    else attend_as(tile, NPUQ_F32);
}

#endif
