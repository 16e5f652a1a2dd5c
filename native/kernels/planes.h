/* A row of 24-bit magnitudes as a plane of int16 and one of int8, fixed = 256 · high + low, so that the state of any scale
 * costs less than an instruction a weight. Codes are rounded from `high` alone: which side of a threshold a weight is on
 * is certain up to PLANE_DOUBT of its magnitude; the sums A and B of the codes so found are exact.
 *
 * A weight within PLANE_DOUBT of 2^23 would need a `high` of 2^15: it has 2^15 − 1, and what is missing is in `excess`.
 * It is up to twice as far off, but so are all of its thresholds except the first, which lies above every half scale
 * that is looked at. */
#ifndef NPUQ_KERNELS_PLANES_H
#define NPUQ_KERNELS_PLANES_H

#include "simd.h"

enum { PLANE_SHIFT = 8, PLANE_DOUBT = 1 << (PLANE_SHIFT - 1), PLANE_STEP = 2 * VW, PLANE_PART = 8192 };

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

/* Σ v² in two sets of sums, of even and odd lanes; and acc + v² of lanes below 2^8. */
#if defined(NPUQ_LEVEL_AVX512)
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    __m512i up = _mm512_srli_epi64((__m512i)v, 32);
    *even = _mm512_add_epi64(*even, _mm512_mul_epi32((__m512i)v, (__m512i)v));
    *odd = _mm512_add_epi64(*odd, _mm512_mul_epi32(up, up));
}
INLINE vi vi_square_bytes(vi acc, vi v) {
    v &= 0xFFFF; /* the sign's upper half would be squared too */
    return (vi)_mm512_add_epi32((__m512i)acc, _mm512_madd_epi16((__m512i)v, (__m512i)v));
}
#elif defined(NPUQ_LEVEL_AVX2)
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    __m256i up = _mm256_srli_epi64((__m256i)v, 32);
    *even = _mm256_add_epi64(*even, _mm256_mul_epi32((__m256i)v, (__m256i)v));
    *odd = _mm256_add_epi64(*odd, _mm256_mul_epi32(up, up));
}
INLINE vi vi_square_bytes(vi acc, vi v) {
    v &= 0xFFFF;
    return (vi)_mm256_add_epi32((__m256i)acc, _mm256_madd_epi16((__m256i)v, (__m256i)v));
}
#else
INLINE void vl_squares(vi v, vl *even, vl *odd) {
    (void)odd;
    *even = vl_dot(*even, v, v);
}
INLINE vi vi_square_bytes(vi acc, vi v) { return acc + v * v; }
#endif

INLINE int64_t vi_total(vi v) { return vl_total(vl_add((vl){0}, v)); }

