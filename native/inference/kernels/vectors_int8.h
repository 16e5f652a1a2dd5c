/* Vectors of bytes and sums of their products: one set of small functions for each instruction set.
 *
 * x is signed everywhere. A nibble is flipped to code + 8 in 0..15. VNNI's dpbusd wants one unsigned factor: int8 codes
 * are flipped to code + 128 there (OFFSET_W8).
 * NARROW_STEPS: so many dot_nibbles may follow each other before `widen` must empty their 16-bit sums into 32 bits; sums
 * are 32 bits wide where there is none. …_TOKENS: so many tokens fit a tile's registers. DIRECT_LIMIT: of more tokens,
 * nibbles are better spread once than flipped for every tile. W8_ROWS: so many rows of int8 codes must share the work of
 * widening many tokens, or 0 where nothing is widened. */
#ifndef NPUQ_INFERENCE_KERNELS_VECTORS_INT8_H
#define NPUQ_INFERENCE_KERNELS_VECTORS_INT8_H

#include "common/vectors.h"

enum { TILE_ROWS = 4, OFFSET_W4 = 8 };

#if defined(NPUQ_LEVEL_AVX512)
enum { STEP = 64, W4_TOKENS = 6, W8_TOKENS = 6, DIRECT_TOKENS = 6, DIRECT_LIMIT = 1 << 30, OFFSET_W8 = 128,
       W8_ROWS = 0 };
typedef __m512i bytes;
typedef __m512i sums;
INLINE sums sums_zero(void) { return _mm512_setzero_si512(); }
INLINE bytes load_bytes(const void *p) { return _mm512_loadu_si512(p); }
INLINE bytes flip_nibbles(bytes b) { return _mm512_xor_si512(b, _mm512_set1_epi8((char)0x88)); }
INLINE bytes low_nibbles(bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
INLINE bytes high_nibbles(bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
/* _mm512_dpbusd_epi32, written out: GCC 12 copies every sum to another register before it and back after it, which
 * leaves room for half as many sums. */
INLINE sums dot_nibbles(sums acc, bytes nibbles, bytes x) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpbusd\t%2, %1, %0" : "+v"(acc) : "v"(nibbles), "v"(x));
    return acc;
#else /* tests/native/avx512_emulated.h */
    return _mm512_dpbusd_epi32(acc, nibbles, x);
#endif
}
INLINE bytes load_w8(const int8_t *p) { return _mm512_xor_si512(load_bytes(p), _mm512_set1_epi8((char)0x80)); }
INLINE sums dot_bytes(sums acc, bytes w, bytes x) { return dot_nibbles(acc, w, x); }
INLINE void store_bytes(void *p, bytes b) { _mm512_storeu_si512(p, b); }
INLINE sums add_sums(sums a, sums b) { return _mm512_add_epi32(a, b); }
INLINE sums widen(sums acc, sums narrow) { return add_sums(acc, narrow); }
/* Lane sums of a, b, c, d. */
INLINE void store_quad(int32_t *out, sums a, sums b, sums c, sums d) {
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    __m512i abcd = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storeu_si128((__m128i *)out, quarter);
}

#elif defined(NPUQ_LEVEL_AVX2)
/* Nibble products go through maddubs: |15 · 128 · 2| = 3840 a pair, of which 8 fit an int16. Codes would saturate it as
 * 0..255 (255 · 128 · 2): see dot_codes of int_gemm_rows.h. */
enum { STEP = 32, W4_TOKENS = 6, W8_TOKENS = 6, DIRECT_TOKENS = 6, DIRECT_LIMIT = 1 << 30, OFFSET_W8 = 0,
       W8_ROWS = 48, NARROW_STEPS = 8 };
typedef __m256i bytes;
typedef __m256i sums;
INLINE sums sums_zero(void) { return _mm256_setzero_si256(); }
INLINE bytes load_bytes(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE bytes flip_nibbles(bytes b) { return _mm256_xor_si256(b, _mm256_set1_epi8((char)0x88)); }
INLINE bytes low_nibbles(bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
INLINE bytes high_nibbles(bytes b) { return _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(15)); }
/* Written out: around intrinsics GCC 12 gives every sum two registers and copies them back and forth. */
INLINE sums dot_nibbles(sums narrow, bytes nibbles, bytes x) {
    bytes product;
    __asm__("vpmaddubsw\t%3, %2, %1\n\tvpaddw\t%1, %0, %0" : "+x"(narrow), "=&x"(product) : "x"(nibbles), "x"(x));
    return narrow;
}
INLINE sums add_sums(sums a, sums b) { return _mm256_add_epi32(a, b); }
INLINE sums widen(sums acc, sums narrow) { return add_sums(acc, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1))); }
INLINE void store_bytes(void *p, bytes b) { _mm256_storeu_si256((__m256i *)p, b); }
INLINE void store_quad(int32_t *out, sums a, sums b, sums c, sums d) {
    __m256i abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
    _mm_storeu_si128((__m128i *)out, quarter);
}

#elif defined(NPUQ_LEVEL_NEON)
#if defined(NPUQ_LEVEL_I8MM)
enum { W4_TOKENS = 6, W8_TOKENS = 6, DIRECT_TOKENS = 6 };
#else
enum { W4_TOKENS = 4, W8_TOKENS = 4, DIRECT_TOKENS = 4 };
#endif
enum { STEP = 16, DIRECT_LIMIT = 8, OFFSET_W8 = 0, W8_ROWS = 0 };
typedef int8x16_t bytes;
typedef int32x4_t sums;
INLINE sums sums_zero(void) { return vdupq_n_s32(0); }
INLINE bytes load_bytes(const void *p) { return vld1q_s8(p); }
INLINE bytes flip_nibbles(bytes b) { return veorq_s8(b, vdupq_n_s8((int8_t)0x88)); }
INLINE bytes low_nibbles(bytes b) { return vandq_s8(b, vdupq_n_s8(15)); }
INLINE bytes high_nibbles(bytes b) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(b), 4)); }
INLINE sums dot_nibbles(sums acc, bytes nibbles, bytes x) { return vdotq_s32(acc, nibbles, x); }
INLINE bytes load_w8(const int8_t *p) { return vld1q_s8(p); }
INLINE sums dot_bytes(sums acc, bytes w, bytes x) { return vdotq_s32(acc, w, x); }
INLINE void store_bytes(void *p, bytes b) { vst1q_s8(p, b); }
#if defined(NPUQ_LEVEL_I8MM)
/* Eight bytes of each: a pair of rows as smmla takes it. */
INLINE bytes pair_first(bytes a, bytes b) {
    return vreinterpretq_s8_s64(vzip1q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
INLINE bytes pair_second(bytes a, bytes b) {
    return vreinterpretq_s8_s64(vzip2q_s64(vreinterpretq_s64_s8(a), vreinterpretq_s64_s8(b)));
}
#endif
INLINE sums add_sums(sums a, sums b) { return vaddq_s32(a, b); }
INLINE sums widen(sums acc, sums narrow) { return add_sums(acc, narrow); }
INLINE void store_quad(int32_t *out, sums a, sums b, sums c, sums d) {
    vst1q_s32(out, vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)));
}

#else
/* Portable: plain loops, which the compiler vectorizes for its baseline. */
#define NPUQ_SCALAR_DOTS
enum { DIRECT_LIMIT = 1, OFFSET_W8 = 0, W8_ROWS = 0 };
#endif

#endif
