/* int8 activations times int8 or int4 weights, exact: dot products of weight rows and token rows, contiguous along k.
 *
 * The lanes of a vector run along k, so weights are used as they are stored: nothing is transposed or repacked. A tile
 * keeps the sums of 4 rows × up to TOKENS tokens in registers and adds up each quad's lanes at the end. Sums are of codes
 * plus an offset (vectors_int8.h); the caller subtracts offset · Σ x. They wrap like int32 everywhere. */
#ifndef NPUQ_INFERENCE_KERNELS_INT_GEMM_H
#define NPUQ_INFERENCE_KERNELS_INT_GEMM_H

#include "common/levels.h"
#include "inference/kernels/int8_gemm_avx2.h"
#include "inference/kernels/int_gemm_rows.h"
#include "inference/kernels/int_gemm_storage.h"
#include "inference/kernels/prefetch.h"
#include "inference/kernels/vectors_int8.h"

#if defined(NPUQ_SCALAR_DOTS)

static int32_t sum_i8(const int8_t *x, size_t k) {
    uint32_t sum = 0;
    for (size_t i = 0; i < k; i++) sum += (uint32_t)x[i];
    return (int32_t)sum;
}

static void dot_w8(const int8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc, struct following following) {
    (void)following;
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) {
            uint32_t sum = 0;
            for (size_t i = 0; i < k; i++) sum += (uint32_t)(w[r * k + i] * x[t * k + i]);
            acc[t * ldacc + r] = (int32_t)sum;
        }
    }
}

static void unpack_w4(const uint8_t *w, size_t rows, size_t k, uint8_t *out) {
    for (size_t r = 0; r < rows; r++) {
        for (size_t i = 0; i < k; i++) out[r * k + i] = (uint8_t)flipped_nibble(w[r / 2 * k + i], r);
    }
}

static void dot_u4(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc) {
    /* 0..15 is the same byte with a sign. */
    dot_w8((const int8_t *)w, rows, x, tokens, k, acc, ldacc, (struct following){NULL, 0});
}

static void dot_w4(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc) {
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) {
            uint32_t sum = 0;
            for (size_t i = 0; i < k; i++) sum += (uint32_t)(flipped_nibble(w[r / 2 * k + i], r) * x[t * k + i]);
            acc[t * ldacc + r] = (int32_t)sum;
        }
    }
}

#else

#if !defined(NPUQ_LEVEL_AVX2)
/* Sums of one tile over the first `body` of k, a whole number of steps: four rows at once, those of each for up to
 * MOST_TOKENS tokens. Rows past the last repeat it: their sums go to padding. `storage` and `tokens` are constants where
 * this is inlined. */
INLINE void tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, const int tokens,
                 size_t k, size_t body, int32_t *acc, size_t ldacc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    const uint8_t *row0 = w, *row1 = w + (last < 1 ? 0 : k), *row2 = w + (last < 2 ? last : 2) * k,
                  *row3 = w + (last < 3 ? last : 3) * k;
    sums sum0[MOST_TOKENS], sum1[MOST_TOKENS], sum2[MOST_TOKENS], sum3[MOST_TOKENS];
    clear_row(sum0, tokens);
    clear_row(sum1, tokens);
    clear_row(sum2, tokens);
    clear_row(sum3, tokens);
    for (size_t i = 0; i < body; i += STEP) {
        /* The next tile's bytes, in the order they lie in memory: the hardware's prefetcher sees several short streams
         * here, and stops at the end of each (measured: a third of the bandwidth without). Spread ones are in L2. */
        const size_t stored_rows = storage == PACKED ? 2 : TILE_ROWS;
        for (size_t line = 0; storage != SPREAD && line < stored_rows * STEP; line += 64) {
            __builtin_prefetch(row0 + stored_rows * (k + i) + line);
        }
        bytes first, second, third, fourth;
        if (storage == PACKED) {
            const bytes both = flip_nibbles(load_bytes(row0 + i)), next = flip_nibbles(load_bytes(row1 + i));
            first = low_nibbles(both), second = high_nibbles(both);
            third = low_nibbles(next), fourth = high_nibbles(next);
        } else {
            first = load_weight(storage, row0 + i), second = load_weight(storage, row1 + i);
            third = load_weight(storage, row2 + i), fourth = load_weight(storage, row3 + i);
        }
        /* A token at a time: all sums, four weights and one token leave no register for a second. */
        EACH_TOKEN(tokens, {
            const bytes token = load_bytes(x + t * k + i);
            sum0[t] = dot_stored(storage, sum0[t], first, token);
            sum1[t] = dot_stored(storage, sum1[t], second, token);
            sum2[t] = dot_stored(storage, sum2[t], third, token);
            sum3[t] = dot_stored(storage, sum3[t], fourth, token);
        });
    }
    EACH_TOKEN(tokens, store_quad(acc + t * ldacc, sum0[t], sum1[t], sum2[t], sum3[t]););
}
#endif

