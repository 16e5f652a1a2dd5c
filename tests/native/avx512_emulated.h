/* The 512-bit intrinsics of the AVX-512 level by two 256-bit ones each, for machines without: included before level.c.
 *
 * They all work within 128 bits or on elements of their own, so that a half is what the 256-bit instruction makes of it;
 * those that change an element's width are C's conversions, and the mask and dpbusd, which has no narrower relative that
 * does not saturate, are loops after Intel's description. What the compiler makes of the level for AVX-512 is not
 * checked by this, only what the level says. */
#include <immintrin.h>
#include <stdint.h>

#define EMULATED static inline __attribute__((always_inline))

union emulated {
    __m512i i;
    __m512 f;
    __m256i half[2];
    __m256 half_f[2];
    int8_t i8[64];
    uint8_t u8[64];
    int16_t i16[32];
    int32_t i32[16];
};

#define EMULATE_TWO(name, kind, type, halves)                                                  \
    EMULATED type emulated_##name(type a, type b) {                                            \
        union emulated x = {.kind = a}, y = {.kind = b}, out;                                  \
        for (int h = 0; h < 2; h++) out.halves[h] = _mm256_##name(x.halves[h], y.halves[h]); \
        return out.kind;                                                                       \
    }
#define EMULATE_INTEGER(name) EMULATE_TWO(name, i, __m512i, half)
#define EMULATE_FLOAT(name) EMULATE_TWO(name, f, __m512, half_f)

EMULATE_INTEGER(add_epi32)
EMULATE_INTEGER(add_epi64)
EMULATE_INTEGER(maddubs_epi16)
EMULATE_INTEGER(max_epi16)
EMULATE_INTEGER(min_epi16)
EMULATE_INTEGER(mul_epi32)
EMULATE_INTEGER(mulhi_epi16)
EMULATE_INTEGER(packs_epi32)
EMULATE_INTEGER(sad_epu8)
EMULATE_INTEGER(unpackhi_epi16)
EMULATE_INTEGER(unpackhi_epi32)
EMULATE_INTEGER(unpackhi_epi64)
EMULATE_INTEGER(unpacklo_epi16)
EMULATE_INTEGER(unpacklo_epi32)
EMULATE_INTEGER(unpacklo_epi64)
EMULATE_FLOAT(max_ps)
EMULATE_FLOAT(min_ps)

#define EMULATE_SHIFT(name)                                                                  \
    EMULATED __m512i emulated_##name(__m512i a, unsigned count) {                            \
        union emulated x = {.i = a}, out;                                                    \
        for (int h = 0; h < 2; h++) out.half[h] = _mm256_##name(x.half[h], (int)count);      \
        return out.i;                                                                        \
    }
EMULATE_SHIFT(slli_epi32)
EMULATE_SHIFT(srli_epi16)
EMULATE_SHIFT(srli_epi64)

EMULATED __m512i emulated_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i emulated_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i emulated_setzero_si512(void) { return (__m512i){0}; }
EMULATED __m512i emulated_set1_epi8(char value) {
    union emulated out;
    out.half[0] = out.half[1] = _mm256_set1_epi8(value);
    return out.i;
}
EMULATED __m512i emulated_loadu_si512(const void *p) {
    union emulated out;
    __builtin_memcpy(&out, p, sizeof out);
    return out.i;
}
EMULATED void emulated_storeu_si512(void *p, __m512i a) { __builtin_memcpy(p, &a, sizeof a); }
EMULATED __m512 emulated_loadu_ps(const void *p) { return (__m512)emulated_loadu_si512(p); }
EMULATED void emulated_storeu_ps(void *p, __m512 a) { __builtin_memcpy(p, &a, sizeof a); }

