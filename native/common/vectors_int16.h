/* Vectors of int16, as wide as a float vector, and sums in 64-bit lanes: for products and sums that the 32-bit lanes of
 * vectors.h are too wide or too narrow for. */
#ifndef NPUQ_COMMON_VECTORS_INT16_H
#define NPUQ_COMMON_VECTORS_INT16_H

#include "common/vectors.h"

enum { PLANE_STEP = 2 * VW };

typedef int16_t vs __attribute__((vector_size(VW * 4)));

INLINE vs vs_load(const int16_t *p) {
    vs v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE vs vs_load_i8(const int8_t *p) {
#if defined(NPUQ_LEVEL_AVX512)
    return (vs)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(NPUQ_LEVEL_AVX2)
    return (vs)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#else
    typedef int8_t vb8 __attribute__((vector_size(8)));
    vb8 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vs);
#endif
}
INLINE vi vi_load_u8(const uint8_t *p) {
#if defined(NPUQ_LEVEL_AVX512)
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(NPUQ_LEVEL_AVX2)
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    typedef uint8_t vu4 __attribute__((vector_size(4)));
    vu4 v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vi);
#endif
}
INLINE vs vs_set(int value) { return (vs){0} + (int16_t)value; }

/* mulhi: (a · b) >> 16. dot: acc + a₀ · b₀ + a₁ · b₁ of neighbours. */
#if defined(NPUQ_LEVEL_AVX512)
INLINE vs vs_mulhi(vs a, vs b) { return (vs)_mm512_mulhi_epi16((__m512i)a, (__m512i)b); }
INLINE vs vs_min(vs a, vs b) { return (vs)_mm512_min_epi16((__m512i)a, (__m512i)b); }
INLINE vs vs_max(vs a, vs b) { return (vs)_mm512_max_epi16((__m512i)a, (__m512i)b); }
INLINE vi vs_dot(vi acc, vs a, vs b) { return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
INLINE void vs_narrow(int16_t *p, vi even, vi odd) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16((__m512i)even));
    _mm256_storeu_si256((__m256i *)(p + VW), _mm512_cvtepi32_epi16((__m512i)odd));
}
#elif defined(NPUQ_LEVEL_AVX2)
INLINE vs vs_mulhi(vs a, vs b) { return (vs)_mm256_mulhi_epi16((__m256i)a, (__m256i)b); }
INLINE vs vs_min(vs a, vs b) { return (vs)_mm256_min_epi16((__m256i)a, (__m256i)b); }
INLINE vs vs_max(vs a, vs b) { return (vs)_mm256_max_epi16((__m256i)a, (__m256i)b); }
INLINE vi vs_dot(vi acc, vs a, vs b) { return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
INLINE void vs_narrow(int16_t *p, vi first, vi second) {
    __m256i packed = _mm256_packs_epi32((__m256i)first, (__m256i)second); /* within 128-bit halves */
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}
#else
#if defined(NPUQ_LEVEL_NEON)
INLINE vs vs_mulhi(vs a, vs b) {
    int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    int32x4_t high = vmull_high_s16((int16x8_t)a, (int16x8_t)b);
    return (vs)vuzp2q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high));
}
INLINE vs vs_min(vs a, vs b) { return (vs)vminq_s16((int16x8_t)a, (int16x8_t)b); }
INLINE vs vs_max(vs a, vs b) { return (vs)vmaxq_s16((int16x8_t)a, (int16x8_t)b); }
INLINE vi vs_dot(vi acc, vs a, vs b) {
    int32x4_t sum = vmlal_s16((int32x4_t)acc, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    return (vi)vmlal_high_s16(sum, (int16x8_t)a, (int16x8_t)b);
}
#else
typedef int32_t vi_pair __attribute__((vector_size(32)));
INLINE vs vs_mulhi(vs a, vs b) {
    vi_pair product = __builtin_convertvector(a, vi_pair) * __builtin_convertvector(b, vi_pair);
    return __builtin_convertvector(product >> 16, vs);
}
INLINE vs vs_min(vs a, vs b) {
    vs mask = a < b;
    return (mask & a) | (~mask & b);
}
INLINE vs vs_max(vs a, vs b) {
    vs mask = a > b;
    return (mask & a) | (~mask & b);
}
INLINE vi vs_dot(vi acc, vs a, vs b) {
    vi_pair product = __builtin_convertvector(a, vi_pair) * __builtin_convertvector(b, vi_pair);
    vi low, high;
    memcpy(&low, &product, sizeof low);
    memcpy(&high, (char *)&product + sizeof low, sizeof high);
    return acc + low + high;
}
#endif
INLINE void vs_narrow(int16_t *p, vi first, vi second) {
    vi_store_u16((uint16_t *)p, first);
    vi_store_u16((uint16_t *)p + VW, second);
}
#endif

/* Two vectors as one of int16, in an order of the level's own; values must fit. */
INLINE vs vs_pack(vi a, vi b) {
#if defined(NPUQ_LEVEL_AVX512)
    return (vs)_mm512_packs_epi32((__m512i)a, (__m512i)b);
#elif defined(NPUQ_LEVEL_AVX2)
    return (vs)_mm256_packs_epi32((__m256i)a, (__m256i)b);
#elif defined(NPUQ_LEVEL_NEON)
    return (vs)vcombine_s16(vmovn_s32((int32x4_t)a), vmovn_s32((int32x4_t)b));
#else
    vs packed;
    vs_narrow((int16_t *)&packed, a, b);
    return packed;
#endif
}

/* Floats with the upper halves v and the lower halves 0; vs_pack of results from them restores v's order. */
INLINE void vs_upper_halves(vs v, vf out[2]) {
#if defined(NPUQ_LEVEL_AVX512)
    out[0] = (vf)_mm512_unpacklo_epi16(_mm512_setzero_si512(), (__m512i)v);
    out[1] = (vf)_mm512_unpackhi_epi16(_mm512_setzero_si512(), (__m512i)v);
#elif defined(NPUQ_LEVEL_AVX2)
    out[0] = (vf)_mm256_unpacklo_epi16(_mm256_setzero_si256(), (__m256i)v);
    out[1] = (vf)_mm256_unpackhi_epi16(_mm256_setzero_si256(), (__m256i)v);
#else
    uint16_t lane[PLANE_STEP];
    memcpy(lane, &v, sizeof lane);
    out[0] = vf_load_bf16(lane);
    out[1] = vf_load_bf16(lane + VW);
#endif
}

/* Two vectors as bytes; values must fit. */
INLINE void vs_store_i8x2(int8_t *p, vs a, vs b) {
#if defined(NPUQ_LEVEL_AVX512)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi16_epi8((__m512i)a));
    _mm256_storeu_si256((__m256i *)(p + PLANE_STEP), _mm512_cvtepi16_epi8((__m512i)b));
#elif defined(NPUQ_LEVEL_AVX2)
    const __m256i packed = _mm256_packs_epi16((__m256i)a, (__m256i)b); /* within 128-bit halves */
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
#else
    typedef int8_t vb8 __attribute__((vector_size(8)));
    const vb8 first = __builtin_convertvector(a, vb8), second = __builtin_convertvector(b, vb8);
    memcpy(p, &first, sizeof first);
    memcpy(p + PLANE_STEP, &second, sizeof second);
#endif
}

/* Sums in 64-bit lanes: of 32-bit lanes, and of their products; exact. */
#if defined(NPUQ_LEVEL_AVX512)
typedef __m512i vl;
INLINE vl vl_add(vl acc, vi v) {
    acc = _mm512_add_epi64(acc, _mm512_cvtepi32_epi64(_mm512_castsi512_si256((__m512i)v)));
    return _mm512_add_epi64(acc, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64((__m512i)v, 1)));
}
INLINE vl vl_dot(vl acc, vi a, vi b) {
    acc = _mm512_add_epi64(acc, _mm512_mul_epi32((__m512i)a, (__m512i)b));
    return _mm512_add_epi64(acc, _mm512_mul_epi32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32)));
}
INLINE int64_t vl_total(vl v) { /* squares may come to 2^63: unsigned */
    __m256i half = _mm256_add_epi64(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
    __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (int64_t)((uint64_t)_mm_cvtsi128_si64(sum) + (uint64_t)_mm_extract_epi64(sum, 1));
}
#elif defined(NPUQ_LEVEL_AVX2)
typedef __m256i vl;
INLINE vl vl_add(vl acc, vi v) {
    acc = _mm256_add_epi64(acc, _mm256_cvtepi32_epi64(_mm256_castsi256_si128((__m256i)v)));
    return _mm256_add_epi64(acc, _mm256_cvtepi32_epi64(_mm256_extracti128_si256((__m256i)v, 1)));
}
INLINE vl vl_dot(vl acc, vi a, vi b) {
    acc = _mm256_add_epi64(acc, _mm256_mul_epi32((__m256i)a, (__m256i)b));
    return _mm256_add_epi64(acc, _mm256_mul_epi32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32)));
}
INLINE int64_t vl_total(vl v) {
    __m128i sum = _mm_add_epi64(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    return (int64_t)((uint64_t)_mm_cvtsi128_si64(sum) + (uint64_t)_mm_extract_epi64(sum, 1));
}
#else
typedef int64_t vl __attribute__((vector_size(VW * 8)));
INLINE vl vl_add(vl acc, vi v) { return acc + __builtin_convertvector(v, vl); }
INLINE vl vl_dot(vl acc, vi a, vi b) { return acc + __builtin_convertvector(a, vl) * __builtin_convertvector(b, vl); }
INLINE int64_t vl_total(vl v) {
    uint64_t sum = 0;
    for (int i = 0; i < VW; i++) sum += (uint64_t)v[i];
    return (int64_t)sum;
}
#endif

/* vs_dot in lanes without a sign. The product is apart where the sum is the compiler's own:
 * that may not overflow. */
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
INLINE vu vu_dot(vu acc, vs a, vs b) {
#if defined(NPUQ_LEVEL_AVX512)
    return (vu)vs_dot((vi)acc, a, b);
#else
    return acc + (vu)vs_dot((vi){0}, a, b);
#endif
}

/* Of each 16 bits the sum of both bytes' squares; bytes of 0 to 127. */
INLINE vs vs_square_bytes(vs bytes) {
#if defined(NPUQ_LEVEL_AVX512)
    return (vs)_mm512_maddubs_epi16((__m512i)bytes, (__m512i)bytes);
#elif defined(NPUQ_LEVEL_AVX2)
    return (vs)_mm256_maddubs_epi16((__m256i)bytes, (__m256i)bytes);
#else
    const vs low = bytes & 255, high = bytes >> 8;
    return low * low + high * high;
#endif
}

/* Sums of 32-bit lanes without a sign, of any number of vectors. Where lanes can be taken in pairs, as 64 bits: of pairs,
 * which may overflow, and of their upper lanes, by which it is undone. */
struct lane_sums {
    vl all, upper;
};
INLINE void add_lanes(struct lane_sums *sums, vu v) {
#if defined(NPUQ_LEVEL_AVX512)
    sums->all = _mm512_add_epi64(sums->all, (__m512i)v);
    sums->upper = _mm512_add_epi64(sums->upper, _mm512_srli_epi64((__m512i)v, 32));
#elif defined(NPUQ_LEVEL_AVX2)
    sums->all = _mm256_add_epi64(sums->all, (__m256i)v);
    sums->upper = _mm256_add_epi64(sums->upper, _mm256_srli_epi64((__m256i)v, 32));
#else
    sums->all += __builtin_convertvector(v, vl);
#endif
}
INLINE struct lane_sums join_lanes(struct lane_sums a, struct lane_sums b) {
    typedef uint64_t vlu __attribute__((vector_size(sizeof(vl))));
    return (struct lane_sums){(vl)((vlu)a.all + (vlu)b.all), (vl)((vlu)a.upper + (vlu)b.upper)};
}
INLINE uint64_t total_lanes(const struct lane_sums *sums) {
    const uint64_t all = (uint64_t)vl_total(sums->all), upper = (uint64_t)vl_total(sums->upper);
    return all - (upper << 32) + upper;
}

/* Σ a · b and Σ v² in two sets of sums, of even and odd lanes. */
#if defined(NPUQ_LEVEL_AVX512)
INLINE void vl_products(vi a, vi b, vl *even, vl *odd) {
    *even = _mm512_add_epi64(*even, _mm512_mul_epi32((__m512i)a, (__m512i)b));
    *odd = _mm512_add_epi64(*odd, _mm512_mul_epi32(_mm512_srli_epi64((__m512i)a, 32), _mm512_srli_epi64((__m512i)b, 32)));
}
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    __m512i up = _mm512_srli_epi64((__m512i)v, 32);
    *even = _mm512_add_epi64(*even, _mm512_mul_epi32((__m512i)v, (__m512i)v));
    *odd = _mm512_add_epi64(*odd, _mm512_mul_epi32(up, up));
}
#elif defined(NPUQ_LEVEL_AVX2)
INLINE void vl_products(vi a, vi b, vl *even, vl *odd) {
    *even = _mm256_add_epi64(*even, _mm256_mul_epi32((__m256i)a, (__m256i)b));
    *odd = _mm256_add_epi64(*odd, _mm256_mul_epi32(_mm256_srli_epi64((__m256i)a, 32), _mm256_srli_epi64((__m256i)b, 32)));
}
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    __m256i up = _mm256_srli_epi64((__m256i)v, 32);
    *even = _mm256_add_epi64(*even, _mm256_mul_epi32((__m256i)v, (__m256i)v));
    *odd = _mm256_add_epi64(*odd, _mm256_mul_epi32(up, up));
}
#else
INLINE void vl_products(vi a, vi b, vl *even, vl *odd) {
    (void)odd;
    *even = vl_dot(*even, a, b);
}
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    (void)odd;
    *even = vl_dot(*even, v, v);
}
#endif

INLINE int64_t vi_total(vi v) { return vl_total(vl_add((vl){0}, v)); }

/* Bit i: whether lane i of a comparison is true. */
INLINE uint32_t vs_bits(vs mask) {
#if defined(NPUQ_LEVEL_AVX512)
    return (uint32_t)_mm512_movepi16_mask((__m512i)mask);
#elif defined(NPUQ_LEVEL_AVX2)
    __m128i low = _mm256_castsi256_si128((__m256i)mask), high = _mm256_extracti128_si256((__m256i)mask, 1);
    return (uint32_t)_mm_movemask_epi8(_mm_packs_epi16(low, high));
#else
    uint32_t bits = 0;
    for (int i = 0; i < PLANE_STEP; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

#endif
