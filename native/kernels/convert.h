/* A source row becomes codes: decode, scale, round, and account for the error, while it sits in cache.
 *
 * Every level gives the same bits as quant/scales.py: products and sums whose order could show are of integers, and
 * what is float is one operation an element, never a fused one. */
#ifndef NPUQ_KERNELS_CONVERT_H
#define NPUQ_KERNELS_CONVERT_H

#include "optimal.h"
#include "rows.h"

/* FP8 (e4m3fn) to float32, exact. A NaN's pattern comes out as ±480; decode_fp8 looks for it. */
#if defined(NPUQ_LEVEL_AVX512)
INLINE vf vf_load_fp8(const uint8_t *p) {
    __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(byte, _mm256_set1_epi16(0x80)), 8);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(byte, _mm256_set1_epi16(0x7F)), 7);
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest)) * 256.0f; /* fp16 has a bias of 15, e4m3 one of 7 */
}
#elif defined(NPUQ_LEVEL_AVX2)
INLINE vf vf_load_fp8(const uint8_t *p) {
    __m128i byte = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p));
    __m128i sign = _mm_slli_epi16(_mm_and_si128(byte, _mm_set1_epi16(0x80)), 8);
    __m128i rest = _mm_slli_epi16(_mm_and_si128(byte, _mm_set1_epi16(0x7F)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(sign, rest)) * 256.0f;
}
#else
INLINE vf vf_load_fp8(const uint8_t *p) {
    typedef uint8_t vb4 __attribute__((vector_size(4)));
    typedef uint32_t vu4 __attribute__((vector_size(16)));
    vb4 byte;
    memcpy(&byte, p, sizeof byte);
    vu4 wide = __builtin_convertvector(byte, vu4);
    vu4 bits = (wide & 0x7F) << 20 | (wide & 0x80) << 24;
    return (vf)bits * 0x1p120f;
}
#endif

/* A block of up to `count` weights; raises `largest`. */
INLINE vf decode_block(const uint8_t *x, size_t count, float scale, float *out, vf largest) {
    size_t i = 0;
    for (; i + VW <= count; i += VW) {
        vf w = vf_load_fp8(x + i) * scale;
        vf_store(out + i, w);
        largest = vf_max(vf_abs(w), largest);
    }
    if (i < count) {
        uint8_t lane[16] = {0};
        memcpy(lane, x + i, count - i);
        vf w = vf_load_fp8(lane) * scale;
        vf_store_part(out + i, w, count - i);
        largest = vf_max(vf_abs(w), largest);
    }
    return largest;
}

static float decode_fp8(const uint8_t *x, size_t n, const float *block_scale, size_t block, float *out) {
    uint8_t nan = 0;
    vf most = vf_set(0);
    float poison = 0;
    for (size_t i = 0; i < n; i++) nan |= (x[i] & 0x7F) == 0x7F;
    for (size_t first = 0; first < n; first += block) {
        float scale = block_scale[first / block];
        most = decode_block(x + first, first + block < n ? block : n - first, scale, out + first, most);
        poison += scale * 0.0f;
    }
    /* Finite scales leave only overflow, which a maximum keeps. */
    float largest = vf_largest(most);
    return nan || poison != 0 || isinf(largest) ? NAN : largest;
}

static float decode_row(const void *x, int dtype, size_t n, const float *block_scale, size_t block, float *out) {
    if (dtype == NPUQ_F8E4M3) return decode_fp8(x, n, block_scale, block, out);
    to_float(x, dtype, n, out);
    return largest_finite(out, n);
}

/* What a search works on: the row in fixed point, in one scratch. */
struct convert_memory {
    struct optimal_scratch *search;
    int32_t *fixed;
    float *magnitude;
};

enum { BIN_WORDS = 2 * ((11 << 10) + 8) };

INLINE size_t padded_length(size_t n) { return (n + 63) / 64 * 64; }

