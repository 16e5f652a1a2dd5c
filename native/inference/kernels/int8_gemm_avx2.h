/* int8 × int8 of many tokens on AVX2: Winograd's inner product (IEEE Trans. Comput. C-17, 1968), with half the products:
 *
 *     Σ w₀x₀ + w₁x₁ = Σ (w₀ + x₁)(w₁ + x₀) − Σ w₀w₁ − Σ x₀x₁
 *
 * where 0 and 1 are the even and the odd places of k; the last two sums belong to a row and to a token alone. Everything
 * is int16 and one vpmaddwd takes 32 places for two vpaddw and a vpaddd, which any of four units can do; two units alone
 * multiply, and want three instructions for as many by signs and magnitudes (int_gemm_rows.h). */
#ifndef NPUQ_INFERENCE_KERNELS_INT8_GEMM_AVX2_H
#define NPUQ_INFERENCE_KERNELS_INT8_GEMM_AVX2_H

#include "inference/kernels/int_gemm_storage.h"

#if defined(NPUQ_LEVEL_AVX2)
enum {
    /* Tokens whose sums a row keeps in registers, and the number of tokens from which widening them pays. */
    WIDE_TOKENS = 8,
    WIDE_LEAST = 7,
    /* The part of the tokens that is widened at a time, for all rows before the next part: half of L1. */
    WIDE_STRETCH = 1024,
    /* Rows whose own sums are kept from the first tokens to the last. */
    WIDE_ROWS = 128,
};

INLINE bytes even_codes(bytes codes) { return _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8); }
INLINE bytes odd_codes(bytes codes) { return _mm256_srai_epi16(codes, 8); }

/* Tokens at [0, n) of k, n a multiple of STEP: [n / STEP, tokens, even | odd, STEP / 2]; and −Σ x₀x₁ of each. */
INLINE void widen_tokens(const int8_t *x, const int tokens, size_t k, size_t n, int16_t *wide, sums *own) {
    clear_row(own, tokens);
    for (size_t i = 0; i < n; i += STEP) {
        EACH_TOKEN(tokens, {
            bytes codes = load_bytes(x + t * k + i), even = even_codes(codes), odd = odd_codes(codes);
            bytes *to = (bytes *)(wide + (size_t)tokens * i) + 2 * t;
            to[0] = even;
            to[1] = odd;
            own[t] = _mm256_sub_epi32(own[t], _mm256_madd_epi16(even, odd));
        });
    }
}

/* A step of a row, and its own Σ w₀w₁ where that is asked for. Written out: see dot_nibbles. */
INLINE void add_wide(const uint8_t *row, const int16_t *wide, const int tokens, const int first, sums *sum, sums *own) {
    bytes codes = load_bytes(row), even = even_codes(codes), odd = odd_codes(codes);
    if (first) *own = _mm256_add_epi32(*own, _mm256_madd_epi16(even, odd));
    EACH_TOKEN(tokens, {
        bytes left, right;
        __asm__("vpaddw\t%5, %4, %1\n\tvpaddw\t%6, %3, %2\n\tvpmaddwd\t%2, %1, %1\n\tvpaddd\t%1, %0, %0"
                : "+x"(sum[t]), "=&x"(left), "=&x"(right)
                : "x"(even), "x"(odd), "m"(((const bytes *)wide)[2 * t]), "m"(((const bytes *)wide)[2 * t + 1]));
    });
}

/* The common data of a pass's tokens: the widened part of k, its −Σ x₀x₁, and true for the first tokens. */
struct widened {
    const int16_t *wide;
    const sums *own;
    struct ahead *ahead;
    size_t k, n;
};

