/* States (A, B) of an FP8 row at a scale, by look-ups in its tables (fp8_tables.h). */
#ifndef NPUQ_CONVERT_FP8_FP8_TABLE_SUMS_H
#define NPUQ_CONVERT_FP8_FP8_TABLE_SUMS_H

#include "convert/mse/mse_breakpoints.h"
#include "convert/fp8/fp8_tables.h"

/* The places in a segment's table of the first magnitudes at or above the eight thresholds of half scale h; what is far
 * outside of the table may be anything outside of it. */
INLINE void thresholds_of(const struct tables *tables, size_t s, float h, int32_t place[8]) {
    static const float odd[8] = {1, 3, 5, 7, 9, 11, 13, 15};
    for (int m = 0; m < 8; m++) {
        const float at = odd[m] * h * tables->inverse[4 * s];
        int32_t bits;
        memcpy(&bits, &at, sizeof bits);
        place[m] = ((bits + ((1 << CODE_SHIFT) - 1)) >> CODE_SHIFT) - tables->origin[8 * s];
    }
}

/* A, but for its rounding, and B of the codes of two half scales. */
struct state_pair {
    double a[2];
    int64_t b[2];
};

#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
/* The thresholds of two half scales in fixed point. */
struct thresholds {
    __m256 at[2][2];
};
INLINE struct thresholds thresholds_at(float first, float second) {
    const __m256 odd[2] = {_mm256_setr_ps(1, 3, 5, 7, 1, 3, 5, 7), _mm256_setr_ps(9, 11, 13, 15, 9, 11, 13, 15)};
    struct thresholds thresholds;
    for (int k = 0; k < 2; k++) {
        thresholds.at[0][k] = _mm256_mul_ps(odd[k], _mm256_set1_ps(first));
        thresholds.at[1][k] = _mm256_mul_ps(odd[k], _mm256_set1_ps(second));
    }
    return thresholds;
}
INLINE __m256i threshold_codes(__m256 inverse, __m256 h) {
    __m256i bits = _mm256_castps_si256(_mm256_mul_ps(inverse, h));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32((1 << CODE_SHIFT) - 1)), CODE_SHIFT);
}
/* Lower halves of vectors are of a pair's first segment; in each half, the first scale comes before the second. */
INLINE __m256i threshold_places(const struct tables *tables, size_t pair, const struct thresholds *thresholds) {
    const __m256 inverse = _mm256_loadu_ps(tables->inverse + 8 * pair);
    const __m256i origin = _mm256_loadu_si256((const __m256i *)(tables->origin + 16 * pair));
    __m256i code[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
        __m256i both = _mm256_packs_epi32(threshold_codes(inverse, thresholds->at[j][0]),
                                          threshold_codes(inverse, thresholds->at[j][1]));
        code[j] = _mm256_sub_epi16(both, origin);
    }
    return _mm256_packus_epi16(code[0], code[1]);
}

/* A of four: of the first segment at both scales, then of the second. */
struct sum_vectors {
    __m256d a;
    __m256i b;
};

/* The sums above the eight places in one plane. */
INLINE __m256i look_up_sums(const uint8_t *table, const __m256i *all, const __m256i *negative, const int parts) {
    __m256i sum = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)table), all[0]);
#pragma GCC unroll 8
    for (int p = 1; p < 2 * parts - TOP_PART; p++) {
        const __m256i values = _mm256_loadu_si256((const __m256i *)(table + (size_t)p * 2 * TABLE_PART));
        const __m256i places = p < parts ? all[p] : negative[p - parts + TOP_PART];
        sum = _mm256_or_si256(sum, _mm256_shuffle_epi8(values, places));
    }
    return sum;
}

