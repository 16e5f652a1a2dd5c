/* Attention in products of bf16 with float32 sums (vdpbf16ps), sixteen rows to a vector: heads of one query, or queries of one
 * head. Nothing here knows which: absorbed, grouped and decompressed attention share it.
 *
 * Scores: a lane is a row, and pairs of a key's channels are broadcast from where the key lies. Outputs: a lane is a channel;
 * pairs of weights are broadcast, and the values of two keys are interleaved. Queries, keys and values are bf16 as they come. */
#ifndef NPUQ_INFERENCE_KERNELS_BF16_ATTENTION_H
#define NPUQ_INFERENCE_KERNELS_BF16_ATTENTION_H

#include "inference/kernels/attention_weights.h"

#if defined(NPUQ_LEVEL_BF16)

enum { SCORED = 8, SCORED_ALONE = 16, WEIGHED_ROWS = 8, WEIGHED_VECTORS = 3 };

INLINE vi broadcast_pair(const void *p) {
    int32_t pair;
    memcpy(&pair, p, sizeof pair);
    return (vi)_mm512_set1_epi32(pair);
}

/* Fetches a group of `count` rows of those that come next, from number `first` on. Two rows or two groups share a line where
 * they follow each other. */
INLINE void fetch_group(const struct key_rows *rows, size_t first, size_t count, size_t group) {
    if (rows->next == NULL || (rows->group_stride == 32 && group % 2 != 0)) return;
    const char *at = (const char *)rows->next + group * rows->group_stride;
    const size_t step = rows->row_stride == 32 ? 2 : 1;
    for (size_t j = first; j < first + count; j += step) __builtin_prefetch(at + j * rows->row_stride, 0, 3);
}

/* score[j] for `keys` keys from number `first` on, repeating the last where there are fewer; `rows` vectors of rows. */
INLINE void score_some(const uint32_t *q, const int rows, const struct key_rows *from, size_t channels, size_t first,
                       const int keys, size_t count, int add, float *score) {
    const char *key[SCORED_ALONE];
    vf sum[SCORED_ALONE][2];
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) {
        size_t number = first + (size_t)j < count ? first + (size_t)j : count - 1;
        key[j] = (const char *)from->rows + number * from->row_stride;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) sum[j][r] = vf_set(0);
    }
    for (size_t group = 0; group < channels / 16; group++) {
        const size_t offset = group * from->group_stride;
        fetch_group(from, first, (size_t)keys, group);
        for (size_t pair = 0; pair < 8; pair++) {
            vi now[2];
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) {
                now[r] = vi_load((const int32_t *)q + ((size_t)r * (channels / 2) + group * 8 + pair) * 16);
            }
#pragma GCC unroll 16
            for (int j = 0; j < keys; j++) {
                const vi both = broadcast_pair(key[j] + offset + 4 * pair);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) sum[j][r] = bf16_dot(sum[j][r], now[r], both);
            }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) {
        if (first + (size_t)j >= count) break;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            float *to = score + ((size_t)r * ATTENTION_KEYS + first + (size_t)j) * 16;
            vf_store(to, add ? (vf)(vf_load(to) + sum[j][r]) : (vf)sum[j][r]);
        }
    }
}

static void bf16_scores(const uint32_t *q, size_t row_vectors, const struct key_rows *keys, size_t channels, size_t count,
                        int add, float *score) {
    size_t vector = 0;
    for (; vector + 2 <= row_vectors; vector += 2) {
        for (size_t first = 0; first < count; first += SCORED) {
            score_some(q + vector * channels * 8, 2, keys, channels, first, SCORED, count, add,
                       score + vector * ATTENTION_KEYS * 16);
        }
    }
    for (; vector < row_vectors; vector++) {
        for (size_t first = 0; first < count; first += SCORED_ALONE) {
            score_some(q + vector * channels * 8, 1, keys, channels, first, SCORED_ALONE, count, add,
                       score + vector * ATTENTION_KEYS * 16);
        }
    }
}

