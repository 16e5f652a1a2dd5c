/* FP4 rows (E2M1, two a byte, a power of two for each 32): decoding, and int4 by least squared error or by min-max from the
 * counts of their few different magnitudes. Scale and codes equal those of quantize_row.h to the bit.
 *
 * Every magnitude is 2^k or 3 · 2^k, and a row of some thousand weights has a few dozen of them. So the search of
 * quant/optimal_scale.py needs no bounds here: its breakpoints, |w| / (2m − 1), lie in the same order in every octave. */
#ifndef NPUQ_CONVERT_FP4_ROW_H
#define NPUQ_CONVERT_FP4_ROW_H

#include "convert/int4_minmax.h"
#include "convert/scratch.h"

/* Bins are powers of two: half a scale, and up to eight times that. */
enum { FP4_GROUP = 32, FP4_BINS = 260 };

/* Twice each magnitude of E2M1, with its sign; its odd part is 1 or 3, and the rest a shift. */
static const int8_t fp4_doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
static const uint8_t fp4_is_three[8] = {0, 0, 0, 1, 0, 1, 0, 1}, fp4_shift[8] = {0, 0, 1, 0, 2, 1, 3, 2};

/* out[i] = table[nibble i], 32 of them. */
INLINE void map_group(const uint8_t *x, const int8_t table[16], int8_t *out) {
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
    const __m128i bytes = _mm_loadu_si128((const __m128i *)x), codes = _mm_loadu_si128((const __m128i *)table);
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_shuffle_epi8(codes, _mm_and_si128(bytes, nibble));
    const __m128i odd = _mm_shuffle_epi8(codes, _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble));
    _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i *)(out + 16), _mm_unpackhi_epi8(even, odd));
#else
    for (int i = 0; i < FP4_GROUP / 2; i++) {
        out[2 * i] = table[x[i] & 15];
        out[2 * i + 1] = table[x[i] >> 4];
    }
#endif
}

/* Up to 32 values of one scale, an even number; gives the largest magnitude over the scale, doubled. */
INLINE int decode_fp4_group(const uint8_t *x, size_t count, float scale, float *out) {
    uint8_t rest[FP4_GROUP / 2] = {0};
    int8_t doubled[FP4_GROUP];
    int largest = 0;
    if (count < FP4_GROUP) x = memcpy(rest, x, count / 2);
    map_group(x, fp4_doubled, doubled);
    for (size_t i = 0; i < count; i++) out[i] = (float)doubled[i] * 0.5f * scale;
    for (int i = 0; i < FP4_GROUP; i++) largest = abs(doubled[i]) > largest ? abs(doubled[i]) : largest;
    return largest;
}

/* The values of a row. NaN where one is not finite, else the largest magnitude. */
static float decode_fp4(const uint8_t *x, size_t n, const float *block_scale, size_t block, float *out) {
    float largest = 0, poison = 0;
    for (size_t first = 0; first < n; first += block) {
        const float scale = block_scale[first / block];
        const size_t end = first + block < n ? first + block : n;
        for (size_t i = first; i < end; i += FP4_GROUP) {
            const size_t count = end - i < FP4_GROUP ? end - i : FP4_GROUP;
            largest = fmaxf(largest, (float)decode_fp4_group(x + i / 2, count, scale, out + i) * 0.5f * fabsf(scale));
        }
        poison += scale * 0.0f;
    }
    return poison != 0 || isinf(largest) ? NAN : largest;
}

/* Weights of each magnitude, [odd part 1 or 3][power]: all of them, and the negative ones. */
struct fp4_counts {
    uint32_t all[2][FP4_BINS], negative[2][FP4_BINS];
};

/* The biased exponent of a scale; 0 if it is no power of two in float32's normal range. */
INLINE int fp4_exponent(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return (bits & 0x807FFFFF) == 0 && bits < 0x7F800000 ? (int)(bits >> 23) : 0;
}