/* Bytes of scratch that a row of n needs. */
static size_t convert_scratch(size_t n) {
    /* fixed, magnitude, index; the active ones with room for a last whole vector; two int16 planes. */
    return sizeof(struct optimal_scratch) + BIN_WORDS * sizeof(uint64_t) + padded_length(n) * (5 * 4 + 2 * 2) + 2 * 64 * 4;
}

static struct convert_memory convert_layout(void *memory, size_t n) {
    size_t padded = padded_length(n);
    struct optimal_scratch *search = memory;
    search->histogram.bins = (uint64_t *)(search + 1);
    int32_t *fixed = (int32_t *)(search->histogram.bins + BIN_WORDS);
    float *magnitude = (float *)(fixed + padded);
    search->histogram.index = (uint32_t *)(magnitude + padded);
    search->active_fixed = (int32_t *)(search->histogram.index + padded);
    search->active_magnitude = (float *)(search->active_fixed + padded + 64);
    search->high = (int16_t *)(search->active_magnitude + padded + 64);
    search->low = search->high + padded;
    return (struct convert_memory){search, fixed, magnitude};
}

/* Exact sums over a row in fixed point. */
struct fixed_sums {
    uint64_t squares; /* Σ w², 2^63 at most */
    int64_t all;      /* Σ |w| times the last code of its sign, 7 or 8 */
};

/* Rows are zero-padded to padded_length here, and so is what is made of them. */
static struct fixed_sums to_fixed(const float *w, size_t n, float unit, const struct convert_memory *memory) {
    const vi half = (vi){0} + PLANE_DOUBT;
    const size_t padded = padded_length(n);
    vl squares = {0};
    int64_t all = 0;
    for (size_t part = 0; part < padded; part += 32 * PLANE_STEP) { /* 64 sums of 2^23 fit 32 bits */
        size_t end = part + 32 * PLANE_STEP < padded ? part + 32 * PLANE_STEP : padded;
        vi size_sum = {0}, negative_sum = {0};
        for (size_t i = part; i < end; i += PLANE_STEP) {
            vi high[2], low[2];
            for (int k = 0; k < 2; k++) {
                vi whole = vf_round(vf_load(w + i + k * VW) * unit), sign = whole >> 31, size = (whole ^ sign) - sign;
                memcpy(memory->fixed + i + k * VW, &whole, sizeof whole);
                vf_store(memory->magnitude + i + k * VW, vi_float(size));
                high[k] = (whole + half) >> PLANE_SHIFT;
                low[k] = whole - (high[k] << PLANE_SHIFT);
                size_sum += size;
                negative_sum += size & sign;
                squares = vl_dot(squares, whole, whole);
            }
            vs_narrow(memory->search->high + i, high[0], high[1]);
            vs_narrow(memory->search->low + i, low[0], low[1]);
        }
        all += 7 * vi_total(size_sum) + vi_total(negative_sum);
    }
    return (struct fixed_sums){(uint64_t)vl_total(squares), all};
}

/* Codes round-half-even(w · inverse) between −bound and bound − 1, and the exact sums A and B of those codes; where
 * `squares` is given, also Σ w² in fixed point. */
INLINE struct exact_state round_codes_as(const float *w, size_t n, float unit, float inverse, int bound, int8_t *codes,
                                         const int bits, uint64_t *squares) {
    vf low = vf_set((float)-bound), high = vf_set((float)(bound - 1));
    vl even = {0}, odd = {0}, sum = {0};
    vi b = {0}; /* 2^14 · 2^17 / VW fits */
    for (size_t i = 0; i < n;) { /* what lies behind n is 0 */
        size_t end = i + PART < n ? i + PART : n;
        vi a = {0};
        for (; i < end; i += VW) {
            vf v = vf_load(w + i);
            vi fixed = vf_round(v * unit), code = vf_round(vf_min(vf_max(v * inverse, low), high));
            if (bits == 4) a += fixed * code; /* 2^26 at most, PART / VW times */
            else sum = vl_dot(sum, fixed, code);
            if (squares != NULL) vl_squares(fixed, &even, &odd);
            b = vi_square_bytes(b, code);
            if (i + VW <= n) {
                vi_store_i8(codes + i, code);
            } else {
                int8_t lane[VW];
                vi_store_i8(lane, code);
                memcpy(codes + i, lane, n - i);
            }
        }
        if (bits == 4) sum = vl_add(sum, a);
    }
    if (squares != NULL) *squares = (uint64_t)vl_total(even) + (uint64_t)vl_total(odd);
    return (struct exact_state){vl_total(sum), vi_total(b), 0};
}