EMULATED __m512 emulated_sqrt_ps(__m512 a) {
    union emulated x = {.f = a}, out;
    for (int h = 0; h < 2; h++) out.half_f[h] = _mm256_sqrt_ps(x.half_f[h]);
    return out.f;
}
EMULATED __m512 emulated_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    union emulated x = {.f = a}, y = {.f = b}, z = {.f = c}, out;
    for (int h = 0; h < 2; h++) out.half_f[h] = _mm256_fmadd_ps(x.half_f[h], y.half_f[h], z.half_f[h]);
    return out.f;
}
EMULATED __m512i emulated_dpwssd_epi32(__m512i acc, __m512i a, __m512i b) {
    union emulated sum = {.i = acc}, x = {.i = a}, y = {.i = b};
    for (int h = 0; h < 2; h++) sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_madd_epi16(x.half[h], y.half[h]));
    return sum.i;
}
EMULATED __m512i emulated_dpbusd_epi32(__m512i acc, __m512i a, __m512i b) {
    union emulated sum = {.i = acc}, x = {.i = a}, y = {.i = b};
    for (int k = 0; k < 64; k++) sum.i32[k / 4] = (int32_t)((uint32_t)sum.i32[k / 4] + (uint32_t)(x.u8[k] * y.i8[k]));
    return sum.i;
}

/* Both products of a pair are added one after the other: the instruction's own rounding is not imitated. */
EMULATED __m512 emulated_dpbf16_ps(__m512 acc, __m512i a, __m512i b) {
    union emulated sum = {.f = acc}, x = {.i = a}, y = {.i = b};
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    for (int h = 0; h < 2; h++) {
        __m256 odd = _mm256_castsi256_ps(_mm256_and_si256(x.half[h], upper));
        __m256 even = _mm256_castsi256_ps(_mm256_slli_epi32(x.half[h], 16));
        sum.half_f[h] = _mm256_fmadd_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(y.half[h], upper)), sum.half_f[h]);
        sum.half_f[h] = _mm256_fmadd_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(y.half[h], 16)), sum.half_f[h]);
    }
    return sum.f;
}

/* Parts and casts. */
EMULATED __m512i emulated_set1_epi32(int value) {
    union emulated out;
    out.half[0] = out.half[1] = _mm256_set1_epi32(value);
    return out.i;
}
EMULATED __m512i emulated_permutexvar_epi16(__m512i places, __m512i a) {
    union emulated from = {.i = a}, place = {.i = places}, out;
    for (int k = 0; k < 32; k++) out.i16[k] = from.i16[place.i16[k] & 31];
    return out.i;
}
EMULATED __m512i emulated_permutex2var_epi8(__m512i a, __m512i places, __m512i b) {
    union emulated from[2] = {{.i = a}, {.i = b}}, place = {.i = places}, out;
    for (int k = 0; k < 64; k++) out.u8[k] = from[place.u8[k] >> 6 & 1].u8[place.u8[k] & 63];
    return out.i;
}
EMULATED __m512i emulated_castsi256_si512(__m256i a) { return ((union emulated){.half = {a, a}}).i; }
EMULATED __m512i emulated_inserti64x4(__m512i a, __m256i b, int which) {
    union emulated out = {.i = a};
    out.half[which] = b;
    return out.i;
}
EMULATED __m256i emulated_castsi512_si256(__m512i a) { return ((union emulated){.i = a}).half[0]; }
EMULATED __m256 emulated_castps512_ps256(__m512 a) { return ((union emulated){.f = a}).half_f[0]; }
EMULATED __m512 emulated_castsi512_ps(__m512i a) { return (__m512)a; }
EMULATED __m256i emulated_extracti64x4_epi64(__m512i a, int which) { return ((union emulated){.i = a}).half[which]; }
EMULATED __m256 emulated_extractf32x8_ps(__m512 a, int which) { return ((union emulated){.f = a}).half_f[which]; }

