/* Integer products, row by row: tiles read weights in the order of memory, straight from where they are stored. The
 * hardware's prefetcher follows one long stream. On x86 each line is also fetched by hand, past the second-level cache:
 * weights of one token are not read again soon, and the lines that they would drive out need bandwidth too. */
#ifndef NPUQ_INFERENCE_KERNELS_INT_GEMM_ROWS_H
#define NPUQ_INFERENCE_KERNELS_INT_GEMM_ROWS_H

#include "inference/kernels/int_gemm_storage.h"
#include "inference/kernels/prefetch.h"

#if !defined(NPUQ_SCALAR_DOTS)
/* A step of weights that are read once. The hardware's prefetchers alone reach 0.85 of a plain sum's read rate; with this,
 * 0.95 (AVX2). With AVX-512 it is five kilobytes ahead. Not measured on Arm. */
INLINE void prefetch(const uint8_t *at, const int once) {
#if defined(NPUQ_LEVEL_AVX512)
    if (once) __builtin_prefetch(at + 5120, 0, 0);
#elif defined(NPUQ_LEVEL_AVX2)
    if (once) __builtin_prefetch(at + 1024, 0, 0);
#else
    (void)at, (void)once;
#endif
}

#if defined(NPUQ_LEVEL_AVX2)
enum {
    /* The part of the tokens' rows that all rows of a tile take before the next part: it stays in L1. */
    STRETCH_BYTES = 20 << 10,
};

/* Nibbles of one step of two rows. Constants come from memory: with six tokens every register holds a sum, a weight or
 * a product, and compilers that want registers for constants too keep sums in memory instead. */
INLINE void load_pair(const enum storage storage, const uint8_t *first, const uint8_t *second, bytes *left,
                      bytes *right) {
    static const uint8_t flip[STEP] __attribute__((aligned(STEP))) = {[0 ... STEP - 1] = 0x88};
    static const uint8_t low[STEP] __attribute__((aligned(STEP))) = {[0 ... STEP - 1] = 15};
    if (storage != PACKED) {
        *left = load_bytes(first);
        *right = load_bytes(second);
        return;
    }
    __asm__("vmovdqu\t%2, %0\n\tvpxor\t%3, %0, %0\n\tvpsrlw\t$4, %0, %1\n\tvpand\t%4, %0, %0\n\tvpand\t%4, %1, %1"
            : "=&x"(*left), "=&x"(*right)
            : "m"(*(const __m256i_u *)first), "m"(*(const bytes *)flip), "m"(*(const bytes *)low));
}

/* A token's products with both rows, side by side and then added: each in turn leaves units idle. Without `add` the
 * products are the sums. */
INLINE void dot_pair(const int add, bytes left, bytes right, const int8_t *x, sums *one, sums *two) {
    if (!add) {
        bytes token = load_bytes(x);
        *one = _mm256_maddubs_epi16(left, token);
        *two = _mm256_maddubs_epi16(right, token);
        return;
    }
    bytes token, product;
    __asm__("vmovdqu\t%6, %2\n\tvpmaddubsw\t%2, %4, %3\n\tvpmaddubsw\t%2, %5, %2\n\tvpaddw\t%3, %0, %0\n\t"
            "vpaddw\t%2, %1, %1"
            : "+x"(*one), "+x"(*two), "=&x"(token), "=&x"(product)
            : "x"(left), "x"(right), "m"(*(const __m256i_u *)x));
}

/* The products of two rows at [begin, end). Sums of 16 bits are emptied into those of 32 before they can overflow. */
INLINE void add_nibbles(const enum storage storage, const uint8_t *first, const uint8_t *second, const int8_t *x,
                        const int tokens, struct ahead *ahead, size_t k, size_t begin, size_t end, sums *first_sum,
                        sums *second_sum) {
    const int once = tokens <= 3;
    for (size_t i = begin; i < end;) {
        const size_t stop = end - i < LAP_BYTES ? end : i + LAP_BYTES;
        sums one[MOST_TOKENS], two[MOST_TOKENS];
        bytes left, right;
        if (!once) fetch_lap(ahead);
        prefetch(first + i, once);
        load_pair(storage, first + i, second + i, &left, &right);
        EACH_TOKEN(tokens, dot_pair(0, left, right, x + t * k + i, one + t, two + t););
        for (i += STEP; i < stop; i += STEP) {
            prefetch(first + i, once);
            load_pair(storage, first + i, second + i, &left, &right);
            EACH_TOKEN(tokens, dot_pair(1, left, right, x + t * k + i, one + t, two + t););
        }
        EACH_TOKEN(tokens, {
            first_sum[t] = widen(first_sum[t], one[t]);
            second_sum[t] = widen(second_sum[t], two[t]);
        });
    }
}

