/* A float vector of the level's width, and the few operations the kernels need on it. Operators + - * / are the
 * compiler's own (GNU vector extensions); operations that differ between instruction sets have a function here.
 *
 * The width follows NPUQ_LEVEL_AVX512, _AVX2 or _NEON: 4 floats of GNU vectors without any of them. */
#ifndef NPUQ_COMMON_VECTORS_H
#define NPUQ_COMMON_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "common/dtypes.h"
#include "npuq.h"

#define INLINE static inline __attribute__((always_inline))

/* Repeats the statements with the constant `t` from 0 to tokens − 1; `tokens` is a constant once inlined. Written out,
 * because an array that a loop indexes stays in memory: compilers unroll the loop too late to give it registers. */
#define EACH_TOKEN(tokens, ...)              \
    do {                                     \
        REPEAT(tokens, 0, __VA_ARGS__)       \
        REPEAT(tokens, 1, __VA_ARGS__)       \
        REPEAT(tokens, 2, __VA_ARGS__)       \
        REPEAT(tokens, 3, __VA_ARGS__)       \
        REPEAT(tokens, 4, __VA_ARGS__)       \
        REPEAT(tokens, 5, __VA_ARGS__)       \
        REPEAT(tokens, 6, __VA_ARGS__)       \
        REPEAT(tokens, 7, __VA_ARGS__)       \
    } while (0)
#define REPEAT(tokens, number, ...) \
    if (tokens > number) {          \
        enum { t = number };        \
        __VA_ARGS__                 \
    }
enum { MOST_TOKENS = 8 };

#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
#include <immintrin.h>
#elif defined(NPUQ_LEVEL_NEON)
#include <arm_neon.h>
#endif

#if defined(NPUQ_LEVEL_AVX512)
enum { VW = 16 };
typedef __m512 vf;
typedef int32_t vi __attribute__((vector_size(64)));
INLINE vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm512_storeu_ps(p, v); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf vf_sqrt(vf a) { return _mm512_sqrt_ps(a); }
INLINE vi vf_round(vf a) { return (vi)_mm512_cvtps_epi32(a); } /* to nearest, ties to even */
INLINE vi vf_truncate(vf a) { return (vi)_mm512_cvttps_epi32(a); }
INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps((__m512i)a); }
INLINE vf vf_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf vf_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE void vi_store_u16(uint16_t *p, vi v) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)v)); }
INLINE void vi_store_i8(int8_t *p, vi v) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v)); }
INLINE void vi_store_i8x4(int8_t *p, vi a, vi b, vi c, vi d) {
    vi_store_i8(p, a);
    vi_store_i8(p + VW, b);
    vi_store_i8(p + 2 * VW, c);
    vi_store_i8(p + 3 * VW, d);
}
INLINE vi vi_load(const int32_t *p) { return (vi)_mm512_loadu_si512(p); }
INLINE vf vf_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

#elif defined(NPUQ_LEVEL_AVX2)
enum { VW = 8 };
typedef __m256 vf;
typedef int32_t vi __attribute__((vector_size(32)));
INLINE vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
INLINE void vf_store(float *p, vf v) { _mm256_storeu_ps(p, v); }
INLINE vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_sqrt(vf a) { return _mm256_sqrt_ps(a); }
INLINE vi vf_round(vf a) { return (vi)_mm256_cvtps_epi32(a); }
INLINE vi vf_truncate(vf a) { return (vi)_mm256_cvttps_epi32(a); }
INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps((__m256i)a); }
/* One shuffle: widening and shifting would be two, on the units that products and sums also want. */
INLINE vf vf_load_bf16(const uint16_t *p) {
    const __m256i places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                                            10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, places));
}
INLINE vf vf_load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE void vi_store_u16(uint16_t *p, vi v) {
    __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v); /* within 128-bit halves */
    packed = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(packed));
}
INLINE void vi_store_i8(int8_t *p, vi v) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
    _mm_storel_epi64((__m128i *)p, _mm_packs_epi16(words, words));
}
/* Four vectors of numbers that fit int8, one after the other. */
INLINE void vi_store_i8x4(int8_t *p, vi a, vi b, vi c, vi d) {
    __m256i first = _mm256_packs_epi32((__m256i)a, (__m256i)b), second = _mm256_packs_epi32((__m256i)c, (__m256i)d);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); /* packs work within 128-bit halves */
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(first, second), order));
}
INLINE vi vi_load(const int32_t *p) { return (vi)_mm256_loadu_si256((const __m256i *)p); }
INLINE vf vf_load_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

