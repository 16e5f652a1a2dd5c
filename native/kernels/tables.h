/* A row of FP8 weights as sums over its magnitudes, so that the state (A, B) of any scale is a few look-ups.
 *
 * A segment of up to 128 weights with one block scale has some 40 different magnitudes that can get a code at all: 8 an
 * octave, from below half the scale to the largest. How many weights are at least as large as each, and what those come
 * to, is written down once (a suffix sum a magnitude, as planes of bytes). A scale has eight thresholds, (2m − 1) · h, the
 * last for negative weights only; of each segment, look up the eight sums of what lies above them.
 *
 * Counts are exact. Sums are of FP8's own integers, which 16 bits hold, times what one of them is worth in fixed point: the
 * weights' sums but for their rounding (see SUM_DOUBT). Which side of a threshold a magnitude is on is certain up to
 * TABLE_DOUBT: thresholds are products of three float32, magnitudes of two, rounded. */
#ifndef NPUQ_KERNELS_TABLES_H
#define NPUQ_KERNELS_TABLES_H

#include "fp8.h"
#include "lanes.h"

/* 2^-22.4 of 2^23, ½ + ½ for rounding, and as much again. */
enum { TABLE_DOUBT = 4 };

/* How far the sum of n weights in fixed point may be from what the tables say: the block scale's product was rounded to
 * float32 (2^-24 of each weight), and then to an integer (½ a weight). */
#define SUM_DOUBT 0x1p-24
#define WEIGHT_DOUBT 0.5

/* As many weights as a byte can count; the fewest that are worth it. */
enum { SEGMENT = 128, LEAST_SEGMENT = 64 };

/* Magnitudes in a table: 3 or 4 parts of 16. From the third part on there are sums of negative weights, too: what may
 * reach code 8 is at least 15 · h, and a table begins at just below `least` ≤ h. */
enum { TABLE_PART = 16, MOST_PARTS = 4, TOP_PART = 2, SUM_PLANES = 3, MOST_CODES = MOST_PARTS * TABLE_PART };

/* How many weights of a segment have each magnitude of its table, and of the negative ones from the third part on. */
enum { NEGATIVE_COUNTS = MOST_CODES, COUNT_BYTES = MOST_CODES + (MOST_PARTS - TOP_PART) * TABLE_PART };

struct segment {
    float scale;
    uint8_t last, first; /* its largest magnitude, and the first of its table */
};

/* What is added up for a weight, by the place of its magnitude (0: below the table; 128 more for a negative one): 1 for
 * each place that is not above it. Four bits a place, lower ones first: `counts` of parts 0 and 1, then part 2 and part 2
 * of negative weights; `tops` of part 3, then part 3 of negative weights. And the magnitudes of places as FP8 integers,
 * by where in an octave the first one is. */
enum { PLACES = MOST_CODES + 1, NEGATIVE_PLACE = 128, PLACE_BYTES = 32 };
struct place_rows {
    _Alignas(64) uint8_t counts[NEGATIVE_PLACE + PLACES][PLACE_BYTES];
    uint8_t tops[NEGATIVE_PLACE + PLACES][PLACE_BYTES / 2];
    uint16_t steps[8][MOST_CODES];
    int ready;
};

/* Segments are in pairs, as two halves of a vector. */
struct tables {
    size_t segments;
    int parts;
    double least; /* no half scale below may be looked at */
    float unit;
    const struct place_rows *rows;
    struct segment *segments_at;
    uint8_t *counts;  /* [segments][COUNT_BYTES] */
    float *inverse;   /* [segments][4] 1 / (scale · unit) */
    int16_t *origin;  /* [segments][8] upper bits of a float32 threshold that has place 0 */
    double *worth;    /* [segments][2] what 1 in `sums` is in fixed point */
    uint8_t *sums;    /* [pairs][SUM_PLANES][parts + parts − TOP_PART][2][TABLE_PART] */
};

INLINE size_t planes_of(const struct tables *tables) { return (size_t)(2 * tables->parts - TOP_PART); }

/* Where a plane of a pair of segments is: of its parts, then of the negative weights' (`part` from `parts` on). Plane 0 is
 * of counts, 1 and 2 of what they come to. */
