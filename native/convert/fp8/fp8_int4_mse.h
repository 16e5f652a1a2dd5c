/* int4 by least squared error of an FP8 row, computed from its few different magnitudes (fp8_tables.h) instead of its
 * weights. Scale and codes equal those of quantize_row.h to the bit. */
#ifndef NPUQ_CONVERT_FP8_FP8_INT4_MSE_H
#define NPUQ_CONVERT_FP8_FP8_INT4_MSE_H

#include "convert/fp8/fp8_minmax.h"

/* The least half scale that is looked at, of the one that is guessed: so low that clipping has ruled out all below it,
 * and 48 magnitudes reach from there to the largest of a block of Gaussian weights. */
#define LEAST_RATIO 0.5
/* Width, relative, below which an interval of scales stays as it is. */
#define TABLE_NARROW 0.008

INLINE size_t segment_of(const struct fp8_row *row) { return row->block < SEGMENT ? row->block : SEGMENT; }

INLINE size_t segment_length(const struct fp8_row *row, size_t s) {
    const size_t segment = segment_of(row), left = row->n - s * segment;
    return left < segment ? left : segment;
}

/* The row's largest magnitude, from a first pass over every segment; NaN if it takes the weights to find it. */
static float survey_row(const struct fp8_row *row, struct tables *tables) {
    float largest = 0;
    int odd = 0;
    for (size_t s = 0; s < tables->segments; s++) {
        struct segment *segment = &tables->segments_at[s];
        segment->scale = row->block_scale[s * segment_of(row) / row->block];
        segment->last = largest_code(row->x + s * segment_of(row), segment_length(row, s));
        const float top = fp8_magnitudes[segment->last] * segment->scale;
        odd |= segment->last == FP8_NAN || !(segment->scale > 0) || isinf(segment->scale);
        largest = top > largest ? top : largest;
    }
    for (size_t s = 0; s < tables->segments; s++) { /* zeros may have any scale, such as leave no room for sums */
        if (tables->segments_at[s].last == 0) tables->segments_at[s].scale = largest;
    }
    return odd ? NAN : largest;
}

/* Σ w² in fixed point, exactly. */
static uint64_t norm_of_fp8(const struct fp8_row *row, const struct tables *tables) {
    vl even = {0}, odd = {0};
    for (size_t s = 0; s < tables->segments; s++) {
        const size_t length = segment_length(row, s);
        /* At most 2^32, since even the least magnitude is below 2^23 then; float32 has no room for all of MAGNITUDE_UNIT. */
        const vf scale = vf_set(tables->segments_at[s].scale * tables->unit);
        for (size_t i = 0; i < length; i += CODE_STEP) {
            uint8_t lane[CODE_STEP] = {0};
            const uint8_t *x = row->x + s * segment_of(row) + i;
            if (length - i < CODE_STEP) x = memcpy(lane, x, length - i);
            float w[CODE_STEP];
            decode_magnitudes(x, vf_set(MAGNITUDE_UNIT), w);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) vl_squares(vf_round(vf_load(w + k * VW) * scale), &even, &odd);
        }
    }
    return (uint64_t)vl_total(even) + (uint64_t)vl_total(odd);
}

/* Where each segment's table begins, for half scales of `least` and above. NOT_IN_TABLES if magnitudes are not 8 an
 * octave there, or are too many. */
static int place_tables(struct tables *tables) {
    /* The first magnitude has code 0 for sure, and the 32nd behind it, 16 times as large, 7 at most. */
    const double highest = 0.93 * tables->least - 4 * TABLE_DOUBT;
    int most = 0;
    for (size_t s = 0; s < tables->segments; s++) {
        struct segment *segment = &tables->segments_at[s];
        const float inverse = 1 / (segment->scale * tables->unit), first = (float)highest * inverse;
        int32_t bits;
        memcpy(&bits, &first, sizeof bits);
        int code = (bits >> CODE_SHIFT) - EXPONENT_BIAS * 8; /* rounded down */
        if (code < FP8_NORMAL && segment->last > 0 && segment->last > code) return NOT_IN_TABLES;
        code = code < FP8_NORMAL ? FP8_NORMAL : code >= FP8_NAN ? FP8_NAN - 1 : code;
        segment->first = (uint8_t)code;
        most = segment->last - code + 1 > most ? segment->last - code + 1 : most;
        for (int k = 0; k < 4; k++) tables->inverse[4 * s + (size_t)k] = inverse;
        for (int k = 0; k < 8; k++) tables->origin[8 * s + (size_t)k] = (int16_t)(code + EXPONENT_BIAS * 8);
        for (int k = 0; k < 2; k++) tables->worth[2 * s + (size_t)k] = worth_of(segment, tables->unit);
    }
    tables->parts = most > 3 * TABLE_PART ? 4 : 3;
    return most > MOST_CODES ? NOT_IN_TABLES : NPUQ_OK;
}

/* An odd last segment has an empty one beside it. NOT_IN_TABLES if a sum does not fit. */
static int write_tables(const struct fp8_row *row, struct tables *tables) {
    const size_t last = tables->segments - 1;
    if (last % 2 == 0) {
        memset(tables->inverse + 4 * (last + 1), 0, 4 * sizeof(float));
        memset(tables->origin + 8 * (last + 1), 0, 8 * sizeof(int16_t));
        memset(tables->worth + 2 * (last + 1), 0, 2 * sizeof(double));
        memset(table_at(tables, last / 2, 0, 0), 0, SUM_PLANES * planes_of(tables) * 2 * TABLE_PART);
    }
    return write_rows(tables, row->x, row->n, segment_of(row)) ? NPUQ_OK : NOT_IN_TABLES;
}

