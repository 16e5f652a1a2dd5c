/* A row of FP8 weights as sums over its magnitudes, so that the state (A, B) of any scale is a few look-ups.
 *
 * A segment of up to 128 weights with one block scale has some 40 different magnitudes that can get a code at all: 8 an
 * octave, from below half the scale to the largest. How many weights are at least as large as each, and what those come
 * to in fixed point, is written down once (a suffix sum a magnitude, as planes of bytes). A scale has eight thresholds,
 * (2m − 1) · h, the last for negative weights only; of each segment, look up the eight sums of what lies above them.
 *
 * The sums are exact. Which side of a threshold a magnitude is on is certain up to TABLE_DOUBT: thresholds are products
 * of three float32, magnitudes of two, rounded. */
#ifndef NPUQ_KERNELS_TABLES_H
#define NPUQ_KERNELS_TABLES_H

#include "fp8.h"
#include "lanes.h"

/* 2^-22.4 of 2^23, ½ + ½ for rounding, and as much again. */
enum { TABLE_DOUBT = 4 };

/* As many weights as a byte can count; the fewest that are worth it. */
enum { SEGMENT = 128, LEAST_SEGMENT = 64 };

/* Magnitudes in a table: 3 or 4 parts of 16. From the third part on there are sums of negative weights, too: what may
 * reach code 8 is at least 15 · h, and a table begins at just below `least` ≤ h. */
enum { TABLE_PART = 16, MOST_PARTS = 4, TOP_PART = 2, SUM_PLANES = 5, MOST_CODES = MOST_PARTS * TABLE_PART };

/* Counts of a segment: [0, 128) of negative weights by their code, [128, 256) of all, zeros behind. */
enum { COUNT_BYTES = 256 + MOST_CODES };

struct segment {
    float scale;
    uint8_t last, first; /* its largest magnitude, and the first of its table */
};

/* Segments are in pairs, as two halves of a vector. */
struct tables {
    size_t segments;
    int parts;
    double least; /* no half scale below may be looked at */
    float unit;
    struct segment *segments_at;
    uint8_t *counts;  /* [segments][COUNT_BYTES] */
    float *inverse;   /* [segments][4] 1 / (scale · unit) */
    int16_t *origin;  /* [segments][8] upper bits of a float32 threshold that has place 0 */
    uint8_t *sums;    /* [pairs][SUM_PLANES][parts + parts − TOP_PART][2][TABLE_PART] */
};

INLINE size_t planes_of(const struct tables *tables) { return (size_t)(2 * tables->parts - TOP_PART); }

/* Where a plane of a pair of segments is: of its parts, then of the negative weights' (`part` from `parts` on). */
INLINE uint8_t *table_at(const struct tables *tables, size_t pair, int plane, int part) {
    return tables->sums + ((pair * SUM_PLANES + (size_t)plane) * planes_of(tables) + (size_t)part) * 2 * TABLE_PART;
}

enum { EXPONENT_BIAS = 127 - 7, CODE_SHIFT = 20 }; /* the upper bits of a float32 are FP8's, but for the bias */

/* How often each code of a segment occurs: of negative weights, and of the others where later that of all is. */
static void count_codes(const uint8_t *x, size_t n, uint8_t *count) {
    const vi zero = {0};
    for (size_t c = 0; c < COUNT_BYTES; c += sizeof zero) memcpy(count + c, &zero, sizeof zero);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t word;
        memcpy(&word, x + i, sizeof word);
        word ^= 0x8080808080808080;
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) count[(uint8_t)(word >> 8 * k)]++;
    }
    for (; i < n; i++) count[x[i] ^ 0x80]++;
}

/* VW magnitudes of a segment from `code` on, in fixed point: as the row's weights are decoded and rounded. */
INLINE vi fixed_at(const struct segment *segment, size_t code, float unit) {
    return vf_round(vf_load(fp8_magnitudes + code) * segment->scale * unit);
}

/* Adds up the counts of both signs: not where they are counted, since vectors have to wait for bytes that were just
 * written. Returns Σ w² in fixed point, exactly. */
static uint64_t counted_norm(const struct tables *tables) {
    vl even = {0}, odd = {0};
    for (size_t s = 0; s < tables->segments; s++) {
        uint8_t *count = tables->counts + s * COUNT_BYTES + 128;
        const struct segment *segment = &tables->segments_at[s];
        for (int c = 0; c < 128; c++) count[c] += count[c - 128];
#pragma GCC unroll 2
        for (size_t c = 0; c < 128; c += VW) {
            vi fixed = fixed_at(segment, c, tables->unit);
            vl_products(fixed, fixed * vi_load_u8(count + c), &even, &odd); /* 2^23, and 2^30 */
        }
    }
    return (uint64_t)vl_total(even) + (uint64_t)vl_total(odd);
}