INLINE uint8_t *table_at(const struct tables *tables, size_t pair, int plane, int part) {
    return tables->sums + ((pair * SUM_PLANES + (size_t)plane) * planes_of(tables) + (size_t)part) * 2 * TABLE_PART;
}

enum { EXPONENT_BIAS = 127 - 7, CODE_SHIFT = 20 }; /* the upper bits of a float32 are FP8's, but for the bias */

static void prepare_rows(struct place_rows *rows) {
    if (rows->ready) return;
    for (int place = 0; place < NEGATIVE_PLACE + PLACES; place++) {
        const int negative = place >= NEGATIVE_PLACE, magnitudes = place - (negative ? NEGATIVE_PLACE : 0);
        for (int j = 0; j < PLACE_BYTES; j++) {
            const int upper = j < TABLE_PART || negative ? magnitudes > 2 * TABLE_PART + j % TABLE_PART : 0;
            rows->counts[place][j] = (uint8_t)((magnitudes > j) | upper << 4);
        }
        for (int j = 0; j < TABLE_PART; j++) rows->tops[place][j] = magnitudes > 3 * TABLE_PART + j ? negative ? 0x11 : 1 : 0;
    }
    for (int first = 0; first < 8; first++) {
        for (int j = 0; j < MOST_CODES; j++) rows->steps[first][j] = (uint16_t)((8 + (first + j) % 8) << (first + j) / 8);
    }
    rows->ready = 1;
}

/* What an FP8 integer of a segment's table is worth in fixed point: the lowest bit of its first magnitude. */
INLINE double worth_of(const struct segment *segment, float unit) {
    return (double)segment->scale * unit * fp8_magnitudes[segment->first & ~7] / 8;
}

#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
/* Places of SEGMENT weights, 0 behind the n-th. */
INLINE void place_weights(const uint8_t *x, size_t n, uint8_t first, uint8_t *place) {
    const __m256i below = _mm256_set1_epi8((char)(first - 1)), size = _mm256_set1_epi8(127);
    for (size_t i = 0; i < SEGMENT; i += 32) {
        uint8_t lane[32] = {0};
        const uint8_t *at = x + i;
        if (i + 32 > n) at = i < n ? memcpy(lane, at, n - i) : lane;
        const __m256i w = _mm256_loadu_si256((const __m256i *)at);
        const __m256i from = _mm256_subs_epu8(_mm256_and_si256(w, size), below);
        _mm256_storeu_si256((__m256i *)(place + i), _mm256_or_si256(from, _mm256_andnot_si256(size, w)));
    }
}
/* Adds the rows of a place, which is `at` over PLACE_BYTES. Written out: GCC 12 loads them before it adds, and copies sums. */
INLINE void add_place(const struct place_rows *rows, uint64_t at, const int parts, __m256i *sum, __m128i *top) {
    __asm__("vpaddb\t(%1,%2), %0, %0" : "+x"(*sum) : "r"(rows->counts), "r"(at), "m"(rows->counts));
    if (parts == 4) *top = _mm_add_epi8(*top, _mm_load_si128((const __m128i *)((const char *)rows->tops + at / 2)));
}
/* How many weights are at or above each place: parts 0 and 1, part 2 and part 2 of negative weights, the same of part 3. */
INLINE void count_places(const struct place_rows *rows, const uint8_t *place, const int parts, __m256i counted[3]) {
    enum { SETS = 3, GROUP = 32 }; /* 11 weights a set in a group: four bits hold that */
    const __m256i lower = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
    const uint64_t whole = 255 * PLACE_BYTES; /* which are 2^5 */
    counted[0] = counted[1] = counted[2] = zero;
    for (int first = 0; first < SEGMENT; first += GROUP) {
        __m256i sum[SETS] = {zero, zero, zero};
        __m128i top[SETS] = {{0}, {0}, {0}};
#pragma GCC unroll 4
        for (int i = 0; i < GROUP; i += 8) {
            uint64_t word;
            memcpy(&word, place + first + i, sizeof word);
            add_place(rows, word << 5 & whole, parts, &sum[i % SETS], &top[i % SETS]);
#pragma GCC unroll 8
            for (int k = 1; k < 8; k++) {
                add_place(rows, word >> (8 * k - 5) & whole, parts, &sum[(i + k) % SETS], &top[(i + k) % SETS]);
            }
        }
#pragma GCC unroll 3
        for (int j = 0; j < SETS; j++) {
            counted[0] = _mm256_add_epi8(counted[0], _mm256_and_si256(sum[j], lower));
            counted[1] = _mm256_add_epi8(counted[1], _mm256_and_si256(_mm256_srli_epi16(sum[j], 4), lower));
            const __m256i both = _mm256_set_m128i(_mm_srli_epi16(top[j], 4), top[j]);
            if (parts == 4) counted[2] = _mm256_add_epi8(counted[2], _mm256_and_si256(both, lower));
        }
    }
}