#if defined(NPUQ_LEVEL_I8MM)
/* A tile of two or more tokens by smmla: a register holds the sums of two rows and two tokens. An odd token out is
 * paired with itself. */
INLINE void pair_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, const int tokens,
                      size_t k, size_t body, int32_t *acc, size_t ldacc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    const uint8_t *row0 = w, *row1 = w + (last < 1 ? 0 : k), *row2 = w + (last < 2 ? last : 2) * k,
                  *row3 = w + (last < 3 ? last : 3) * k;
    const int pairs = (tokens + 1) / 2;
    sums upper[MOST_TOKENS], lower[MOST_TOKENS]; /* rows 0 and 1, 2 and 3 */
    clear_row(upper, pairs);
    clear_row(lower, pairs);
    for (size_t i = 0; i < body; i += STEP) {
        bytes first, second, third, fourth;
        if (storage == PACKED) {
            bytes both = flip_nibbles(load_bytes(row0 + i)), next = flip_nibbles(load_bytes(row1 + i));
            first = low_nibbles(both), second = high_nibbles(both);
            third = low_nibbles(next), fourth = high_nibbles(next);
        } else {
            first = load_bytes(row0 + i), second = load_bytes(row1 + i);
            third = load_bytes(row2 + i), fourth = load_bytes(row3 + i);
        }
        bytes upper_first = pair_first(first, second), upper_second = pair_second(first, second);
        bytes lower_first = pair_first(third, fourth), lower_second = pair_second(third, fourth);
        EACH_TOKEN(pairs, {
            bytes even = load_bytes(x + 2 * t * k + i);
            bytes odd = load_bytes(x + (2 * t + 1 < tokens ? 2 * t + 1 : 2 * t) * k + i);
            bytes token = pair_first(even, odd);
            upper[t] = vmmlaq_s32(upper[t], upper_first, token);
            lower[t] = vmmlaq_s32(lower[t], lower_first, token);
            token = pair_second(even, odd);
            upper[t] = vmmlaq_s32(upper[t], upper_second, token);
            lower[t] = vmmlaq_s32(lower[t], lower_second, token);
        });
    }
    EACH_TOKEN(pairs, {
        vst1q_s32(acc + 2 * t * ldacc, vuzp1q_s32(upper[t], lower[t]));
        if (2 * t + 1 < tokens) vst1q_s32(acc + (2 * t + 1) * ldacc, vuzp2q_s32(upper[t], lower[t]));
    });
}
#endif

/* The way that this level's registers and prefetchers like best. */
INLINE void best_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, const int tokens,
                      struct ahead *ahead, size_t k, size_t body, int32_t *acc, size_t ldacc) {
#if defined(NPUQ_LEVEL_AVX2)
    row_tile(storage, w, rows, x, tokens, ahead, k, body, acc, ldacc);
#else
    (void)ahead;
    if (tokens == 1) {
        stream_tile(storage, w, rows, x, k, body, acc);
        return;
    }
#if defined(NPUQ_LEVEL_I8MM)
    pair_tile(storage, w, rows, x, tokens, k, body, acc, ldacc);
#else
    tile(storage, w, rows, x, tokens, k, body, acc, ldacc);
#endif
#endif
}

/* `rows` rows for up to `most` tokens. */
INLINE void dot_rows(const enum storage storage, const int most, const uint8_t *w, size_t rows, const int8_t *x,
                     size_t tokens, struct ahead *ahead, size_t k, size_t body, int32_t *acc, size_t ldacc) {
    for (size_t r = 0; r < rows; r += TILE_ROWS) {
        const uint8_t *wr = w + (storage == PACKED ? r / 2 : r) * k;
        size_t n = rows - r;
        int32_t *out = acc + r;
        switch (tokens) {
            case 1: best_tile(storage, wr, n, x, 1, ahead, k, body, out, ldacc); break;
            case 2: best_tile(storage, wr, n, x, 2, ahead, k, body, out, ldacc); break;
            case 3: if (most >= 3) best_tile(storage, wr, n, x, 3, ahead, k, body, out, ldacc); break;
            case 4: if (most >= 4) best_tile(storage, wr, n, x, 4, ahead, k, body, out, ldacc); break;
            case 5: if (most >= 5) best_tile(storage, wr, n, x, 5, ahead, k, body, out, ldacc); break;
            default: if (most >= 6) best_tile(storage, wr, n, x, 6, ahead, k, body, out, ldacc); break;
        }
    }
}

