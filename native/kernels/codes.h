/* A row's codes at a given scale, and the exact sums that its error is told by. */
#ifndef NPUQ_KERNELS_CODES_H
#define NPUQ_KERNELS_CODES_H

#include "fp8.h"
#include "memory.h"

/* Products of 2^23 and 8 of which 16 fit a 32-bit lane. */
enum { CODE_STEP = 4 * VW, PART = 4 * CODE_STEP };

/* Σ w² in fixed point (where it is wanted), and A and B of the codes; `a` is the part of A that is still in 32 bits. */
struct code_sums {
    vl even, odd, sum;
    vi a, b; /* 2^14 · 2^17 / VW fits */
};

INLINE void flush_sums(struct code_sums *sums) {
    sums->sum = vl_add(sums->sum, sums->a);
    sums->a = (vi){0};
}

/* round-half-even(scaled), between −2^(bits − 1) and one less than its opposite, is the code of a weight that is `fixed`. */
INLINE vi sum_codes(vi fixed, vf scaled, const int bits, const int squares, struct code_sums *sums) {
    const int bound = 1 << (bits - 1);
    const vi code = vf_round(vf_min(vf_max(scaled, vf_set((float)-bound)), vf_set((float)(bound - 1))));
    if (bits == 4) sums->a += fixed * code; /* 2^26 at most */
    else sums->sum = vl_dot(sums->sum, fixed, code);
    if (squares) vl_squares(fixed, &sums->even, &sums->odd);
    return code;
}

/* Stores CODE_STEP codes, or `count` if that is less, and adds their squares: to B, from the bytes, which is less work. */
INLINE void store_codes(const vi code[4], size_t count, int8_t *out, struct code_sums *sums) {
    int8_t lane[CODE_STEP], *to = count < CODE_STEP ? lane : out;
    vi_store_i8x4(to, code[0], code[1], code[2], code[3]);
    for (int k = 0; k < CODE_STEP; k += PLANE_STEP) {
        const vs bytes = vs_load_i8(to + k);
        sums->b = vs_dot(sums->b, bytes, bytes);
    }
    if (count < CODE_STEP) memcpy(out, lane, count);
}

INLINE struct exact_state sums_of(struct code_sums *sums, uint64_t *squares) {
    flush_sums(sums);
    if (squares != NULL) *squares = (uint64_t)vl_total(sums->even) + (uint64_t)vl_total(sums->odd);
    return (struct exact_state){vl_total(sums->sum), vi_total(sums->b), 0};
}

/* Codes of w · inverse, and A and B of them; where `squares` is given, also Σ w² in fixed point. */
INLINE struct exact_state round_codes_as(const float *w, size_t n, float unit, float inverse, const int bits, int8_t *codes,
                                         uint64_t *squares) {
    struct code_sums sums = {{0}, {0}, {0}, {0}, {0}};
    for (size_t i = 0; i < n; i += CODE_STEP) { /* what lies behind n is 0 */
        vi code[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const vf v = vf_load(w + i + k * VW);
            code[k] = sum_codes(vf_round(v * unit), v * inverse, bits, squares != NULL, &sums);
        }
        store_codes(code, n - i, codes + i, &sums);
        if (i % PART == PART - CODE_STEP) flush_sums(&sums);
    }
    return sums_of(&sums, squares);
}

static struct exact_state round_codes(const float *w, size_t n, float unit, float inverse, int bits, int8_t *codes,
                                      uint64_t *squares) {
    if (bits == 4) return round_codes_as(w, n, unit, inverse, 4, codes, squares);
    return round_codes_as(w, n, unit, inverse, 8, codes, squares);
}

/* FP8 weights times what is FP8_UNIT in `scale`, and zeros up to a multiple of CODE_STEP. */
INLINE void decode_part(const uint8_t *x, size_t count, float scale, float *w) {
    for (size_t i = 0; i < count; i += CODE_STEP) {
        uint8_t lane[CODE_STEP] = {0};
        const uint8_t *at = x + i;
        if (count - i < CODE_STEP) at = memcpy(lane, at, count - i);
        vf v[4];
        load_fp8_pair(at, v);
        load_fp8_pair(at + 2 * VW, v + 2);
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) vf_store(w + i + k * VW, v[k] * scale);
    }
}

/* The same of an FP8 row, straight from its bytes. The unit of fixed point is a power of two: it may be taken times a
 * block's scale, and off the inverse, without changing what is rounded. */
INLINE struct exact_state round_fp8_as(const struct fp8_row *row, float unit, float inverse, const int bits, int8_t *codes,
                                       uint64_t *squares) {
    struct code_sums sums = {{0}, {0}, {0}, {0}, {0}};
    const float to_code = inverse / unit;
    for (size_t first = 0; first < row->n; first += row->block) {
        const size_t count = row->n - first < row->block ? row->n - first : row->block;
        const uint8_t *x = row->x + first;
        const float scale = row->block_scale[first / row->block] * unit * FP8_UNIT;
        if (!(fabsf(scale) <= 3.402823466e38f)) { /* of zeros only, or the row's largest would not be finite */
            memset(codes + first, 0, count);
            continue;
        }
        for (size_t part = 0; part < count; part += PART) { /* decoded apart from the rest: chains of half the length */
            float w[PART];
            const size_t end = count - part < PART ? count - part : PART;
            decode_part(x + part, end, scale, w);
            for (size_t i = 0; i < end; i += CODE_STEP) {
                vi code[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    const vf v = vf_load(w + i + k * VW);
                    code[k] = sum_codes(vf_round(v), v * to_code, bits, 1, &sums);
                }
                store_codes(code, end - i, codes + first + part + i, &sums);
            }
            flush_sums(&sums);
        }
    }
    return sums_of(&sums, squares);
}

/* The largest magnitude of an FP8 row; NaN when one is none, or infinite. */
static float largest_of_fp8(const struct fp8_row *row) {
    float largest = 0, poison = 0;
    for (size_t first = 0; first < row->n; first += row->block) {
        const uint8_t code = largest_code(row->x + first, row->n - first < row->block ? row->n - first : row->block);
        const float scale = row->block_scale[first / row->block], w = fabsf(fp8_magnitudes[code] * scale);
        poison += scale * 0.0f + (code == FP8_NAN ? NAN : 0);
        largest = w > largest ? w : largest;
    }
    return poison != 0 || isinf(largest) ? NAN : largest;
}

#endif