#else
enum { VW = 4 };
#if defined(NPUQ_LEVEL_NEON)
typedef float32x4_t vf;
#else
typedef float vf __attribute__((vector_size(16)));
#endif
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(8)));
typedef int8_t vb __attribute__((vector_size(4)));
INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vi vi_load(const int32_t *p) {
    vi v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void vi_store_u16(uint16_t *p, vi v) {
    vh half = __builtin_convertvector(v, vh);
    memcpy(p, &half, sizeof half);
}
INLINE void vi_store_i8(int8_t *p, vi v) {
    vb bytes = __builtin_convertvector(v, vb);
    memcpy(p, &bytes, sizeof bytes);
}
INLINE vf vf_load_i8(const int8_t *p) {
    vb bytes;
    memcpy(&bytes, p, sizeof bytes);
    return __builtin_convertvector(bytes, vf);
}
INLINE void vi_store_i8x4(int8_t *p, vi a, vi b, vi c, vi d) {
    vi_store_i8(p, a);
    vi_store_i8(p + VW, b);
    vi_store_i8(p + 2 * VW, c);
    vi_store_i8(p + 3 * VW, d);
}
INLINE vf vf_load_bf16(const uint16_t *p) {
    vh half;
    memcpy(&half, p, sizeof half);
    typedef uint32_t vu __attribute__((vector_size(16)));
    vu wide = __builtin_convertvector(half, vu) << 16;
    return (vf)wide;
}
#if defined(NPUQ_LEVEL_NEON)
INLINE vf vf_fma(vf a, vf b, vf c) { return vfmaq_f32(c, a, b); }
INLINE vf vf_max(vf a, vf b) { return vmaxq_f32(a, b); }
INLINE vf vf_min(vf a, vf b) { return vminq_f32(a, b); }
INLINE vf vf_sqrt(vf a) { return vsqrtq_f32(a); }
INLINE vi vf_round(vf a) { return (vi)vcvtnq_s32_f32(a); }
INLINE vi vf_truncate(vf a) { return (vi)vcvtq_s32_f32(a); }
INLINE vf vi_float(vi a) { return vcvtq_f32_s32((int32x4_t)a); }
INLINE vf vf_load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
INLINE vf vf_pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
INLINE vf vf_max(vf a, vf b) { return vf_pick(a > b, a, b); }
INLINE vf vf_min(vf a, vf b) { return vf_pick(a < b, a, b); }
INLINE vf vf_sqrt(vf a) { return (vf){sqrtf(a[0]), sqrtf(a[1]), sqrtf(a[2]), sqrtf(a[3])}; }
INLINE vi vf_truncate(vf a) { return __builtin_convertvector(a, vi); }
INLINE vf vi_float(vi a) { return __builtin_convertvector(a, vf); }
INLINE vi vf_round(vf a) {
    return (vi){(int32_t)lrintf(a[0]), (int32_t)lrintf(a[1]), (int32_t)lrintf(a[2]), (int32_t)lrintf(a[3])};
}
INLINE float f16_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3FF;
    float value;
    if (exponent == 0) {
        value = (float)mantissa * 0x1p-24f;
    } else {
        uint32_t bits = (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | mantissa << 13;
        memcpy(&value, &bits, sizeof value);
    }
    return sign ? -value : value;
}
INLINE vf vf_load_f16(const uint16_t *p) {
    return (vf){f16_to_float(p[0]), f16_to_float(p[1]), f16_to_float(p[2]), f16_to_float(p[3])};
}
#endif
#endif

/* vf_fma(a, b, sum), where the sum stays in its register: GCC 12 puts it into a factor's and copies it back, which in a
 * loop with as many sums as there are registers for sends some to memory. */
INLINE vf vf_add_product(vf sum, vf a, vf b) {
#if defined(NPUQ_LEVEL_AVX2)
    __asm__("vfmadd231ps\t%2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
    return sum;
#else
    return vf_fma(a, b, sum);
#endif
}

/* Minus zero is nothing; plus zero would be an addition, since −0 + 0 is not −0. */
INLINE vf vf_set(float a) { return a - (vf){0}; }
INLINE vf vf_abs(vf a) { return (vf)((vi)a & 0x7FFFFFFF); }
INLINE vf vf_sign_of(vf a) { return (vf)((vi)a & (int32_t)0x80000000); }

/* Lane sums in one fixed tree, so that a result does not depend on the compiler: halves are added until one is left. */
INLINE float vf_sum(vf v) {
    float lane[VW];
    vf_store(lane, v);
    for (int width = VW / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    }
    return lane[0];
}

/* The same sums of four vectors. */
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
INLINE __m128 vf_quarter(vf v) {
#if defined(NPUQ_LEVEL_AVX512)
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    __m256 half = v;
#endif
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
INLINE void vf_sum4(vf a, vf b, vf c, vf d, float out[4]) {
    __m128 p = vf_quarter(a), q = vf_quarter(b), r = vf_quarter(c), s = vf_quarter(d);
    __m128 left = _mm_add_ps(_mm_movelh_ps(p, q), _mm_movehl_ps(q, p));
    __m128 right = _mm_add_ps(_mm_movelh_ps(r, s), _mm_movehl_ps(s, r));
    _mm_storeu_ps(out, _mm_add_ps(_mm_shuffle_ps(left, right, 0x88), _mm_shuffle_ps(left, right, 0xDD)));
}
#else
INLINE void vf_sum4(vf a, vf b, vf c, vf d, float out[4]) {
    const vf each[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) out[i] = vf_sum(each[i]);
}
#endif

INLINE float vf_largest(vf v) {
    float lane[VW], largest;
    vf_store(lane, v);
    largest = lane[0];
    for (int i = 1; i < VW; i++) largest = lane[i] > largest ? lane[i] : largest;
    return largest;
}

/* Round to nearest even; a NaN stays one (adding could carry it into an infinity). */
INLINE vi vf_to_bf16(vf v) {
    typedef uint32_t vu __attribute__((vector_size(VW * 4)));
    vu bits = (vu)v;
    vu rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    vi nan = (vi)(v != v);
    return (vi)(((vu)nan & ((bits >> 16) | 0x40)) | (~(vu)nan & rounded));
}

INLINE vf vf_round_bf16(vf v) { return (vf)(vf_to_bf16(v) << 16); }

/* The first n < VW floats of a row, zeros after them: the last step of every row. */
INLINE vf vf_load_part(const float *p, size_t n) {
    float lane[VW] = {0};
    memcpy(lane, p, n * sizeof *p);
    return vf_load(lane);
}

INLINE void vf_store_part(float *p, vf v, size_t n) {
    float lane[VW];
    vf_store(lane, v);
    memcpy(p, lane, n * sizeof *p);
}

/* exp to about 2 ulp: 2^n times a polynomial on |r| <= ln(2) / 2 (Cephes' coefficients). Saturates; NaN gives a number. */
INLINE vf vf_exp(vf x) {
    x = vf_min(vf_max(x, vf_set(-87.3f)), vf_set(88.3f));
    vi n = vf_round(x * 1.44269504f);
    vf whole = vi_float(n);
    vf r = vf_fma(whole, vf_set(-0.693359375f), x);
    r = vf_fma(whole, vf_set(2.12194440e-4f), r);
    vf p = vf_set(1.9875691500e-4f);
    p = vf_fma(p, r, vf_set(1.3981999507e-3f));
    p = vf_fma(p, r, vf_set(8.3334519073e-3f));
    p = vf_fma(p, r, vf_set(4.1665795894e-2f));
    p = vf_fma(p, r, vf_set(1.6666665459e-1f));
    p = vf_fma(p, r, vf_set(5.0000001201e-1f));
    p = vf_fma(p, r * r, r + 1.0f);
    return p * (vf)((n + 127) << 23);
}

/* One vector of a float or int8 array stored as `dtype`; constant-folded where dtype is a constant. */
INLINE vf vf_load_as(const void *p, int dtype, size_t index) {
    if (dtype == NPUQ_I8) return vf_load_i8((const int8_t *)p + index);
    if (dtype == NPUQ_BF16) return vf_load_bf16((const uint16_t *)p + index);
    if (dtype == NPUQ_F16) return vf_load_f16((const uint16_t *)p + index);
    return vf_load((const float *)p + index);
}

/* The same in a loop that has no register to spare, where the places of bf16's shuffle come from memory. */
INLINE vf vf_load_crowded(const void *p, int dtype, size_t index) {
#if defined(NPUQ_LEVEL_AVX2)
    if (dtype == NPUQ_BF16) {
        static const int8_t places[32] __attribute__((aligned(32))) = {
            -1, -1, 0, 1, -1, -1, 2,  3,  -1, -1, 4,  5,  -1, -1, 6,  7,
            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};
        vf wide;
        __asm__("vbroadcasti128\t%1, %0\n\tvpshufb\t%2, %0, %0"
                : "=&x"(wide)
                : "m"(*(const __m128i_u *)((const uint16_t *)p + index)), "m"(*(const __m256i *)places));
        return wide;
    }
#endif
    return vf_load_as(p, dtype, index);
}

INLINE vf vf_load_part_as(const void *p, int dtype, size_t index, size_t n) {
    if (dtype == NPUQ_F32) return vf_load_part((const float *)p + index, n);
    uint16_t lane[VW] = {0};
    memcpy(lane, (const uint16_t *)p + index, n * sizeof *lane);
    return dtype == NPUQ_BF16 ? vf_load_bf16(lane) : vf_load_f16(lane);
}

INLINE void vf_store_as(vf v, void *p, int dtype, size_t index) {
    if (dtype == NPUQ_BF16) vi_store_u16((uint16_t *)p + index, vf_to_bf16(v));
    else vf_store((float *)p + index, v);
}

INLINE void vf_store_part_as(vf v, void *p, int dtype, size_t index, size_t n) {
    if (dtype == NPUQ_F32) {
        vf_store_part((float *)p + index, v, n);
        return;
    }
    uint16_t lane[VW];
    vi_store_u16(lane, vf_to_bf16(v));
    memcpy((uint16_t *)p + index, lane, n * sizeof *lane);
}

#endif
