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
#ifndef NPUQ_CONVERT_FP8_FP8_TABLES_H
#define NPUQ_CONVERT_FP8_FP8_TABLES_H

#include "convert/fp8/fp8_decode.h"
#include "common/vectors_int16.h"

/* 2^-22.4 of 2^23, ½ + ½ for rounding, and as much again. */
enum { TABLE_DOUBT = 4 };

/* The most that the sum of n weights in fixed point may differ from the tables': the block scale's product was rounded to
 * float32 (2^-24 of each weight), and then to an integer (½ a weight). */
#define SUM_DOUBT 0x1p-24
#define WEIGHT_DOUBT 0.5

/* As many weights as a byte can count; the fewest that are worth it. */
enum { SEGMENT = 128, LEAST_SEGMENT = 64 };

/* Magnitudes in a table: 3 or 4 parts of 16. From the third part on there are sums of negative weights, too: what may
 * reach code 8 is at least 15 · h, and a table begins at just below `least` ≤ h. */
enum { TABLE_PART = 16, MOST_PARTS = 4, TOP_PART = 2, SUM_PLANES = 3, MOST_CODES = MOST_PARTS * TABLE_PART };

/* Counts of a segment's weights by magnitude of its table, and of the negative ones from the third part on. */
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
    double *worth;    /* [segments][2] the value of 1 in `sums`, in fixed point */
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

/* The value of an FP8 integer of a segment's table in fixed point: the lowest bit of its first magnitude. */
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

/* Sums from each of 8 lanes of a half to its last, and what is above them in both halves' first lanes. */
INLINE __m256i suffix_sums(__m256i x, __m256i above) {
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 2));
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 4));
    x = _mm256_adds_epu16(x, _mm256_srli_si256(x, 8));
    return _mm256_adds_epu16(x, _mm256_shuffle_epi8(above, _mm256_set1_epi16(0x0100)));
}
INLINE __m256i both_steps(const uint16_t *const steps[2], int place) {
    const __m128i *first = (const __m128i *)(steps[0] + place), *second = (const __m128i *)(steps[1] + place);
    return _mm256_set_m128i(_mm_loadu_si128(second), _mm_loadu_si128(first));
}

/* What is made of the parts of a pair of segments, from the last one down: where they are written, sums of what is above,
 * which end at 2^16 − 1, and the bits of all counts. */
struct part_writer {
    const uint16_t *steps[2];
    uint8_t *count, *out;
    size_t plane;
    __m256i above, sum, any;
};

/* Writes a part, of which `counted` says how many weights are at or above each place. */
INLINE void write_part(struct part_writer *to, __m256i counted, int place, size_t count_at, size_t part) {
    const __m256i each = _mm256_sub_epi8(counted, _mm256_alignr_epi8(to->above, counted, 1)), zero = _mm256_setzero_si256();
    const __m256i low_bytes = _mm256_set1_epi16(255);
    uint8_t *out = to->out + part * 2 * TABLE_PART;
    to->above = counted;
    to->any = _mm256_or_si256(to->any, each);
    _mm_storeu_si128((__m128i *)(to->count + count_at), _mm256_castsi256_si128(each));
    _mm_storeu_si128((__m128i *)(to->count + COUNT_BYTES + count_at), _mm256_extracti128_si256(each, 1));
    const __m256i upper = _mm256_mullo_epi16(_mm256_unpackhi_epi8(each, zero), both_steps(to->steps, place + 8));
    const __m256i lower = _mm256_mullo_epi16(_mm256_unpacklo_epi8(each, zero), both_steps(to->steps, place));
    const __m256i high = suffix_sums(upper, to->sum), low = to->sum = suffix_sums(lower, high);
    _mm256_storeu_si256((__m256i *)out, counted);
    _mm256_storeu_si256((__m256i *)(out + to->plane),
                        _mm256_packus_epi16(_mm256_and_si256(low, low_bytes), _mm256_and_si256(high, low_bytes)));
    _mm256_storeu_si256((__m256i *)(out + 2 * to->plane),
                        _mm256_packus_epi16(_mm256_srli_epi16(low, 8), _mm256_srli_epi16(high, 8)));
}