/* All tiles. A token tile stays in L1 while a block of weights passes by; the next block comes from memory meanwhile,
 * some lines of it in each pass, so that arithmetic does not wait for memory. Passes are of about equal width. */
INLINE void dot_tiles(const enum storage storage, const int most, const uint8_t *w, size_t rows, const int8_t *x,
                      size_t tokens, size_t k, int32_t *acc, size_t ldacc) {
    const size_t body = k / STEP * STEP, passes = (tokens + (size_t)most - 1) / (size_t)most;
    const uint8_t *end = w + (storage == PACKED ? rows / 2 : rows) * k;
    size_t block = BLOCK_BYTES / k * (storage == PACKED ? 2 : 1) / TILE_ROWS * TILE_ROWS;
    block = passes == 1 || block == 0 ? rows : block;
    for (size_t first = 0; first < rows; first += block) {
        const size_t some = rows - first < block ? rows - first : block;
        const uint8_t *from = w + (storage == PACKED ? first / 2 : first) * k;
        struct ahead ahead = {from + (storage == PACKED ? some / 2 : some) * k, end, (LAP_LINES + passes - 1) / passes,
                              LAP_BYTES - 1};
        if (passes == 1) ahead.at = from + AHEAD_BYTES;
        for (size_t pass = 0, t = 0; pass < passes; pass++) {
            size_t width = (tokens - t + passes - pass - 1) / (passes - pass);
            dot_rows(storage, most, from, some, x + t * k, width, &ahead, k, body, acc + t * ldacc + first, ldacc);
            t += width;
        }
    }
    if (body < k) add_rest(storage, w, rows, x, tokens, k, body, acc, ldacc);
}

static void dot_w8(const int8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc, struct following following) {
#if defined(NPUQ_LEVEL_AVX2)
    if (tokens >= WIDE_LEAST && k >= STEP) {
        struct ahead ahead = ahead_of(following, LINE - 1);
        dot_wide((const uint8_t *)w, rows, x, tokens, k, acc, ldacc, &ahead);
        return;
    }
#else
    (void)following;
#endif
    dot_tiles(CODES, W8_TOKENS, (const uint8_t *)w, rows, x, tokens, k, acc, ldacc);
#if defined(NPUQ_LEVEL_AVX2)
    negate_lowest(w, rows, x, tokens, k, k / STEP * STEP, acc, ldacc);
#endif
}

static void dot_w4(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc) {
#if !defined(NPUQ_LEVEL_AVX2)
    if (tokens == 2 || tokens == 3) { /* bound by memory; four are faster in tiles */
        const size_t body = k / STEP * STEP;
        stream_rows(w, rows, x, tokens, k, body, acc, ldacc);
        if (body < k) add_rest(PACKED, w, rows, x, tokens, k, body, acc, ldacc);
        return;
    }
#endif
    dot_tiles(PACKED, DIRECT_TOKENS, w, rows, x, tokens, k, acc, ldacc);
}

static void dot_u4(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc,
                   size_t ldacc) {
    dot_tiles(SPREAD, W4_TOKENS, w, rows, x, tokens, k, acc, ldacc);
}

static void unpack_w4(const uint8_t *w, size_t rows, size_t k, uint8_t *out) {
    for (size_t r = 0; r + 1 < rows; r += 2) {
        const uint8_t *pair = w + r / 2 * k;
        size_t i = 0;
        for (; i + STEP <= k; i += STEP) {
            bytes both = flip_nibbles(load_bytes(pair + i));
            store_bytes(out + r * k + i, low_nibbles(both));
            store_bytes(out + (r + 1) * k + i, high_nibbles(both));
        }
        for (; i < k; i++) {
            out[r * k + i] = (uint8_t)flipped_nibble(pair[i], 0);
            out[(r + 1) * k + i] = (uint8_t)flipped_nibble(pair[i], 1);
        }
    }
}

static int32_t sum_i8(const int8_t *x, size_t k) {
    /* A product with nibbles of value 1. */
    size_t done = 0;
    bytes one = low_nibbles(flip_nibbles(load_bytes((const uint8_t[64]){[0 ... 63] = 0x99})));
    sums acc = sums_zero();
    for (; done + STEP <= k; done += STEP) acc = widen(acc, dot_nibbles(sums_zero(), one, load_bytes(x + done)));
    int32_t quad[4];
    store_quad(quad, acc, sums_zero(), sums_zero(), sums_zero());
    for (; done < k; done++) quad[0] += x[done];
    return quad[0];
}

#endif
#endif