/* Sixteen channels of keys j and j + 1, in pairs; of the last key alone twice. */
INLINE vi interleave(const char *first, size_t to_second) {
    static const int16_t places[32] __attribute__((aligned(64))) = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                                    21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m256i a = _mm256_loadu_si256((const __m256i *)first), b = _mm256_loadu_si256((const __m256i *)(first + to_second));
    return (vi)_mm512_permutexvar_epi16(_mm512_loadu_si512(places), _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
}

INLINE void weigh_some(const uint32_t *weight, const struct key_rows *values, const int paired, size_t group,
                       const int vectors, size_t count, size_t rows, const float *keep, float *out, size_t ldout) {
    vf sum[WEIGHED_ROWS][WEIGHED_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < WEIGHED_ROWS; r++) {
        const size_t row = (size_t)r < rows ? (size_t)r : rows - 1;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(out + row * ldout + (size_t)v * 16) * keep[row];
    }
    const char *from = (const char *)values->rows + group * values->group_stride;
    const char *next = values->next == NULL ? NULL : (const char *)values->next + group * values->group_stride;
    for (size_t j = 0; j < count; j += 2) {
        if (next != NULL) {
            __builtin_prefetch(next + j * values->row_stride, 0, 3);
            __builtin_prefetch(next + (j + 1) * values->row_stride, 0, 3);
        }
        const size_t second = j + 1 < count ? values->row_stride : 0;
        vi both[WEIGHED_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            if (paired) both[v] = vi_load((const int32_t *)(const void *)(from + (size_t)v * values->group_stride + j * 32));
            else both[v] = interleave(from + j * values->row_stride + (size_t)v * values->group_stride, second);
        }
#pragma GCC unroll 8
        for (int r = 0; r < WEIGHED_ROWS; r++) {
            const vi factor = broadcast_pair(weight + 8 * j + r);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] = bf16_dot(sum[r][v], factor, both[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < WEIGHED_ROWS; r++) {
        if ((size_t)r >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vf_store(out + (size_t)r * ldout + (size_t)v * 16, sum[r][v]);
    }
}

INLINE void weigh_as(const uint32_t *weight, const struct key_rows *values, const int paired, size_t channels, size_t count,
                     size_t rows, const float *keep, float *out, size_t ldout) {
    const size_t groups = channels / 16;
    for (size_t group = 0; group < groups;) {
        const size_t left = groups - group, some = left < WEIGHED_VECTORS ? left : WEIGHED_VECTORS;
        for (size_t row = 0; row < rows; row += WEIGHED_ROWS) {
            float *to = out + row * ldout + group * 16;
            const size_t last = rows - row;
            if (some == 3) weigh_some(weight + row, values, paired, group, 3, count, last, keep + row, to, ldout);
            else if (some == 2) weigh_some(weight + row, values, paired, group, 2, count, last, keep + row, to, ldout);
            else weigh_some(weight + row, values, paired, group, 1, count, last, keep + row, to, ldout);
        }
        group += some;
    }
}

static void bf16_weigh(const uint32_t *weight, const struct key_rows *values, size_t channels, size_t count, size_t rows,
                       const float *keep, float *out, size_t ldout) {
    if (values->paired) weigh_as(weight, values, 1, channels, count, rows, keep, out, ldout);
    else weigh_as(weight, values, 0, channels, count, rows, keep, out, ldout);
}

/* Values as `bf16_weigh` takes them paired: [channels / 16][(count + 1) / 2][16] pairs. */
static void bf16_pair_values(const struct key_rows *values, size_t channels, size_t count, uint32_t *pairs) {
    for (size_t group = 0; group < channels / 16; group++) {
        const char *from = (const char *)values->rows + group * values->group_stride;
        for (size_t j = 0; j < count; j += 2) {
            const vi both = interleave(from + j * values->row_stride, j + 1 < count ? values->row_stride : 0);
            vf_store((float *)pairs, (vf)both);
            pairs += 16;
        }
    }
}

#endif

#endif