/* One step of a row of codes: as magnitudes, with their signs given to x, they do not saturate vpmaddubsw (128 · 128 · 2,
 * and that only as −32768). See negate_lowest for the one x that has no opposite. All tokens' signs, then all products,
 * then all sums: a token after the other leaves units idle. */
INLINE void dot_codes(const uint8_t *row, const int8_t *x, size_t k, const int tokens, bytes ones, sums *sum) {
    bytes weight = load_bytes(row), magnitude = _mm256_abs_epi8(weight), token[MOST_TOKENS];
    EACH_TOKEN(tokens, {
        token[t] = load_bytes(x + t * k);
        __asm__ volatile("vpsignb\t%1, %0, %0" : "+x"(token[t]) : "x"(weight));
    });
    EACH_TOKEN(tokens, __asm__ volatile("vpmaddubsw\t%0, %1, %0" : "+x"(token[t]) : "x"(magnitude)););
    EACH_TOKEN(tokens, __asm__ volatile("vpmaddwd\t%1, %0, %0" : "+x"(token[t]) : "x"(ones)););
    EACH_TOKEN(tokens, __asm__ volatile("vpaddd\t%1, %0, %0" : "+x"(sum[t]) : "x"(token[t])););
}

INLINE void add_codes(const uint8_t *row, const int8_t *x, const int tokens, struct ahead *ahead,
                      size_t k, size_t begin, size_t end, sums *sum) {
    const int once = tokens <= 3;
    const bytes ones = _mm256_set1_epi16(1);
    sums now[MOST_TOKENS];
    EACH_TOKEN(tokens, now[t] = sum[t];);
    for (size_t i = begin; i < end;) {
        const size_t stop = end - i < LAP_BYTES ? end : i + LAP_BYTES;
        if (!once) fetch_lap(ahead);
        for (; i < stop; i += STEP) {
            prefetch(row + i, once);
            dot_codes(row + i, x + i, k, tokens, ones, now);
        }
    }
    EACH_TOKEN(tokens, sum[t] = now[t];);
}

/* As `tile` of int_gemm.h. With 16 registers, one row (or a packed pair) and six tokens need fewer loads and less room
 * than four rows and two tokens. */
INLINE void row_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, const int tokens,
                     struct ahead *ahead, size_t k, size_t body, int32_t *acc, size_t ldacc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    const size_t stretch = STRETCH_BYTES / (size_t)tokens / STEP * STEP;
    sums sum[TILE_ROWS][MOST_TOKENS];
    for (size_t r = 0; r < TILE_ROWS; r++) clear_row(sum[r], tokens);
    if (tokens <= 3 && storage != SPREAD) touch_pages(w, (storage == PACKED ? 2 : TILE_ROWS) * k);
    for (size_t begin = 0; begin < body; begin += stretch) {
        const size_t end = body - begin < stretch ? body : begin + stretch;
        for (size_t r = 0; r < TILE_ROWS && storage == CODES; r++) {
            add_codes(w + (r < last ? r : last) * k, x, tokens, ahead, k, begin, end, sum[r]);
        }
        for (size_t r = 0; r < TILE_ROWS && storage != CODES; r += 2) {
            const size_t first = storage == PACKED ? r / 2 : r, second = first + 1;
            add_nibbles(storage, w + (first < last ? first : last) * k, w + (second < last ? second : last) * k, x,
                        tokens, ahead, k, begin, end, sum[r], sum[r + 1]);
        }
    }
    EACH_TOKEN(tokens, store_quad(acc + t * ldacc, sum[0][t], sum[1][t], sum[2][t], sum[3][t]););
}

INLINE int holds_lowest(const int8_t *x, size_t n) {
    bytes found = sums_zero();
    for (size_t i = 0; i < n; i += STEP) {
        found = _mm256_or_si256(found, _mm256_cmpeq_epi8(load_bytes(x + i), _mm256_set1_epi8(-128)));
    }
    return !_mm256_testz_si256(found, found);
}

/* dot_codes leaves −128 times a negative code with the wrong sign. Quantizing a row never makes a −128; who has one all
 * the same gets the difference here. */