/* Writes a part whose weights at or above each place are `counted`, those at or above the next part's first `above`, and
 * adds to the sums above it, which end at 2^16 - 1; to *any the bits of the counts. */
INLINE void write_part(__m128i counted, __m128i above, const uint16_t *steps, uint8_t *count, uint8_t *out, size_t plane,
                       __m256i *sum, __m128i *any) {
    const __m128i each = _mm_sub_epi8(counted, _mm_alignr_epi8(above, counted, 1));
    const __m256i step = _mm256_loadu_si256((const __m256i *)steps), times = _mm256_cvtepu8_epi16(each);
    const __m256i low_bytes = _mm256_set1_epi16(255);
    _mm_storeu_si128((__m128i *)count, each);
    _mm_storeu_si128((__m128i *)out, counted);
    __m256i x = _mm256_mullo_epi16(step, times);
    *any = _mm_or_si128(*any, each);
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 2));
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 4));
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 8));
    const __m256i upper = _mm256_permute2x128_si256(x, x, 0x81); /* the upper half in the lower, 0 in the upper */
    x = _mm256_adds_epu16(x, _mm256_shuffle_epi8(upper, _mm256_set1_epi16(0x0100)));
    x = *sum = _mm256_adds_epu16(x, _mm256_broadcastw_epi16(_mm256_castsi256_si128(*sum)));
    x = _mm256_packus_epi16(_mm256_and_si256(x, low_bytes), _mm256_srli_epi16(x, 8));
    x = _mm256_permute4x64_epi64(x, 0xD8);
    _mm_storeu_si128((__m128i *)(out + plane), _mm256_castsi256_si128(x));
    _mm_storeu_si128((__m128i *)(out + 2 * plane), _mm256_extracti128_si256(x, 1));
}

