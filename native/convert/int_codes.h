/* A row's int4 or int8 codes at a given scale, and the exact sums that give its error. */
#ifndef NPUQ_CONVERT_INT_CODES_H
#define NPUQ_CONVERT_INT_CODES_H

#include "convert/scratch.h"

/* Sums of 5 vectors of products fit a 32-bit lane, those of 2^23 and 8 as of 2^14 and 2^14 (minmax_error.h). No part is
 * longer than the usual block of scales. */
enum { CODE_STEP = 4 * VW, PART = VW > 8 ? 8 * VW : 4 * CODE_STEP };

/* Σ w² in fixed point (where it is wanted), and A and B of the codes; `a` is the part of A that is still in 32 bits. */
struct code_sums {
    vl even, odd, sum;
    vi a, b; /* 2^14 · 2^17 / VW fits */
};

INLINE void flush_sums(struct code_sums *sums) {
    sums->sum = vl_add(sums->sum, sums->a);
    sums->a = (vi){0};
}

/* The code of a scaled weight: round-half-even between −2^(bits − 1) and one less than its opposite. */
INLINE vi round_code(vf scaled, const int bits) {
    const float bound = (float)(1 << (bits - 1));
    return vf_round(vf_min(vf_max(scaled, vf_set(-bound)), vf_set(bound - 1)));
}

/* Adds a weight that is `fixed`, and its code. */
INLINE void sum_codes(vi fixed, vi code, const int bits, const int squares, struct code_sums *sums) {
    if (bits == 4) sums->a += fixed * code; /* 2^26 at most */
    else sums->sum = vl_dot(sums->sum, fixed, code);
    if (squares) vl_squares(fixed, &sums->even, &sums->odd);
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

/* Codes of w · inverse, and A and B of them; where `squares` is given, also Σ w² in fixed point. `clamp`: they may be out of
 * bounds. */
INLINE struct exact_state round_codes_as(const float *w, size_t n, float unit, float inverse, const int bits, const int clamp,
                                         int8_t *codes, uint64_t *squares) {
    struct code_sums sums = {{0}, {0}, {0}, {0}, {0}};
    for (size_t i = 0; i < n; i += CODE_STEP) { /* codes behind n are 0 */
        vi code[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            const vf v = vf_load(w + i + k * VW);
            code[k] = clamp ? round_code(v * inverse, bits) : vf_round(v * inverse);
            sum_codes(vf_round(v * unit), code[k], bits, squares != NULL, &sums);
        }
        store_codes(code, n - i, codes + i, &sums);
        if (i % PART == PART - CODE_STEP) flush_sums(&sums);
    }
    return sums_of(&sums, squares);
}

static struct exact_state round_codes(const float *w, size_t n, float unit, float inverse, int bits, int8_t *codes) {
    if (bits == 4) return round_codes_as(w, n, unit, inverse, 4, 1, codes, NULL);
    return round_codes_as(w, n, unit, inverse, 8, 1, codes, NULL);
}

#endif