/* out[i] = table[|x[i]| − first], 0 below, with the sign of x[i] and 7 at most. `table` has `parts` times 16 codes. */
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
INLINE __m256i look_up(__m256i x, __m256i first, const __m256i *table, const int parts) {
    __m256i place = _mm256_subs_epu8(_mm256_and_si256(x, _mm256_set1_epi8(127)), first), q = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) {
        /* In another part than p the upper bit is set, and a shuffle gives 0. */
        __m256i other = _mm256_xor_si256(place, _mm256_set1_epi8((char)(p << 4)));
        q = _mm256_or_si256(q, _mm256_shuffle_epi8(table[p], _mm256_adds_epu8(other, _mm256_set1_epi8(0x70))));
    }
    return _mm256_min_epi8(_mm256_sign_epi8(q, x), _mm256_set1_epi8(7));
}
INLINE void map_parts(const uint8_t *x, size_t n, uint8_t first, const int8_t *codes, const int parts, int8_t *out) {
    const __m256i from = _mm256_set1_epi8((char)first);
    __m256i table[MOST_PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) {
        table[p] = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(codes + TABLE_PART * p)));
    }
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i q = look_up(_mm256_loadu_si256((const __m256i *)(x + i)), from, table, parts);
        _mm256_storeu_si256((__m256i *)(out + i), q);
    }
    if (i < n) {
        uint8_t lane[32] = {0};
        memcpy(lane, x + i, n - i);
        __m256i q = look_up(_mm256_loadu_si256((const __m256i *)lane), from, table, parts);
        memcpy(out + i, &q, n - i);
    }
}
static void map_codes(const uint8_t *x, size_t n, uint8_t first, const int8_t *table, int parts, int8_t *out) {
    if (parts == 3) map_parts(x, n, first, table, 3, out);
    else map_parts(x, n, first, table, 4, out);
}
#else
static void map_codes(const uint8_t *x, size_t n, uint8_t first, const int8_t *table, int parts, int8_t *out) {
    (void)parts;
    for (size_t i = 0; i < n; i++) {
        int size = x[i] & 127, q = size > first ? table[size - first] : 0;
        out[i] = (int8_t)(x[i] & 128 ? -q : q > 7 ? 7 : q);
    }
}
#endif

/* As convert_row for int4 `mse`, from the FP8 row itself. NOT_IN_TABLES where it does not pay or may not be done; what is
 * wrong with the row is then for those to say who look at the weights. */
static int convert_distinct(const struct fp8_row *row, void *scratch, struct converted *out) {
    const size_t n = row->n, length = segment_of(row);
    const int splits = row->block < n && row->block % length != 0; /* a segment would have two scales */
    if (length < LEAST_SEGMENT || splits) return NOT_IN_TABLES;
    struct convert_memory memory = table_layout(scratch, n, (n + length - 1) / length);
    struct tables *tables = &memory.tables;
    const float largest = survey_row(row, tables);
    if (!(largest >= LEAST_MAGNITUDE) || isinf(largest)) return NOT_IN_TABLES;
    int exponent;
    tables->unit = fixed_unit(largest, &exponent);
    const double norm = (double)norm_of_fp8(row, tables), top = (double)rintf(ldexpf(largest, FIXED_BITS - exponent));
    tables->least = larger(LEAST_RATIO * guess_half_scale(memory.search, norm, n), 64 * TABLE_DOUBT);
    if (place_tables(tables) != NPUQ_OK || write_tables(row, tables) != NPUQ_OK) return NOT_IN_TABLES;
    const struct searched searched = {NULL, tables, (double)n, tables->least, TABLE_DOUBT, TABLE_NARROW};
    struct exact_state best;
    int status = optimal_int4(&searched, NULL, tables->unit, top, norm, &memory.changes, memory.search, &best);
    if (status != NPUQ_OK) return status;
    out->scale = (float)ldexp((double)best.a / (double)(best.b > 0 ? best.b : 1), exponent - FIXED_BITS);
    int8_t *codes = (int8_t *)tables->sums; /* which are not needed any more, and larger */
    /* Rounding at the best scale leaves no more error than the best codes do: it gives these codes, unless some weight is so
     * near a threshold that either of two will do. */
    const float inverse = 1.0f / out->scale;
    if (!sure_codes(tables, tables->unit / (2 * inverse), codes)) best = exact_tables(tables, inverse, codes);
    account(out, norm, best, exponent);
    for (size_t s = 0; s < tables->segments; s++) {
        const size_t at = s * length;
        const struct segment *segment = &tables->segments_at[s];
        if (segment->last <= segment->first) { /* below every threshold; a table of these may begin above some */
            memset(out->codes + at, 0, segment_length(row, s));
            continue;
        }
        map_codes(row->x + at, segment_length(row, s), segment->first, codes + s * MOST_CODES, tables->parts, out->codes + at);
    }
    return NPUQ_OK;
}

#endif