INLINE void add_pair(const uint8_t *table, __m256i place, const double *worth, const int parts, struct sum_vectors *sums) {
    const __m256i last = _mm256_set1_epi64x((int64_t)0x8000000000000000), rest = _mm256_set1_epi64x(0x0080808080808080);
    const __m256i squares = _mm256_set1_epi64x(0x0F0D0B0907050301), zero = _mm256_setzero_si256();
    const size_t stride = (size_t)(2 * parts - TOP_PART) * 2 * TABLE_PART;
    const __m256i any = _mm256_or_si256(place, last), eighth = _mm256_or_si256(place, rest);
    __m256i all[MOST_PARTS], negative[MOST_PARTS];
#pragma GCC unroll 4
    for (int p = 0; p < parts; p++) { /* in another part the upper bit is set, and a shuffle gives 0 */
        const __m256i part = _mm256_set1_epi8((char)(p << 4)), up = _mm256_set1_epi8(0x70);
        all[p] = _mm256_adds_epu8(_mm256_xor_si256(any, part), up);
        if (p >= TOP_PART) negative[p] = _mm256_adds_epu8(_mm256_xor_si256(eighth, part), up);
    }
    __m256i steps = _mm256_maddubs_epi16(look_up_sums(table, all, negative, parts), squares); /* 2^7 · 28 at most */
    sums->b = _mm256_add_epi32(sums->b, _mm256_madd_epi16(steps, _mm256_set1_epi16(1)));
    __m256i low = _mm256_sad_epu8(look_up_sums(table + stride, all, negative, parts), zero);
    __m256i high = _mm256_sad_epu8(look_up_sums(table + 2 * stride, all, negative, parts), zero);
    /* Below 2^52, under the exponent of 2^52: that integer as a double. */
    const __m256d base = _mm256_set1_pd(0x1p52);
    __m256i both = _mm256_or_si256(_mm256_add_epi64(low, _mm256_slli_epi64(high, 8)), _mm256_castpd_si256(base));
    sums->a = _mm256_fmadd_pd(_mm256_sub_pd(_mm256_castsi256_pd(both), base), _mm256_loadu_pd(worth), sums->a);
}

enum { PLACES_AT_ONCE = 16, SCALES_AT_ONCE = 4 };

INLINE struct state_pair pair_of(const struct sum_vectors *sums) {
    double a[4];
    int32_t steps[8];
    memcpy(a, &sums->a, sizeof a);
    memcpy(steps, &sums->b, sizeof steps);
    struct state_pair out = {{a[0] + a[2], a[1] + a[3]}, {0, 0}};
    for (int j = 0; j < 8; j++) out.b[j / 2 % 2] += steps[j];
    return out;
}

/* The states of 2 or 4 half scales. */
INLINE void sum_pairs(const struct tables *tables, const double *h, const int sets, const int parts, struct state_pair *out) {
    struct thresholds thresholds[2];
    struct sum_vectors sums[2];
    for (int j = 0; j < sets; j++) {
        thresholds[j] = thresholds_at((float)h[2 * j], (float)h[2 * j + 1]);
        sums[j] = (struct sum_vectors){_mm256_setzero_pd(), _mm256_setzero_si256()};
    }
    const size_t pairs = (tables->segments + 1) / 2, stride = SUM_PLANES * (size_t)(2 * parts - TOP_PART) * 2 * TABLE_PART;
    for (size_t first = 0; first < pairs; first += PLACES_AT_ONCE) {
        const size_t count = pairs - first < PLACES_AT_ONCE ? pairs - first : PLACES_AT_ONCE;
        __m256i place[2][PLACES_AT_ONCE]; /* apart from the look-ups, which fill all registers */
        for (int j = 0; j < sets; j++) {
            for (size_t k = 0; k < count; k++) place[j][k] = threshold_places(tables, first + k, &thresholds[j]);
        }
        for (int j = 0; j < sets; j++) {
            const uint8_t *table = tables->sums + first * stride;
            for (size_t k = 0; k < count; k++) {
                add_pair(table + k * stride, place[j][k], tables->worth + 4 * (first + k), parts, &sums[j]);
            }
        }
    }
    for (int j = 0; j < sets; j++) out[j] = pair_of(&sums[j]);
}
static void sum_tables(const struct tables *tables, const double *h, int count, struct state_pair *out) {
    if (count > 2 && tables->parts == 3) sum_pairs(tables, h, 2, 3, out);
    else if (count > 2) sum_pairs(tables, h, 2, 4, out);
    else if (tables->parts == 3) sum_pairs(tables, h, 1, 3, out);
    else sum_pairs(tables, h, 1, 4, out);
}
#else
enum { SCALES_AT_ONCE = 2 };
static void sum_tables(const struct tables *tables, const double *h, int count, struct state_pair *out) {
    *out = (struct state_pair){{0, 0}, {0, 0}};
    for (size_t s = 0; s < tables->segments; s++) {
        for (int j = 0; j < count; j++) {
            int32_t place[8], sum = 0;
            thresholds_of(tables, s, (float)h[j], place);
            for (int m = 0; m < 8; m++) {
                const int from = place[m] > 0 ? place[m] : 0;
                int part = from / TABLE_PART;
                if (part >= tables->parts) break;
                if (m == 7) part += tables->parts - TOP_PART;
                const uint8_t *at = table_at(tables, s / 2, 0, part) + s % 2 * TABLE_PART + from % TABLE_PART;
                const size_t plane = planes_of(tables) * 2 * TABLE_PART;
                out->b[j] += (2 * m + 1) * at[0];
                sum += at[plane] + 256 * at[2 * plane];
            }
            out->a[j] += sum * tables->worth[2 * s];
        }
    }
}
#endif

