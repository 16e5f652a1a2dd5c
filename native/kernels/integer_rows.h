/* Tiles that take weights row by row in the order of memory, straight from where they are stored: the hardware's
 * prefetcher follows one long stream, twice as fast as prefetching by hand could (a core has room for few of those at a
 * time). Included by integer.h. */
#ifndef NPUQ_KERNELS_INTEGER_ROWS_H
#define NPUQ_KERNELS_INTEGER_ROWS_H

#if defined(NPUQ_LEVEL_AVX2)
/* What of the tokens' rows all rows of a tile take before the next of it: it stays in L1 meanwhile. */
enum { STRETCH_BYTES = 20 << 10 };

/* The hardware's prefetchers alone reach 0.85 of what a plain sum reads at; with this, 0.95. */
INLINE void prefetch(const uint8_t *at, const int once) {
    if (once) __builtin_prefetch(at + 1024, 0, 0);
}

/* The products of two rows at [begin, end). Sums of 16 bits are emptied into those of 32 before they can overflow. */
INLINE void add_nibbles(const enum storage storage, const uint8_t *first, const uint8_t *second, const int8_t *x,
                        const int tokens, const int once, size_t k, size_t begin, size_t end, sums *first_sum,
                        sums *second_sum) {
    for (size_t i = begin; i < end;) {
        const size_t stop = end - i < NARROW_STEPS * STEP ? end : i + NARROW_STEPS * STEP;
        sums one[MOST_TOKENS], two[MOST_TOKENS];
        clear_row(one, tokens);
        clear_row(two, tokens);
        for (; i < stop; i += STEP) {
            prefetch(first + i, once);
            bytes both = load_bytes(first + i);
            if (storage == PACKED) both = flip_nibbles(both);
            bytes left = storage == PACKED ? low_nibbles(both) : both;
            bytes right = storage == PACKED ? high_nibbles(both) : load_bytes(second + i);
            EACH_TOKEN(tokens, {
                bytes token = load_bytes(x + t * k + i);
                one[t] = dot_nibbles(one[t], left, token);
                two[t] = dot_nibbles(two[t], right, token);
            });
        }
        EACH_TOKEN(tokens, {
            first_sum[t] = widen(first_sum[t], one[t]);
            second_sum[t] = widen(second_sum[t], two[t]);
        });
    }
}

INLINE void add_codes(const uint8_t *row, const int8_t *x, const int tokens, const int once, size_t k, size_t begin,
                      size_t end, sums *sum) {
    sums now[MOST_TOKENS];
    EACH_TOKEN(tokens, now[t] = sum[t];);
    for (size_t i = begin; i < end; i += STEP) {
        prefetch(row + i, once);
        bytes weight = load_w8((const int8_t *)row + i);
        EACH_TOKEN(tokens, now[t] = dot_bytes(now[t], weight, load_bytes(x + t * k + i)););
    }
    EACH_TOKEN(tokens, sum[t] = now[t];);
}

/* As `tile` of integer.h. With 16 registers, one row (or a packed pair) and six tokens need fewer loads and less room
 * than four rows and two tokens. */
INLINE void row_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, const int tokens,
                     size_t k, size_t body, int32_t *acc, size_t ldacc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    const int once = tokens <= 3;
    const size_t stretch = STRETCH_BYTES / (size_t)tokens / STEP * STEP;
    sums sum[TILE_ROWS][MOST_TOKENS];
    for (size_t r = 0; r < TILE_ROWS; r++) clear_row(sum[r], tokens);
    for (size_t begin = 0; begin < body; begin += stretch) {
        const size_t end = body - begin < stretch ? body : begin + stretch;
        for (size_t r = 0; r < TILE_ROWS && storage == CODES; r++) {
            add_codes(w + (r < last ? r : last) * k, x, tokens, once, k, begin, end, sum[r]);
        }
        for (size_t r = 0; r < TILE_ROWS && storage != CODES; r += 2) {
            const size_t first = storage == PACKED ? r / 2 : r, second = first + 1;
            add_nibbles(storage, w + (first < last ? first : last) * k, w + (second < last ? second : last) * k, x,
                        tokens, once, k, begin, end, sum[r], sum[r + 1]);
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

/* dot_bytes leaves −128 times a negative code with the wrong sign. Quantizing a row never makes a −128; who has one all
 * the same gets the difference here. */
static void negate_lowest(const int8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, size_t body,
                          int32_t *acc, size_t ldacc) {
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
/* A tile of one token, row by row in the order of memory: the hardware's prefetcher follows one long stream, twice as
 * fast as prefetching by hand could (a core has room for few of those at a time). */
INLINE void stream_tile(const enum storage storage, const uint8_t *w, size_t rows, const int8_t *x, size_t k,
                        size_t body, int32_t *acc) {
    const size_t last = (storage == PACKED ? rows / 2 : rows) - 1;
    sums sum[TILE_ROWS];
#pragma GCC unroll 4
    for (size_t r = 0; r < TILE_ROWS; r += storage == PACKED ? 2 : 1) {
        size_t stored = storage == PACKED ? r / 2 : r;
        const uint8_t *row = w + (stored < last ? stored : last) * k;
        sums even = sums_zero(), odd = sums_zero(), even_high = sums_zero(), odd_high = sums_zero();
        size_t i = 0;
        for (; i + 2 * STEP <= body; i += 2 * STEP) {
            bytes first = load_bytes(x + i), second = load_bytes(x + i + STEP);
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
INLINE void stream_packed(const uint8_t *w, size_t rows, const int8_t *x, const int tokens, size_t k, size_t body,
                          int32_t *acc, size_t ldacc) {
    const size_t last = rows / 2 - 1;
    sums low[2][MOST_TOKENS], high[2][MOST_TOKENS];
#pragma GCC unroll 2
    for (size_t r = 0; r < 2; r++) {
        const uint8_t *row = w + (r < last ? r : last) * k;
        sums even[MOST_TOKENS], odd[MOST_TOKENS];
        clear_row(even, tokens);
        clear_row(odd, tokens);
        for (size_t i = 0; i < body; i += STEP) {
            bytes token[MOST_TOKENS];
            EACH_TOKEN(tokens, token[t] = load_bytes(x + t * k + i););
            bytes both = flip_nibbles(load_bytes(row + i));
            dot_row(PACKED, even, low_nibbles(both), token, tokens);
            dot_row(PACKED, odd, high_nibbles(both), token, tokens);
        }
        EACH_TOKEN(tokens, low[r][t] = even[t]; high[r][t] = odd[t];);
    }
    EACH_TOKEN(tokens, store_quad(acc + t * ldacc, low[0][t], high[0][t], low[1][t], high[1][t]););
}
#endif


#endif
