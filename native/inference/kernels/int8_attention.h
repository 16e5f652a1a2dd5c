/* Attention over codes in products of int8 with int32 sums (vpdpbusd), sixteen rows to a vector.
 *
 * Scores: a lane is a row, and four channels of a key are broadcast from where the key lies; its codes are flipped to
 * code + 128, for one factor is unsigned. Outputs: a lane is a channel; four keys' weights are broadcast, and the values of
 * four keys are interleaved. Scores are exact, and so are sums of a tile's rounded weights times codes. */
#ifndef NPUQ_INFERENCE_KERNELS_INT8_ATTENTION_H
#define NPUQ_INFERENCE_KERNELS_INT8_ATTENTION_H

#include "inference/kernels/bf16_attention.h"
#include "inference/kernels/vectors_int8.h"

#if defined(NPUQ_LEVEL_BF16)

enum { WEIGHED_CODE_ROWS = 8 };

typedef int32_t int32_u __attribute__((aligned(1), may_alias));

/* Written out: GCC 12 flips the four in a general register and broadcasts it from there, which is slower than all else here. */
INLINE bytes flipped_four(const char *key) {
#if defined(__AVX512VNNI__)
    bytes codes;
    __asm__("vpxord\t%2%{1to16%}, %1, %0" : "=v"(codes) : "v"(_mm512_set1_epi8((char)0x80)), "m"(*(const int32_u *)(const void *)key));
    return codes;
#else /* tests/native/avx512_emulated.h */
    return (bytes)(broadcast_pair(key) ^ (int32_t)0x80808080);
#endif
}

/* As score_some, of codes; `factor` and `offset` [row vectors][16]. */
INLINE void score_codes(const uint32_t *q, const int rows, const struct key_rows *from, size_t channels, size_t first,
                        const int keys, size_t count, const float *factor, const int32_t *offset, float *score) {
    const char *key[SCORED_ALONE];
    sums sum[SCORED_ALONE][2];
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) {
        size_t number = first + (size_t)j < count ? first + (size_t)j : count - 1;
        key[j] = (const char *)from->rows + number * from->row_stride;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) sum[j][r] = sums_zero();
    }
    for (size_t group = 0; group < channels / 32; group++) {
        const size_t offset_of_group = group * from->group_stride;
        fetch_group(from, first, (size_t)keys, group);
        for (size_t four = 0; four < 8; four++) {
            bytes now[2];
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++) now[r] = load_bytes(q + ((size_t)r * (channels / 4) + group * 8 + four) * 16);
#pragma GCC unroll 16
            for (int j = 0; j < keys; j++) {
                const bytes codes = flipped_four(key[j] + offset_of_group + 4 * four);
#pragma GCC unroll 2
                for (int r = 0; r < rows; r++) sum[j][r] = dot_nibbles(sum[j][r], codes, now[r]);
            }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < keys; j++) {
        if (first + (size_t)j >= count) break;
#pragma GCC unroll 2
        for (int r = 0; r < rows; r++) {
            typedef uint32_t vu __attribute__((vector_size(VW * 4)));
            const vi exact = (vi)((vu)sum[j][r] - (vu)vi_load(offset + 16 * r)); /* wraps where the sum wrapped */
            vf_store(score + ((size_t)r * ATTENTION_KEYS + first + (size_t)j) * 16, vi_float(exact) * vf_load(factor + 16 * r));
        }
    }
}

static void int8_scores(const uint32_t *q, size_t row_vectors, const struct key_rows *keys, size_t channels, size_t count,
                        const float *factor, const int32_t *offset, float *score) {
    size_t vector = 0;
    for (; vector + 2 <= row_vectors; vector += 2) {
        for (size_t first = 0; first < count; first += SCORED) {
            score_codes(q + vector * channels * 4, 2, keys, channels, first, SCORED, count, factor + 16 * vector,
                        offset + 16 * vector, score + vector * ATTENTION_KEYS * 16);
        }
    }
    for (; vector < row_vectors; vector++) {
        for (size_t first = 0; first < count; first += SCORED_ALONE) {
            score_codes(q + vector * channels * 4, 1, keys, channels, first, SCORED_ALONE, count, factor + 16 * vector,
                        offset + 16 * vector, score + vector * ATTENTION_KEYS * 16);
        }
    }
}

/* Sixteen channels of four keys, of 32 channels each, key after key in `first` and `second`. */
INLINE bytes interleave_four(bytes first, bytes second, const int half) {
#define FOUR(c) c, c + 32, c + 64, c + 96
#define FOURS(c) FOUR(c), FOUR(c + 1), FOUR(c + 2), FOUR(c + 3), FOUR(c + 4), FOUR(c + 5), FOUR(c + 6), FOUR(c + 7)
    static const int8_t places[2][64] __attribute__((aligned(64))) = {{FOURS(0), FOURS(8)}, {FOURS(16), FOURS(24)}};
#undef FOURS
#undef FOUR
    return _mm512_permutex2var_epi8(first, load_bytes(places[half]), second);
}

/* One group of 32 channels of up to WEIGHED_CODE_ROWS rows. */
INLINE void weigh_codes(const uint32_t *weight, const char *from, size_t count, size_t rows, const float *keep,
                        const float *factor, float *out, size_t ldout) {
    sums sum[WEIGHED_CODE_ROWS][2];
#pragma GCC unroll 8
    for (int r = 0; r < WEIGHED_CODE_ROWS; r++) sum[r][0] = sum[r][1] = sums_zero();
    for (size_t j = 0; j < count; j += 4) {
        char last[128] = {0};
        const char *four = from + j * 32;
        if (count - j < 4) four = memcpy(last, four, (count - j) * 32); /* what follows may not be there */
        const bytes first = load_bytes(four), second = load_bytes(four + 64);
        const bytes low = interleave_four(first, second, 0), high = interleave_four(first, second, 1);
#pragma GCC unroll 8
        for (int r = 0; r < WEIGHED_CODE_ROWS; r++) {
            const bytes weights = (bytes)broadcast_pair(weight + 4 * j + r);
            sum[r][0] = dot_nibbles(sum[r][0], weights, low);
            sum[r][1] = dot_nibbles(sum[r][1], weights, high);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < WEIGHED_CODE_ROWS; r++) {
        if ((size_t)r >= rows) break;
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) {
            float *to = out + (size_t)r * ldout + 16 * v;
            vf_store(to, vf_fma(vi_float((vi)sum[r][v]), vf_set(factor[r]), vf_load(to) * keep[r]));
        }
    }
}

static void int8_weigh(const uint32_t *weight, const struct key_rows *values, size_t channels, size_t count, size_t rows,
                       const float *keep, const float *factor, float *out, size_t ldout) {
    for (size_t group = 0; group < channels / 32; group++) {
        const char *from = (const char *)values->rows + group * values->group_stride;
        for (size_t row = 0; row < rows; row += WEIGHED_CODE_ROWS) {
            weigh_codes(weight + row, from, count, rows - row, keep + row, factor + row, out + row * ldout + group * 32, ldout);
        }
    }
}

#endif

#endif