static void negate_lowest(const int8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k,
                          size_t body, int32_t *acc, size_t ldacc) {
    for (size_t t = 0; t < tokens; t++) {
        const int8_t *token = x + t * k;
        if (!holds_lowest(token, body)) continue;
        for (size_t r = 0; r < rows; r++) {
            int32_t *sum = acc + t * ldacc + r;
            for (size_t i = 0; i < body; i++) {
                if (token[i] == -128 && w[r * k + i] < 0) *sum = wrap_add(*sum, -256 * w[r * k + i]);
            }
        }
    }
}

#else
/* A tile of one token, row by row in the order of memory: the hardware's prefetcher follows one long stream. */
INLINE void stream_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, size_t k,
                        size_t body, int32_t *acc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    sums sum[TILE_ROWS];
#pragma GCC unroll 4
    for (size_t r = 0; r < TILE_ROWS; r += storage == PACKED ? 2 : 1) {
        size_t stored = storage == PACKED ? r / 2 : r;
        const uint8_t *row = w + (stored < last ? stored : last) * k;
        touch_pages(row, k);
        sums even = sums_zero(), odd = sums_zero(), even_high = sums_zero(), odd_high = sums_zero();
        size_t i = 0;
        for (; i + 2 * STEP <= body; i += 2 * STEP) {
            bytes first = load_bytes(x + i), second = load_bytes(x + i + STEP);
            prefetch(row + i, 1);
            prefetch(row + i + STEP, 1);
            if (storage == PACKED) {
                bytes both = flip_nibbles(load_bytes(row + i)), next = flip_nibbles(load_bytes(row + i + STEP));
                even = dot_nibbles(even, low_nibbles(both), first);
                even_high = dot_nibbles(even_high, high_nibbles(both), first);
                odd = dot_nibbles(odd, low_nibbles(next), second);
                odd_high = dot_nibbles(odd_high, high_nibbles(next), second);
            } else {
                even = dot_bytes(even, load_w8((const int8_t *)row + i), first);
                odd = dot_bytes(odd, load_w8((const int8_t *)row + i + STEP), second);
            }
        }
        if (i < body) {
            bytes token = load_bytes(x + i);
            if (storage == PACKED) {
                bytes both = flip_nibbles(load_bytes(row + i));
                even = dot_nibbles(even, low_nibbles(both), token);
                even_high = dot_nibbles(even_high, high_nibbles(both), token);
            } else {
                even = dot_bytes(even, load_w8((const int8_t *)row + i), token);
            }
        }
        sum[r] = add_sums(even, odd);
        if (storage == PACKED) sum[r + 1] = add_sums(even_high, odd_high);
    }
    store_quad(acc, sum[0], sum[1], sum[2], sum[3]);
}

/* The same of two or three tokens of packed rows: their sums already hide each other's latency. */
INLINE void stream_packed(const uint8_t *w, size_t rows, const int8_t *x, const int tokens, size_t k,
                          size_t body, int32_t *acc, size_t ldacc) {
    const size_t last = rows / 2 - 1;
    sums low[2][MOST_TOKENS], high[2][MOST_TOKENS];
#pragma GCC unroll 2
    for (size_t r = 0; r < 2; r++) {
        const uint8_t *row = w + (r < last ? r : last) * k;
        touch_pages(row, k);
        sums even[MOST_TOKENS], odd[MOST_TOKENS];
        clear_row(even, tokens);
        clear_row(odd, tokens);
        for (size_t i = 0; i < body; i += STEP) {
            prefetch(row + i, 1);
            const bytes both = flip_nibbles(load_bytes(row + i)), first = low_nibbles(both), second = high_nibbles(both);
            EACH_TOKEN(tokens, {
                const bytes token = load_bytes(x + t * k + i);
                even[t] = dot_nibbles(even[t], first, token);
                odd[t] = dot_nibbles(odd[t], second, token);
            });
        }
        EACH_TOKEN(tokens, low[r][t] = even[t]; high[r][t] = odd[t];);
    }
    EACH_TOKEN(tokens, store_quad(acc + t * ldacc, low[0][t], high[0][t], low[1][t], high[1][t]););
}

/* Two or three tokens of packed rows. */
static void stream_rows(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, size_t body,
                        int32_t *acc, size_t ldacc) {
    for (size_t r = 0; r < rows; r += TILE_ROWS) {
        const uint8_t *from = w + r / 2 * k;
        if (tokens == 2) stream_packed(from, rows - r, x, 2, k, body, acc + r, ldacc);
        else stream_packed(from, rows - r, x, 3, k, body, acc + r, ldacc);
    }
}
#endif
#endif

#endif