/* Sums over a stretch of four rows, in `acc` or (`add`) added to it. owns: Σ w₀w₁ of each row, made by the first tokens. */
INLINE void wide_tile(const uint8_t *w, size_t rows, const struct widened *x, const int tokens, const int first,
                      int32_t *owns, const int add, int32_t *acc, size_t ldacc) {
    sums sum[TILE_ROWS][MOST_TOKENS], own[TILE_ROWS];
    for (size_t r = 0; r < TILE_ROWS; r++) {
        const uint8_t *row = w + (r < rows ? r : rows - 1) * x->k;
        const int16_t *wide = x->wide;
        sums now[MOST_TOKENS], mine = sums_zero();
        size_t i = 0;
        EACH_TOKEN(tokens, now[t] = x->own[t];);
        for (; i + LINE <= x->n; i += LINE, wide += LINE * tokens) {
            if (first) fetch_line(x->ahead);
            __builtin_prefetch(row + x->k + i, 0, 3);
            add_wide(row + i, wide, tokens, first, now, &mine);
            add_wide(row + i + STEP, wide + STEP * tokens, tokens, first, now, &mine);
        }
        if (i < x->n) add_wide(row + i, wide, tokens, first, now, &mine);
        EACH_TOKEN(tokens, sum[r][t] = now[t];);
        own[r] = mine;
    }
    if (first) store_quad(owns, own[0], own[1], own[2], own[3]);
    const __m128i less = _mm_loadu_si128((const __m128i *)owns);
    EACH_TOKEN(tokens, {
        __m128i *out = (__m128i *)(acc + t * ldacc), before = add ? _mm_loadu_si128(out) : _mm_setzero_si128();
        store_quad((int32_t *)out, sum[0][t], sum[1][t], sum[2][t], sum[3][t]);
        _mm_storeu_si128(out, _mm_add_epi32(_mm_loadu_si128(out), _mm_sub_epi32(before, less)));
    });
}

/* A stretch of all rows for some tokens. */
INLINE void wide_rows(const uint8_t *w, size_t rows, const int8_t *x, const int tokens, const int first,
                      struct ahead *ahead, size_t k, size_t n, int32_t *owns, const int add, int32_t *acc, size_t ldacc) {
    _Alignas(STEP) int16_t wide[WIDE_TOKENS * WIDE_STRETCH];
    sums own[MOST_TOKENS];
    const struct widened widened = {wide, own, ahead, k, n};
    widen_tokens(x, tokens, k, n, wide, own);
    for (size_t r = 0; r < rows; r += TILE_ROWS) {
        if (first) wide_tile(w + r * k, rows - r, &widened, tokens, 1, owns + r, add, acc + r, ldacc);
        else wide_tile(w + r * k, rows - r, &widened, tokens, 0, owns + r, add, acc + r, ldacc);
    }
}

/* Up to WIDE_ROWS rows. */
static void wide_block(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc, size_t ldacc,
                       struct ahead *ahead) {
    const size_t body = k / STEP * STEP, passes = (tokens + WIDE_TOKENS - 1) / WIDE_TOKENS;
    int32_t owns[WIDE_ROWS];
    for (size_t begin = 0; begin < body; begin += WIDE_STRETCH) {
        const size_t n = body - begin < WIDE_STRETCH ? body - begin : WIDE_STRETCH;
        for (size_t pass = 0, t = 0; pass < passes; pass++) {
            const size_t width = (tokens - t + passes - pass - 1) / (passes - pass);
            const uint8_t *from = w + begin;
            const int8_t *xt = x + t * k + begin;
            const int first = pass == 0, add = begin > 0;
            int32_t *out = acc + t * ldacc;
            switch (width) {
                case 4: wide_rows(from, rows, xt, 4, first, ahead, k, n, owns, add, out, ldacc); break;
                case 5: wide_rows(from, rows, xt, 5, first, ahead, k, n, owns, add, out, ldacc); break;
                case 6: wide_rows(from, rows, xt, 6, first, ahead, k, n, owns, add, out, ldacc); break;
                case 7: wide_rows(from, rows, xt, 7, first, ahead, k, n, owns, add, out, ldacc); break;
                default: wide_rows(from, rows, xt, 8, first, ahead, k, n, owns, add, out, ldacc); break;
            }
            t += width;
        }
    }
    if (body < k) add_rest(CODES, w, rows, x, tokens, k, body, acc, ldacc);
}

static void dot_wide(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc, size_t ldacc,
                     struct ahead *ahead) {
    for (size_t r = 0; r < rows; r += WIDE_ROWS) {
        wide_block(w + r * k, rows - r < WIDE_ROWS ? rows - r : WIDE_ROWS, x, tokens, k, acc + r, ldacc, ahead);
    }
}
#endif

#endif