/* Bit i: whether lane i of a comparison is true. */
INLINE uint32_t vi_bits(vi mask) {
#if defined(NPUQ_LEVEL_AVX512)
    return (uint32_t)_mm512_movepi32_mask((__m512i)mask);
#elif defined(NPUQ_LEVEL_AVX2)
    return (uint32_t)_mm256_movemask_ps((__m256)mask);
#else
    uint32_t bits = 0;
    for (int i = 0; i < VW; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}
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

enum { MOST_HIGH = 32767 };

/* Zero-padded to a multiple of 64. */
struct planes {
    int16_t *high;
    int8_t *low;
    size_t n;
    int64_t excess; /* Σ fixed − (256 · high + low), over weights whose `high` is MOST_HIGH */
};

/* How codes are rounded at a half scale: (high · inverse / 2^16 + 2^(shift − 1)) / 2^shift. */
struct rounding {
    int inverse, shift;
};

/* The state at half scale h: A = Σ |w|·q and B = Σ q² of the whole row, for codes q that were found at h. */
struct mark {
    double h, score; /* A² / B */
    int64_t a, b;
    struct rounding rounding;
    int rough; /* A is an upper bound */
};

enum { PLANE_LEAST = 32 << PLANE_SHIFT };

/* The rounding at half scale h or very little beside it, where it is stored; PLANE_LEAST ≤ h ≤ 2^23. */
INLINE struct rounding rounding_at(double *h) {
    /* high · inverse / 2^16 is below 2^14, of which `shift` bits are fraction: |high| ≥ (2m − 1) · h / 256 gives m. */
    uint64_t bits;
    memcpy(&bits, h, sizeof bits);
    int shift = (int)(bits >> 52) - 1023 - PLANE_SHIFT;
    if (shift > 13) shift = 13;
    double unit = (double)(1ull << (15 + PLANE_SHIFT + shift));
    int inverse = (int)(unit / *h);
    if (inverse > 32767) inverse = 32767;
    *h = unit / inverse;
    return (struct rounding){inverse, shift};
}

/* A rounding spread over vectors. */
struct factors {
    vs inverse, half;
    int shift;
};

INLINE struct factors factors_of(struct rounding rounding) {
    return (struct factors){vs_set(rounding.inverse), vs_set(1 << (rounding.shift - 1)), rounding.shift};
}

INLINE vs plane_codes(vs high, struct factors by) {
    return vs_max(vs_min((vs_mulhi(high, by.inverse) + by.half) >> by.shift, vs_set(7)), vs_set(-8));
}

/* The same of one weight. */
INLINE int code_at(int high, struct rounding rounding) {
    int code = (((high * rounding.inverse) >> 16) + (1 << (rounding.shift - 1))) >> rounding.shift;
    return code < -8 ? -8 : code > 7 ? 7 : code;
}

struct plane_sums {
    vi high, low, squares;
};

INLINE void plane_add(const struct planes *row, size_t i, struct factors by, int exact, struct plane_sums *sums) {
    vs w = vs_load(row->high + i), q = plane_codes(w, by);
    sums->high = vs_dot(sums->high, w, q);
    if (exact) sums->low = vs_dot(sums->low, vs_load_i8(row->low + i), q);
    sums->squares = vs_dot(sums->squares, q, q);
}

/* Evaluates a mark whose half scale and rounding are given: exactly for its codes, or without the lower plane, with an
 * upper bound of A. */
INLINE void evaluate_as(const struct planes *row, struct mark *mark, const int exact) {
    const struct factors by = factors_of(mark->rounding);
    int64_t a = row->excess * code_at(MOST_HIGH, mark->rounding), b = 0;
    for (size_t part = 0; part < row->n; part += PLANE_PART) { /* 32-bit sums hold that many */
        size_t end = part + PLANE_PART < row->n ? part + PLANE_PART : row->n;
        struct plane_sums even = {{0}, {0}, {0}}, odd = even; /* two sets: additions wait for each other */
        for (size_t i = part; i < end; i += 2 * PLANE_STEP) {
            plane_add(row, i, by, exact, &even);
            plane_add(row, i + PLANE_STEP, by, exact, &odd);
        }
        a += vi_total(even.high + odd.high) * (1 << PLANE_SHIFT);
        if (exact) a += vi_total(even.low + odd.low);
        b += vi_total(even.squares + odd.squares);
    }
    /* |low| ≤ 128, and Σ |q| ≤ √(n · Σ q²). */
    if (!exact) a += (int64_t)(PLANE_DOUBT * sqrt((double)row->n * (double)b)) + 1;
    mark->a = a;
    mark->b = b;
    mark->rough = !exact;
    mark->score = b > 0 ? (double)a * (double)a / (double)b : 0;
}

static void evaluate(const struct planes *row, struct mark *mark) { evaluate_as(row, mark, 1); }

static void evaluate_roughly(const struct planes *row, struct mark *mark) { evaluate_as(row, mark, 0); }

enum { ROUGH_SHIFT = 5, ROUGH_PART = 256 }; /* 2^8 sums of two squares of 2^10 fit 32 bits */

INLINE double rough_squares(int64_t sum) { return ldexp((double)sum, 2 * (ROUGH_SHIFT + PLANE_SHIFT)); }

/* A lower bound of the error that clipping alone makes at half scale h and at all smaller ones. */
static double clipped_norm(const struct planes *row, double h) {
    /* |w| ≥ 256 · |high| − 128 */
    double scale = 2 * h / (1 << PLANE_SHIFT);
    const int top = (int)fmin(7 * scale + 2, 32767), bottom = -(int)fmin(8 * scale + 2, 32767);
    int64_t total = 0;
    for (size_t part = 0; part < row->n; part += ROUGH_PART * PLANE_STEP) {
        size_t end = part + ROUGH_PART * PLANE_STEP < row->n ? part + ROUGH_PART * PLANE_STEP : row->n;
        vi sum = {0};
        for (size_t i = part; i < end; i += PLANE_STEP) {
            vs w = vs_load(row->high + i);
            vs excess = (vs_max(w, vs_set(top)) - vs_set(top)) + (vs_set(bottom) - vs_min(w, vs_set(bottom)));
            excess >>= ROUGH_SHIFT;
            sum = vs_dot(sum, excess, excess);
        }
        total += vi_total(sum);
    }
    return rough_squares(total);
}

/* A lower bound of Σ w² of the weights below half scale h, which are zeros there and at all larger scales. */
static double zeroed_norm(const struct planes *row, double h) {
    const vs limit = vs_set((int)fmax(0, fmin(h / (1 << PLANE_SHIFT) - 1, 32766)));
    int64_t total = 0;
    for (size_t part = 0; part < row->n; part += ROUGH_PART * PLANE_STEP) {
        size_t end = part + ROUGH_PART * PLANE_STEP < row->n ? part + ROUGH_PART * PLANE_STEP : row->n;
        vi sum = {0};
        for (size_t i = part; i < end; i += PLANE_STEP) {
            vs w = vs_max(vs_load(row->high + i), vs_set(-32767)), size = vs_max(w, -w);
            vs least = vs_max(size - vs_set(1), vs_set(0)) & (size <= limit);
            least >>= ROUGH_SHIFT;
            sum = vs_dot(sum, least, least);
        }
        total += vi_total(sum);
    }
    return rough_squares(total);
}

#endif