/* Conversions: floats to integers by half, as the instruction rounds; others element by element. */
EMULATED __m512i emulated_cvtps_epi32(__m512 a) {
    union emulated x = {.f = a}, out;
    for (int h = 0; h < 2; h++) out.half[h] = _mm256_cvtps_epi32(x.half_f[h]);
    return out.i;
}
EMULATED __m512i emulated_cvttps_epi32(__m512 a) {
    union emulated x = {.f = a}, out;
    for (int h = 0; h < 2; h++) out.half[h] = _mm256_cvttps_epi32(x.half_f[h]);
    return out.i;
}
EMULATED __m512 emulated_cvtepi32_ps(__m512i a) {
    union emulated x = {.i = a}, out;
    for (int h = 0; h < 2; h++) out.half_f[h] = _mm256_cvtepi32_ps(x.half[h]);
    return out.f;
}
EMULATED __m512 emulated_cvtph_ps(__m256i a) {
    union emulated out;
    out.half_f[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
    out.half_f[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    return out.f;
}
#define EMULATE_CONVERSION(name, in, from, out, to, count)            \
    EMULATED out emulated_##name(in a) {                              \
        typedef from source __attribute__((vector_size(sizeof(in)))); \
        typedef to target __attribute__((vector_size(sizeof(out))));  \
        source all = (source)a;                                       \
        target made;                                                  \
        for (int k = 0; k < count; k++) made[k] = (to)all[k];         \
        return (out)made;                                             \
    }
EMULATE_CONVERSION(cvtepi8_epi16, __m256i, int8_t, __m512i, int16_t, 32)
EMULATE_CONVERSION(cvtepi8_epi32, __m128i, int8_t, __m512i, int32_t, 16)
EMULATE_CONVERSION(cvtepu8_epi32, __m128i, uint8_t, __m512i, int32_t, 16)
EMULATE_CONVERSION(cvtepu16_epi32, __m256i, uint16_t, __m512i, int32_t, 16)
EMULATE_CONVERSION(cvtepi32_epi64, __m256i, int32_t, __m512i, int64_t, 8)
EMULATE_CONVERSION(cvtepi32_epi16, __m512i, int32_t, __m256i, int16_t, 16)
EMULATE_CONVERSION(cvtepi32_epi8, __m512i, int32_t, __m128i, int8_t, 16)
EMULATE_CONVERSION(cvtepi16_epi8, __m512i, int16_t, __m256i, int8_t, 32)

EMULATED __mmask32 emulated_movepi16_mask(__m512i a) {
    union emulated x = {.i = a};
    __mmask32 mask = 0;
    for (int k = 0; k < 32; k++) mask |= (__mmask32)(x.i16[k] < 0) << k;
    return mask;
}

#define _mm512_castsi256_si512 emulated_castsi256_si512
#define _mm512_dpbf16_ps(sum, a, b) emulated_dpbf16_ps(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_inserti64x4 emulated_inserti64x4
#define _mm512_permutex2var_epi8 emulated_permutex2var_epi8
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_epi64 emulated_add_epi64
#define _mm512_and_si512 emulated_and_si512
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_castsi512_si256 emulated_castsi512_si256
#define _mm512_cvtepi16_epi8 emulated_cvtepi16_epi8
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_cvtepi32_epi64 emulated_cvtepi32_epi64
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_cvtepi8_epi16 emulated_cvtepi8_epi16
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated_cvtepu8_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvttps_epi32 emulated_cvttps_epi32
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_extracti64x4_epi64 emulated_extracti64x4_epi64
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_max_epi16 emulated_max_epi16
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_epi16 emulated_min_epi16
#define _mm512_min_ps emulated_min_ps
#define _mm512_movepi16_mask emulated_movepi16_mask
#define _mm512_mul_epi32 emulated_mul_epi32
#define _mm512_mulhi_epi16 emulated_mulhi_epi16
#define _mm512_packs_epi32 emulated_packs_epi32
#define _mm512_sad_epu8 emulated_sad_epu8
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_setzero_si512 emulated_setzero_si512
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_sqrt_ps emulated_sqrt_ps
#define _mm512_srli_epi16 emulated_srli_epi16
#define _mm512_srli_epi64 emulated_srli_epi64
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_unpackhi_epi16 emulated_unpackhi_epi16
#define _mm512_unpackhi_epi32 emulated_unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated_unpackhi_epi64
#define _mm512_unpacklo_epi16 emulated_unpacklo_epi16
#define _mm512_unpacklo_epi32 emulated_unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated_unpacklo_epi64
#define _mm512_xor_si512 emulated_xor_si512
