/* FP8 (e4m3fn) to float32, exact. The pattern of NaN becomes ±480: callers look for it. */
#ifndef NPUQ_CONVERT_FP8_FP8_DECODE_H
#define NPUQ_CONVERT_FP8_FP8_DECODE_H

#include "common/vectors.h"

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

/* Two vectors of the same, divided by FP8_UNIT: for AVX2 half the work of one after the other. */
#if defined(NPUQ_LEVEL_AVX2)
#define FP8_UNIT 256.0f
INLINE void load_fp8_pair(const uint8_t *p, vf out[2]) {
    __m256i byte = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    __m256i sign = _mm256_slli_epi16(_mm256_and_si256(byte, _mm256_set1_epi16(0x80)), 8);
    __m256i rest = _mm256_slli_epi16(_mm256_and_si256(byte, _mm256_set1_epi16(0x7F)), 7);
    __m256i half = _mm256_or_si256(sign, rest);
    out[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    out[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
}
#else
#define FP8_UNIT 1.0f
INLINE void load_fp8_pair(const uint8_t *p, vf out[2]) {
    out[0] = vf_load_fp8(p);
    out[1] = vf_load_fp8(p + VW);
}
#endif

INLINE uint8_t largest_code_of(const uint8_t *x, size_t n) {
    uint8_t most = 0;
    size_t i = 0;
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
    __m256i sizes = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (; i + 32 <= n; i += 32) {
        __m256i x32 = _mm256_loadu_si256((const __m256i *)(x + i));
        sizes = _mm256_max_epu8(sizes, _mm256_and_si256(x32, _mm256_set1_epi8(127)));
    }
    __m128i half = _mm_max_epu8(_mm256_castsi256_si128(sizes), _mm256_extracti128_si256(sizes, 1));
    half = _mm_max_epu8(half, _mm_srli_epi16(half, 8));
    /* The least of 255 − x, of even bytes. */
    half = _mm_minpos_epu16(_mm_sub_epi16(_mm_set1_epi16(255), _mm_and_si128(half, _mm_set1_epi16(255))));
    most = (uint8_t)(255 - _mm_cvtsi128_si32(half));
#elif defined(NPUQ_LEVEL_NEON)
    for (; i + 16 <= n; i += 16) {
        uint8_t size = vmaxvq_u8(vandq_u8(vld1q_u8(x + i), vdupq_n_u8(127)));
        most = size > most ? size : most;
    }
#endif
    for (; i < n; i++) most = (x[i] & 127) > most ? x[i] & 127 : most;
    return most;
}

/* The code of the largest magnitude of n weights; the usual block without loops. */
INLINE uint8_t largest_code(const uint8_t *x, size_t n) {
    return n == 128 ? largest_code_of(x, 128) : largest_code_of(x, n);
}

/* The magnitudes by their codes, and zeros for what a vector reads behind them. */
enum { FP8_NAN = 127, FP8_NORMAL = 8 };
static const float fp8_magnitudes[FP8_NAN + 1 + 80] = {
#define EIGHT(unit) 8 * unit, 9 * unit, 10 * unit, 11 * unit, 12 * unit, 13 * unit, 14 * unit, 15 * unit
    0,                1 * 0x1p-9f,      2 * 0x1p-9f,      3 * 0x1p-9f,     4 * 0x1p-9f, 5 * 0x1p-9f,
    6 * 0x1p-9f,      7 * 0x1p-9f,      EIGHT(0x1p-9f),   EIGHT(0x1p-8f),  EIGHT(0x1p-7f), EIGHT(0x1p-6f),
    EIGHT(0x1p-5f),   EIGHT(0x1p-4f),   EIGHT(0x1p-3f),   EIGHT(0x1p-2f),  EIGHT(0x1p-1f), EIGHT(0x1p0f),
    EIGHT(0x1p1f),    EIGHT(0x1p2f),    EIGHT(0x1p3f),    EIGHT(0x1p4f),   8 * 0x1p5f, 9 * 0x1p5f,
    10 * 0x1p5f,      11 * 0x1p5f,      12 * 0x1p5f,      13 * 0x1p5f,     14 * 0x1p5f,
#undef EIGHT
};

#endif