/* Adds up a group of 32 whose scale has that exponent. A bit of each nibble at a time: 32 of them in one word. */
INLINE void count_group(const uint8_t *x, int exponent, struct fp4_counts *counts) {
    uint64_t word[2], plane[4];
    memcpy(word, x, sizeof word);
    for (int bit = 0; bit < 4; bit++) {
        const uint64_t each = 0x1111111111111111;
        plane[bit] = (word[0] >> bit & each) | (word[1] >> bit & each) << 1;
    }
    const uint64_t low = plane[0], middle = plane[1], high = plane[2];
    const uint64_t is[7] = {low & ~middle & ~high, ~low & middle & ~high, low & middle & ~high, ~low & ~middle & high,
                            low & ~middle & high,  ~low & middle & high,  low & middle & high};
    for (int c = 0; c < 7; c++) {
        const int three = fp4_is_three[c + 1], at = exponent + fp4_shift[c + 1];
        uint64_t all = is[c], negative = is[c] & plane[3];
        __asm__("" : "+r"(all), "+r"(negative)); /* vectors without an instruction for it would count slower */
        counts->all[three][at] += (uint32_t)__builtin_popcountll(all);
        counts->negative[three][at] += (uint32_t)__builtin_popcountll(negative);
    }
}

/* A breakpoint of an octave, |w| / (2m − 1): |w| is 2^(octave + down), or 3 · 2^(octave + down − 1). `ends`: the next one is
 * lower. */
struct fp4_breakpoint {
    uint8_t three, m, down, ends;
};

/* In falling order of 1, 1/3, … 1/15 and 3, 3/3, … 3/15 over their power of two. */
static const struct fp4_breakpoint fp4_order[16] = {
    {1, 7, 4, 1}, {0, 5, 4, 1}, {1, 4, 3, 1}, {0, 3, 3, 0}, {1, 8, 4, 1}, {1, 1, 0, 1}, {0, 6, 4, 1}, {0, 2, 2, 0},
    {1, 5, 3, 1}, {0, 7, 4, 1}, {1, 3, 2, 1}, {0, 4, 3, 1}, {1, 6, 3, 1}, {0, 8, 4, 1}, {0, 1, 0, 0}, {1, 2, 1, 1},
};

/* A row's counts from power `lowest` to `highest`; of the fixed point, 2^lowest is `least`. */
struct fp4_row {
    struct fp4_counts counts;
    int lowest, highest;
    int64_t least;
};

/* The best state: every one is visited. */
static struct exact_state search_fp4(const struct fp4_row *row) {
    struct exact_state best = {0, 0, 0};
    int64_t a = 0, b = 0;
    /* Odd parts of 3 reach one octave above their power. */
    for (int octave = row->highest + 1; octave >= row->lowest - 4; octave--) {
        int moved = 0;
        for (int p = 0; p < 16; p++) {
            const struct fp4_breakpoint *at = &fp4_order[p];
            const int power = octave + at->down - at->three;
            if (power >= row->lowest && power <= row->highest) {
                const uint32_t count = (at->m == 8 ? row->counts.negative : row->counts.all)[at->three][power];
                a += (int64_t)count * (at->three ? 3 : 1) * (row->least << (power - row->lowest));
                b += (int64_t)count * (2 * at->m - 1);
                moved |= count > 0;
            }
            if (!at->ends || !moved) continue;
            moved = 0;
            /* Division is dear; FINE_SLACK is larger than its rounding. */
            const double real = (double)a;
            if (real * real >= best.score * FINE_SLACK * (double)b) offer(&best, a, b);
        }
    }
    return best;
}

/* The code of a magnitude, and its opposite's: round-half-even(w · inverse) within −8 and 7. */
INLINE void code_fp4(float magnitude, float inverse, int *positive, int *negative) {
    const float scaled = fminf(rintf(magnitude * inverse), 8);
    *negative = -(int)scaled;
    *positive = scaled > 7 ? 7 : (int)scaled;
}

/* The codes of a row, by a table for each exponent of its scales. */
static void map_fp4(const uint8_t *x, size_t n, const float *block_scale, float inverse, int8_t *codes) {
    int8_t tables[256][16];
    uint8_t known[256] = {0};
    for (size_t g = 0; g < n / FP4_GROUP; g++) {
        const int exponent = fp4_exponent(block_scale[g]);
        int8_t *table = tables[exponent];
        if (!known[exponent]) {
            known[exponent] = 1;
            table[0] = table[8] = 0;
            for (int c = 1; c < 8; c++) {
                int positive, negative;
                code_fp4((float)fp4_doubled[c] * 0.5f * block_scale[g], inverse, &positive, &negative);
                table[c] = (int8_t)positive;
                table[c + 8] = (int8_t)negative;
            }
        }
        map_group(x + g * FP4_GROUP / 2, table, codes + g * FP4_GROUP);
    }
}

