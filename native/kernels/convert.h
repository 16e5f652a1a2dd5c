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

static void decode_fp8(const uint8_t *x, size_t n, const float *block_scale, size_t block, float *out) {
    uint8_t nan = 0;
    for (size_t i = 0; i < n; i++) nan |= (x[i] & 0x7F) == 0x7F;
    for (size_t first = 0; first < n; first += block) {
        size_t end = first + block < n ? first + block : n, i = first;
        float scale = block_scale[first / block];
        for (; i + VW <= end; i += VW) vf_store(out + i, vf_load_fp8(x + i) * scale);
        if (i < end) {
            uint8_t lane[16] = {0};
            memcpy(lane, x + i, end - i);
            vf_store_part(out + i, vf_load_fp8(lane) * scale, end - i);
        }
    }
    if (nan) out[0] = NAN; /* the row is refused: which element it was does not matter */
}

static void decode_row(const void *x, int dtype, size_t n, const float *block_scale, size_t block, float *out) {
    if (dtype == NPUQ_F8E4M3) decode_fp8(x, n, block_scale, block, out);
    else to_float(x, dtype, n, out);
}

/* Codes round-half-even(w · inverse) between −bound and bound − 1. */
static void round_codes(const float *w, size_t n, float inverse, int bound, int8_t *codes) {
    vf low = vf_set((float)-bound), high = vf_set((float)(bound - 1));
    size_t i = 0;
    for (; i + VW <= n; i += VW) {
        vi_store_i8(codes + i, vf_round(vf_min(vf_max(vf_load(w + i) * inverse, low), high)));
    }
    if (i < n) {
        int8_t lane[VW];
        vi_store_i8(lane, vf_round(vf_min(vf_max(vf_load_part(w + i, n - i) * inverse, low), high)));
        memcpy(codes + i, lane, n - i);
    }
}

/* Bytes of scratch that a row of n needs. */
static size_t convert_scratch(size_t n) {
    size_t padded = (n + 63) / 64 * 64;
    return sizeof(struct optimal_scratch) + (2 * ((11u << 10) + 8)) * sizeof(uint64_t) + padded * 12 + 64;
}

/* Lays the search's arrays out in `memory`, zeroed before the first row. */
struct convert_memory {
    struct optimal_scratch *search;
    int32_t *fixed;
    float *magnitude;
};

static struct convert_memory convert_layout(void *memory, size_t n) {
    size_t padded = (n + 63) / 64 * 64;
    struct optimal_scratch *search = memory;
    search->bins = (uint64_t *)(search + 1);
    int32_t *fixed = (int32_t *)(search->bins + 2 * ((11u << 10) + 8));
    float *magnitude = (float *)(fixed + padded);
    search->index = (uint32_t *)(magnitude + padded);
    return (struct convert_memory){search, fixed, magnitude};
}

static void to_fixed(const float *w, size_t n, float unit, int32_t *fixed, float *magnitude) {
    size_t padded = (n + VW - 1) / VW * VW;
    for (size_t i = 0; i < padded; i += VW) {
        vf v = i + VW <= n ? vf_load(w + i) : vf_load_part(w + i, n - i);
        vi whole = vf_round(v * unit);
        memcpy(fixed + i, &whole, sizeof whole);
        vf_store(magnitude + i, vf_abs(vi_float(whole)));
    }
}

static int convert_row(const float *w, size_t n, int bits, int mse, void *memory, struct converted *out) {
    int bound = 1 << (bits - 1), exponent;
    float largest = largest_finite(w, n);
    if (largest != largest) return NPUQ_NOT_FINITE;
    if (largest < 0x1p-100f) {
        memset(out->codes, 0, n);
        out->scale = 1;
        out->error = out->norm = 0;
        return NPUQ_OK;
    }
    struct convert_memory layout = convert_layout(memory, n);
    int32_t *fixed = layout.fixed;
    (void)frexpf(largest, &exponent);
    to_fixed(w, n, ldexpf(1, FIXED_BITS - exponent), fixed, layout.magnitude);
    uint64_t squares = 0;
    for (size_t i = 0; i < n; i++) squares += (uint64_t)((int64_t)fixed[i] * fixed[i]);
    double norm = (double)(int64_t)squares;
    out->scale = largest / (float)(bound - 1);
    if (mse) {
        struct optimal_row row = {fixed, layout.magnitude, n, bound, norm};
        struct exact_state best;
        float top = rintf(ldexpf(largest, FIXED_BITS - exponent));
        if (optimal_state(&row, top, layout.search, &best) != NPUQ_OK) return NPUQ_NO_MEMORY;
        out->scale = (float)ldexp((double)best.a / (double)(best.b > 0 ? best.b : 1), exponent - FIXED_BITS);
    }
    round_codes(w, n, 1.0f / out->scale, bound, out->codes);
    int64_t a = 0, b = 0;
    for (size_t i = 0; i < n; i++) a += (int64_t)fixed[i] * out->codes[i];
    for (size_t i = 0; i < n; i++) b += out->codes[i] * out->codes[i];
    double sigma = ldexp((double)out->scale, FIXED_BITS - exponent);
    double error = norm - 2 * sigma * (double)a + sigma * sigma * (double)b;
    out->error = ldexp(error > 0 ? error : 0, 2 * (exponent - FIXED_BITS));
    out->norm = ldexp(norm, 2 * (exponent - FIXED_BITS));
    return NPUQ_OK;
}

static void convert_release(void *memory) { free(((struct optimal_scratch *)memory)->breakpoints); }

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