/* Suffix sums of a segment: of counts in plane 0, of what they come to in bytes 1 to 4. */
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
INLINE __m256i suffix_sums(__m256i x, __m256i above) {
    x = _mm256_add_epi32(x, _mm256_srli_si256(x, 4));
    x = _mm256_add_epi32(x, _mm256_srli_si256(x, 8));
    __m256i upper = _mm256_permute2x128_si256(x, x, 0x81); /* the upper half in the lower, 0 in the upper */
    x = _mm256_add_epi32(x, _mm256_shuffle_epi32(upper, 0));
    return _mm256_add_epi32(x, _mm256_permutevar8x32_epi32(above, _mm256_setzero_si256()));
}
INLINE __m256i times_fixed(const struct segment *segment, size_t code, float unit, __m128i count) {
    __m256 w = _mm256_mul_ps(_mm256_loadu_ps(fp8_magnitudes + code), _mm256_set1_ps(segment->scale));
    __m256i fixed = _mm256_cvtps_epi32(_mm256_mul_ps(w, _mm256_set1_ps(unit)));
    return _mm256_mullo_epi32(fixed, _mm256_cvtepu8_epi32(count));
}
/* Writes a part of 16, whose counts are `count`, and adds to the sums above it. */
INLINE void write_part(const struct segment *segment, size_t code, float unit, __m128i count, __m128i *counted,
                       __m256i *sum, uint8_t *out, size_t plane) {
    const __m128i first = _mm_setzero_si128();
    __m128i n = _mm_add_epi8(count, _mm_srli_si128(count, 8));
    n = _mm_add_epi8(n, _mm_srli_si128(n, 4));
    n = _mm_add_epi8(n, _mm_srli_si128(n, 2));
    n = _mm_add_epi8(n, _mm_srli_si128(n, 1));
    *counted = _mm_add_epi8(n, _mm_shuffle_epi8(*counted, first));
    _mm_storeu_si128((__m128i *)out, *counted);
    __m256i high = suffix_sums(times_fixed(segment, code + 8, unit, _mm_srli_si128(count, 8)), *sum);
    __m256i low = *sum = suffix_sums(times_fixed(segment, code, unit, count), high);
    const __m256i by_plane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
                                              0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    low = _mm256_shuffle_epi8(low, by_plane); /* four codes' first bytes, then their second ones, … */
    high = _mm256_shuffle_epi8(high, by_plane);
    __m256i even = _mm256_unpacklo_epi32(low, high), odd = _mm256_unpackhi_epi32(low, high);
    /* Planes 0 and 1, and 2 and 3, of codes 0–3 with 8–11 (lower half) and 4–7 with 12–15 (upper half). */
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    even = _mm256_permutevar8x32_epi32(even, order);
    odd = _mm256_permutevar8x32_epi32(odd, order);
    _mm_storeu_si128((__m128i *)(out + plane), _mm256_castsi256_si128(even));
    _mm_storeu_si128((__m128i *)(out + 2 * plane), _mm256_extracti128_si256(even, 1));
    _mm_storeu_si128((__m128i *)(out + 3 * plane), _mm256_castsi256_si128(odd));
    _mm_storeu_si128((__m128i *)(out + 4 * plane), _mm256_extracti128_si256(odd, 1));
}
static void write_table(const struct tables *tables, size_t s) {
    const struct segment *segment = &tables->segments_at[s];
    const uint8_t *counts = tables->counts + s * COUNT_BYTES + segment->first;
    const size_t plane = planes_of(tables) * 2 * TABLE_PART;
    __m128i counted = _mm_setzero_si128();
    __m256i sum = _mm256_setzero_si256();
    for (int p = tables->parts - 1; p >= 0; p--) {
        __m128i all = _mm_loadu_si128((const __m128i *)(counts + 128 + p * TABLE_PART));
        write_part(segment, segment->first + (size_t)p * TABLE_PART, tables->unit, all, &counted, &sum,
                   table_at(tables, s / 2, 0, p) + s % 2 * TABLE_PART, plane);
    }
    counted = _mm_setzero_si128();
    sum = _mm256_setzero_si256();
    for (int p = tables->parts - 1; p >= TOP_PART; p--) {
        __m128i negative = _mm_loadu_si128((const __m128i *)(counts + p * TABLE_PART));
        /* Behind the last code lie other counts, where all are 0. */
        __m128i none = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)(counts + 128 + p * TABLE_PART)), _mm_setzero_si128());
        write_part(segment, segment->first + (size_t)p * TABLE_PART, tables->unit, _mm_andnot_si128(none, negative), &counted,
                   &sum, table_at(tables, s / 2, 0, tables->parts + p - TOP_PART) + s % 2 * TABLE_PART, plane);
    }
}
#else
static void write_sums(const struct tables *tables, size_t s, int from, int negative) {
    const struct segment *segment = &tables->segments_at[s];
    const uint8_t *counts = tables->counts + s * COUNT_BYTES + segment->first;
    uint32_t counted = 0, sum = 0;
    for (int j = tables->parts * TABLE_PART - 1; j >= from * TABLE_PART; j--) {
        const uint32_t all = counts[128 + j], count = negative && all > 0 ? counts[j] : all;
        const float w = fp8_magnitudes[segment->first + j] * segment->scale;
        counted += count;
        sum += count * (uint32_t)rintf(w * tables->unit);
        const int part = (negative ? tables->parts - TOP_PART : 0) + j / TABLE_PART;
        for (int plane = 0; plane < SUM_PLANES; plane++) {
            table_at(tables, s / 2, plane, part)[s % 2 * TABLE_PART + (size_t)j % TABLE_PART] =
                (uint8_t)(plane == 0 ? counted : sum >> 8 * (plane - 1));
        }
    }
}
static void write_table(const struct tables *tables, size_t s) {
    write_sums(tables, s, 0, 0);
    write_sums(tables, s, TOP_PART, 1);
}
#endif

#endif