/* Codes and error by the best scale. NOT_IN_TABLES where magnitudes are too far apart. */
static int convert_fp4_mse(const uint8_t *x, size_t n, const float *block_scale, struct fp4_row *row, int exponent,
                           struct converted *out) {
    const int shift = FIXED_BITS - exponent + row->lowest - 128;
    if (shift < 0) return NOT_IN_TABLES;
    row->least = (int64_t)1 << shift;
    const struct exact_state best = search_fp4(row);
    out->scale = (float)ldexp((double)best.a / (double)(best.b > 0 ? best.b : 1), exponent - FIXED_BITS);
    const float inverse = 1.0f / out->scale;
    map_fp4(x, n, block_scale, inverse, out->codes);
    uint64_t norm = 0;
    struct exact_state state = {0, 0, 0};
    for (int power = row->lowest; power <= row->highest; power++) {
        for (int odd = 0; odd < 2; odd++) {
            const int64_t all = row->counts.all[odd][power], negative = row->counts.negative[odd][power];
            const int64_t fixed = (odd ? 3 : 1) * (row->least << (power - row->lowest));
            int up, down;
            code_fp4(ldexpf(odd ? 3 : 1, power - 128), inverse, &up, &down);
            norm += (uint64_t)all * (uint64_t)(fixed * fixed);
            state.a += fixed * ((all - negative) * up - negative * down);
            state.b += (all - negative) * up * up + negative * down * down;
        }
    }
    account(out, (double)norm, state, exponent);
    return NPUQ_OK;
}

/* Codes and error by the largest magnitude, as convert_minmax_int4: nothing to clamp, so a weight and its opposite are alike. */
static int convert_fp4_minmax(const uint8_t *x, size_t n, const float *block_scale, const struct fp4_row *row, float largest,
                              struct converted *out) {
    int exponent;
    const float unit = unit_of(ERROR_BITS, largest, &exponent);
    out->scale = largest / 7;
    const float inverse = 1.0f / out->scale;
    map_fp4(x, n, block_scale, inverse, out->codes);
    uint64_t norm = 0;
    struct exact_state state = {0, 0, 0};
    for (int power = row->lowest; power <= row->highest; power++) {
        for (int odd = 0; odd < 2; odd++) {
            const int64_t all = row->counts.all[odd][power];
            if (all == 0) continue; /* 3 times the highest power may be infinite */
            const float magnitude = ldexpf(odd ? 3 : 1, power - 128);
            const int64_t fixed = (int64_t)rintf(magnitude * unit), code = (int64_t)rintf(magnitude * inverse);
            norm += (uint64_t)(all * fixed * fixed);
            state.a += all * fixed * code;
            state.b += all * code * code;
        }
    }
    account_in(out, (double)norm, state, exponent, ERROR_BITS);
    return NPUQ_OK;
}

/* int4 from the FP4 row itself, as the general conversions. NOT_IN_TABLES where scales are no powers of two in groups of 32,
 * or too far apart. */
static int convert_fp4(const uint8_t *x, size_t n, const float *block_scale, size_t block, int mse, struct converted *out) {
    struct fp4_row row = {0};
    if (block != FP4_GROUP || n % FP4_GROUP != 0) return NOT_IN_TABLES;
    for (size_t g = 0; g < n / FP4_GROUP; g++) {
        const int exponent = fp4_exponent(block_scale[g]);
        if (exponent == 0) return NOT_IN_TABLES;
        count_group(x + g * FP4_GROUP / 2, exponent, &row.counts);
    }
    row.lowest = FP4_BINS;
    for (int power = 0; power < FP4_BINS; power++) {
        if ((row.counts.all[0][power] | row.counts.all[1][power]) == 0) continue;
        row.lowest = power < row.lowest ? power : row.lowest;
        row.highest = power;
    }
    if (row.lowest == FP4_BINS) { /* zeros */
        zero_row(out, n);
        return NPUQ_OK;
    }
    /* Power p is 2^(p − 128): a scale of exponent e is 2^(e − 127), and its bins begin at half of that. */
    const int three = row.counts.all[1][row.highest] > 0;
    const int exponent = row.highest - 128 + (three ? 2 : 1); /* of frexpf(largest) */
    if (exponent > 128) return NOT_IN_TABLES;
    const int below = !three && row.highest > 0 && row.counts.all[1][row.highest - 1] > 0; /* 1½ times 2^highest */
    const float largest = ldexpf(three || below ? 3 : 1, row.highest - 128 - below);
    if (largest < LEAST_MAGNITUDE) return NOT_IN_TABLES;
    if (!mse) return convert_fp4_minmax(x, n, block_scale, &row, largest, out);
    return convert_fp4_mse(x, n, block_scale, &row, exponent, out);
}

#endif