/* The factor from a weight to its code at half scale h. */
INLINE float inverse_at(const struct tables *tables, double h) { return (float)(tables->unit / (2 * h)); }

/* The exact A and B of the codes round(w · inverse), and the code of each magnitude in `codes` [segments][MOST_CODES] where
 * that is given. Codes times counts of a segment come to 2^10 at most: 32 bits hold half a thousand of them times 2^12. */
static struct exact_state exact_tables(const struct tables *tables, float inverse, int8_t *codes) {
    enum { HALF = 12, SEGMENTS = 256 };
    const float to_code = inverse / tables->unit;
    vl low_sum = {0}, high_sum = {0};
    vi b = {0};
    for (size_t from = 0; from < tables->segments; from += SEGMENTS) {
        vi low = {0}, high = {0};
        for (size_t s = from; s < from + SEGMENTS && s < tables->segments; s++) {
            const struct segment *segment = &tables->segments_at[s];
            const float scale = segment->scale * tables->unit; /* the unit is a power of two: nothing is rounded otherwise */
            const uint8_t *all = tables->counts + s * COUNT_BYTES, *negative = all + NEGATIVE_COUNTS - TOP_PART * TABLE_PART;
            for (int j = 0; j < tables->parts * TABLE_PART; j += PLANE_STEP) {
                vi fixed[2], code[2];
#pragma GCC unroll 2
                for (int k = 0; k < 2; k++) {
                    const vf w = vf_load(fp8_magnitudes + segment->first + j + k * VW) * scale;
                    code[k] = vf_round(vf_min(w * to_code, vf_set(8)));
                    fixed[k] = vf_round(w);
                    if (codes != NULL) vi_store_i8(codes + s * MOST_CODES + j + k * VW, code[k]);
                }
                const vs q = vs_pack(code[0], code[1]), seven = vs_min(q, vs_set(7));
                vs times = seven * vs_pack(vi_load_u8(all + j), vi_load_u8(all + j + VW)), squares = seven * times;
                if (j >= TOP_PART * TABLE_PART) {
                    const vs eighth = vs_pack(vi_load_u8(negative + j), vi_load_u8(negative + j + VW)) & (vs)(q > seven);
                    times += eighth;
                    squares += 15 * eighth;
                }
                const vi least = (vi){0} + ((1 << HALF) - 1);
                low = vs_dot(low, vs_pack(fixed[0] & least, fixed[1] & least), times);
                high = vs_dot(high, vs_pack(fixed[0] >> HALF, fixed[1] >> HALF), times);
                b = vs_dot(b, squares, vs_set(1));
            }
        }
        low_sum = vl_add(low_sum, low);
        high_sum = vl_add(high_sum, high);
    }
    return (struct exact_state){vl_total(low_sum) + vl_total(high_sum) * (1 << HALF), vi_total(b), 0};
}

/* The code of each magnitude at half scale h in `codes` [segments][MOST_CODES], as of exact_tables; returns 0 where some
 * magnitude, in fixed point or before it was rounded to that, may be at a threshold, so that this cannot be known. */
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
/* Products of four float32, and quotients, are less than 16 ulp apart. */
enum { CODE_DOUBT = 32 };
INLINE __m256i near_magnitude(__m256 at, int doubt) {
    const __m256i rest = _mm256_add_epi32(_mm256_castps_si256(at), _mm256_set1_epi32(doubt));
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(2 * doubt), _mm256_and_si256(rest, _mm256_set1_epi32((1 << CODE_SHIFT) - 1)));
}
/* From a segment's thresholds in both halves of `place`: how many of them are at or below each place. */
INLINE void write_codes(__m256i place, int8_t *codes) {
    const __m256i first = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,
                                           25, 26, 27, 28, 29, 30, 31);
    const __m256i second = _mm256_add_epi8(first, _mm256_set1_epi8(32));
    __m256i low = _mm256_set1_epi8(8), high = low;