/* Bits of *odd are set where the sums may not be right. An odd last segment's partner has no weights. */
INLINE void write_pair(const struct tables *tables, size_t pair, const uint8_t *x, size_t n, size_t length, const int parts,
                       __m256i *odd) {
    const struct segment *segments = tables->segments_at + 2 * pair;
    __m256i counted[2][3];
    for (int s = 0; s < 2; s++) {
        uint8_t place[SEGMENT];
        const size_t from = (2 * pair + (size_t)s) * length, left = from < n ? n - from : 0;
        place_weights(x + (left > 0 ? from : 0), left < length ? left : length, segments[s].first, place);
        count_places(tables->rows, place, parts, counted[s]);
    }
    const __m256i zero = _mm256_setzero_si256();
    __m256i all[MOST_PARTS], negative[MOST_PARTS]; /* [2][TABLE_PART] each */
    all[0] = _mm256_permute2x128_si256(counted[0][0], counted[1][0], 0x20);
    all[1] = _mm256_permute2x128_si256(counted[0][0], counted[1][0], 0x31);
    for (int p = 2; p < 4; p++) {
        all[p] = _mm256_permute2x128_si256(counted[0][p - 1], counted[1][p - 1], 0x20);
        negative[p] = _mm256_permute2x128_si256(counted[0][p - 1], counted[1][p - 1], 0x31);
    }
    struct part_writer to = {{tables->rows->steps[segments[0].first % 8], tables->rows->steps[segments[1].first % 8]},
                             tables->counts + 2 * pair * COUNT_BYTES, table_at(tables, pair, 0, 0),
                             planes_of(tables) * 2 * TABLE_PART, zero, zero, zero};
#pragma GCC unroll 4
    for (int p = parts - 1; p >= 0; p--) write_part(&to, all[p], p * TABLE_PART, (size_t)(p * TABLE_PART), (size_t)p);
    /* A product of 2^16 takes 2^6 equal weights where steps are below 2^10, in 3 parts, or 2^4 in 4. */
    *odd = _mm256_or_si256(*odd, _mm256_and_si256(to.any, _mm256_set1_epi8(parts == 3 ? (char)0xC0 : (char)0xF0)));
    *odd = _mm256_or_si256(*odd, _mm256_cmpeq_epi16(to.sum, _mm256_set1_epi16(-1)));
    to.above = to.sum = zero;
#pragma GCC unroll 2
    for (int p = parts - 1; p >= TOP_PART; p--) {
        write_part(&to, negative[p], p * TABLE_PART, NEGATIVE_COUNTS + (size_t)((p - TOP_PART) * TABLE_PART),
                   (size_t)(parts + p - TOP_PART));
    }
    for (int s = 0; s < 2 && parts == 3; s++) { /* readers of 32 counts at a time must find none of another row's */
        uint8_t *count = to.count + s * COUNT_BYTES;
        memset(count + 3 * TABLE_PART, 0, TABLE_PART);
        memset(count + NEGATIVE_COUNTS + TABLE_PART, 0, TABLE_PART);
    }
}
INLINE int write_pairs(const struct tables *tables, const uint8_t *x, size_t n, size_t length, const int parts) {
    __m256i odd = _mm256_setzero_si256();
    for (size_t pair = 0; 2 * pair < tables->segments; pair++) {
        /* Without this prefetch the next row would come too late for the pass that finds the largest. */
        for (size_t line = 0; line < 2 * length; line += 64) __builtin_prefetch(x + n + 2 * pair * length + line, 0, 2);
        write_pair(tables, pair, x, n, length, parts, &odd);
    }
    return _mm256_testz_si256(odd, odd);
}
/* Counts a row in segments of `length` and writes its tables; 0 if 16 bits do not hold its sums. */
static int write_rows(const struct tables *tables, const uint8_t *x, size_t n, size_t length) {
    return tables->parts == 3 ? write_pairs(tables, x, n, length, 3) : write_pairs(tables, x, n, length, 4);
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
