/* FP8 (e4m3fn) to float32, exact. A NaN's pattern comes out as ±480: who decodes looks for it. */
#ifndef NPUQ_KERNELS_FP8_H
#define NPUQ_KERNELS_FP8_H

#include "simd.h"

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