#pragma GCC unroll 8
    for (char m = 0; m < 8; m++) {
        const __m256i threshold = _mm256_shuffle_epi8(place, _mm256_set1_epi8(m));
        low = _mm256_add_epi8(low, _mm256_cmpgt_epi8(threshold, first));
        high = _mm256_add_epi8(high, _mm256_cmpgt_epi8(threshold, second));
    }
    _mm256_storeu_si256((__m256i *)codes, low);
    _mm256_storeu_si256((__m256i *)(codes + 32), high);
}
static int sure_codes(const struct tables *tables, float h, int8_t *codes) {
    const struct thresholds thresholds = thresholds_at(h, h);
    const int doubt = CODE_DOUBT + (int)(0x1p24f * (float)WEIGHT_DOUBT / h); /* no threshold is below h ≥ 64 · TABLE_DOUBT */
    __m256i near = _mm256_setzero_si256();
    for (size_t s = 0; s < tables->segments; s += 2) {
        const __m256 inverse = _mm256_loadu_ps(tables->inverse + 4 * s);
        for (int k = 0; k < 2; k++) {
            near = _mm256_or_si256(near, near_magnitude(_mm256_mul_ps(inverse, thresholds.at[0][k]), doubt));
        }
        const __m256i place = _mm256_min_epu8(threshold_places(tables, s / 2, &thresholds), _mm256_set1_epi8(127));
        write_codes(_mm256_permute2x128_si256(place, place, 0x00), codes + s * MOST_CODES);
        if (s + 1 < tables->segments) write_codes(_mm256_permute2x128_si256(place, place, 0x11), codes + (s + 1) * MOST_CODES);
    }
    return _mm256_testz_si256(near, near);
}
#else
static int sure_codes(const struct tables *tables, float h, int8_t *codes) {
    (void)tables, (void)h, (void)codes;
    return 0;
}
#endif

/* A lower bound of the error that clipping alone makes at half scale h and at all smaller ones: Σ (w − 14h)², and of
 * negative weights Σ (w − 16h)², of what is larger. Only what is in the upper parts is looked at. Sums of 2^17 floats are
 * less than 1 % off. */
static double clipped_tables(const struct tables *tables, double h) {
    vf sum = vf_set(0);
    const float limit = (float)(14 * h * (1 + 1e-6)), more = (float)(2 * h);
    for (size_t s = 0; s < tables->segments; s++) {
        const struct segment *segment = &tables->segments_at[s];
        const uint8_t *all = tables->counts + s * COUNT_BYTES, *negative = all + NEGATIVE_COUNTS - TOP_PART * TABLE_PART;
        for (int j = TOP_PART * TABLE_PART; j < tables->parts * TABLE_PART; j += VW) {
            const vf w = vf_load(fp8_magnitudes + segment->first + j) * segment->scale * tables->unit;
            /* Behind the last code lie magnitudes of 0. */
            const vf over = vf_max(w - limit, vf_set(0)), beyond = vf_max(over - more, vf_set(0));
            const vf minus = vi_float(vi_load_u8(negative + j)), both = vi_float(vi_load_u8(all + j));
            sum = sum + (over * over * (both - minus) + beyond * beyond * minus);
        }
    }
    return 0.99 * vf_sum(sum);
}

/* A lower bound of Σ w² of the weights below half scale h, which are zeros there and at all larger scales. Only what is in
 * the lower parts is looked at. */
static double zeroed_tables(const struct tables *tables, double h) {
    vf sum = vf_set(0);
    const float limit = (float)(h * (1 - 1e-6));
    for (size_t s = 0; s < tables->segments; s++) {
        const struct segment *segment = &tables->segments_at[s];
        const uint8_t *all = tables->counts + s * COUNT_BYTES;
        for (int j = 0; j < TOP_PART * TABLE_PART; j += VW) {
            const vf w = vf_load(fp8_magnitudes + segment->first + j) * segment->scale * tables->unit;
            const vf below = (vf)((vi)w & (vi)(w < limit));
            sum = sum + below * below * vi_float(vi_load_u8(all + j));
        }
    }
    return 0.99 * vf_sum(sum);
}

#endif