/* Bits of *odd are set where the sums may not be right. */
INLINE void write_segment(const struct tables *tables, size_t s, const uint8_t *x, size_t n, const int parts, __m128i *odd) {
    const struct segment segment = tables->segments_at[s];
    const uint16_t *steps = tables->rows->steps[segment.first % 8];
    uint8_t place[SEGMENT], *count = tables->counts + s * COUNT_BYTES;
    uint8_t *out = table_at(tables, s / 2, 0, 0) + s % 2 * TABLE_PART;
    const size_t part = 2 * TABLE_PART, plane = (size_t)(2 * parts - TOP_PART) * part;
    __m256i counted[3], sum = _mm256_setzero_si256();
    place_weights(x, n, segment.first, place);
    count_places(tables->rows, place, parts, counted);
    __m128i any = _mm_setzero_si128();
    const __m128i none = any, all[4] = {
        _mm256_castsi256_si128(counted[0]), _mm256_extracti128_si256(counted[0], 1), _mm256_castsi256_si128(counted[1]),
        parts == 3 ? none : _mm256_castsi256_si128(counted[2])};
    const __m128i negative[2] = {_mm256_extracti128_si256(counted[1], 1),
                                 parts == 3 ? none : _mm256_extracti128_si256(counted[2], 1)};
#pragma GCC unroll 4
    for (int p = parts - 1; p >= 0; p--) {
        write_part(all[p], p + 1 < parts ? all[p + 1] : none, steps + p * TABLE_PART, count + p * TABLE_PART,
                   out + (size_t)p * part, plane, &sum, &any);
    }
    /* A product of 2^16 takes 2^6 equal weights where steps are below 2^10, in 3 parts, or 2^4 in 4. */
    *odd = _mm_or_si128(*odd, _mm_and_si128(any, _mm_set1_epi8(parts == 3 ? (char)0xC0 : (char)0xF0)));
    *odd = _mm_or_si128(*odd, _mm_cmpeq_epi16(_mm256_castsi256_si128(sum), _mm_set1_epi16(-1)));
    if (parts == 3) { /* who reads 32 counts at a time finds none of another row's */
        _mm_storeu_si128((__m128i *)(count + 3 * TABLE_PART), none);
        _mm_storeu_si128((__m128i *)(count + NEGATIVE_COUNTS + TABLE_PART), none);
    }
    sum = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int p = parts - 1; p >= TOP_PART; p--) {
        write_part(negative[p - TOP_PART], p + 1 < parts ? negative[p + 1 - TOP_PART] : none, steps + p * TABLE_PART,
                   count + NEGATIVE_COUNTS + (p - TOP_PART) * TABLE_PART, out + (size_t)(parts + p - TOP_PART) * part, plane,
                   &sum, &any);
    }
}
INLINE int write_segments(const struct tables *tables, const uint8_t *x, size_t n, size_t length, const int parts) {
    __m128i odd = _mm_setzero_si128();
    for (size_t s = 0; s < tables->segments; s++) {
        /* The next row, which lies behind this one, would come too late for the pass that only looks for the largest. */
        for (size_t line = 0; line < length; line += 64) __builtin_prefetch(x + n + s * length + line, 0, 2);
        write_segment(tables, s, x + s * length, n - s * length < length ? n - s * length : length, parts, &odd);
    }
    return _mm_testz_si128(odd, odd);
}
/* Counts a row in segments of `length` and writes its tables; 0 if 16 bits do not hold its sums. */
static int write_rows(const struct tables *tables, const uint8_t *x, size_t n, size_t length) {
    return tables->parts == 3 ? write_segments(tables, x, n, length, 3) : write_segments(tables, x, n, length, 4);
}
#else
static void count_segment(const uint8_t *x, size_t n, int first, uint8_t *count) {
    memset(count, 0, COUNT_BYTES);
    for (size_t i = 0; i < n; i++) {
        const int place = (x[i] & 127) - first;
        if (place < 0) continue;
        count[place]++;
        if (x[i] > 127 && place >= TOP_PART * TABLE_PART) count[NEGATIVE_COUNTS - TOP_PART * TABLE_PART + place]++;
    }
}
/* Suffix sums of counts of the places from `from` on. */
static int write_sums(const struct tables *tables, size_t s, int from, const uint8_t *count, int to_part) {
    const uint16_t *steps = tables->rows->steps[tables->segments_at[s].first % 8];
    uint32_t counted = 0, sum = 0;
    for (int j = tables->parts * TABLE_PART - 1; j >= from; j--) {
        counted += count[j - from];
        sum += (uint32_t)count[j - from] * steps[j];
        const uint8_t bytes[SUM_PLANES] = {(uint8_t)counted, (uint8_t)sum, (uint8_t)(sum >> 8)};
        for (int plane = 0; plane < SUM_PLANES; plane++) {
            table_at(tables, s / 2, plane, to_part + (j - from) / TABLE_PART)[s % 2 * TABLE_PART + (size_t)j % TABLE_PART] =
                bytes[plane];
        }
    }
    return sum < 65535;
}
static int write_rows(const struct tables *tables, const uint8_t *x, size_t n, size_t length) {
    int fits = 1;
    for (size_t s = 0; s < tables->segments; s++) {
        uint8_t *count = tables->counts + s * COUNT_BYTES;
        count_segment(x + s * length, n - s * length < length ? n - s * length : length, tables->segments_at[s].first, count);
        fits &= write_sums(tables, s, 0, count, 0);
        fits &= write_sums(tables, s, TOP_PART * TABLE_PART, count + NEGATIVE_COUNTS, tables->parts);
    }
    return fits;
}
#endif

#endif