static struct exact_state round_codes(const float *w, size_t n, float unit, float inverse, int bound, int8_t *codes,
                                      uint64_t *squares) {
    if (bound == 8) return round_codes_as(w, n, unit, inverse, bound, codes, 4, squares);
    return round_codes_as(w, n, unit, inverse, bound, codes, 8, squares);
}

/* The error of codes with the exact sums A and B, and the norm, of a row in fixed point. */
INLINE void account(struct converted *out, double norm, struct exact_state state, int exponent) {
    double sigma = ldexp((double)out->scale, FIXED_BITS - exponent);
    double error = norm - 2 * sigma * (double)state.a + sigma * sigma * (double)state.b;
    out->error = ldexp(error > 0 ? error : 0, 2 * (exponent - FIXED_BITS));
    out->norm = ldexp(norm, 2 * (exponent - FIXED_BITS));
}

static int convert_row(const float *w, size_t n, float largest, int bits, int mse, void *memory, struct converted *out) {
    int bound = 1 << (bits - 1), exponent;
    if (largest < 0x1p-100f) {
        memset(out->codes, 0, n);
        out->scale = 1;
        out->error = out->norm = 0;
        return NPUQ_OK;
    }
    (void)frexpf(largest, &exponent);
    const float unit = ldexpf(1, FIXED_BITS - exponent);
    out->scale = largest / (float)(bound - 1);
    uint64_t squares;
    if (!mse) {
        struct exact_state state = round_codes(w, n, unit, 1.0f / out->scale, bound, out->codes, &squares);
        account(out, (double)squares, state, exponent);
        return NPUQ_OK;
    }
    struct convert_memory layout = convert_layout(memory, n);
    struct fixed_sums sums = to_fixed(w, n, unit, &layout);
    struct optimal_row row = {layout.fixed, layout.magnitude, n, bound, (double)sums.squares};
    struct exact_state best;
    float top = rintf(ldexpf(largest, FIXED_BITS - exponent));
    if (optimal_state(&row, top, (double)sums.all, layout.search, &best) != NPUQ_OK) return NPUQ_NO_MEMORY;
    out->scale = (float)ldexp((double)best.a / (double)(best.b > 0 ? best.b : 1), exponent - FIXED_BITS);
    struct exact_state state = round_codes(w, n, unit, 1.0f / out->scale, bound, out->codes, NULL);
    account(out, row.norm, state, exponent);
    return NPUQ_OK;
}

static void convert_release(void *memory) { free(((struct optimal_scratch *)memory)->walk.breakpoints); }

/* Σ codes of each of `columns` equal slices. */
static void slice_sums(const int8_t *codes, size_t n, size_t columns, int32_t *sums) {
    for (size_t c = 0; c < columns; c++) {
        int32_t sum = 0;
        for (size_t i = n / columns * c; i < n / columns * (c + 1); i++) sum += codes[i];
        sums[c] = sum;
    }
}

static void pack_rows(const int8_t *even, const int8_t *odd, size_t n, int8_t *out) {
    for (size_t i = 0; i < n; i++) out[i] = (int8_t)((even[i] & 15) | ((uint8_t)odd[i] << 4));
}

#endif
