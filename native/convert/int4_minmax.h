/* Codes by min-max. int4 codes come straight from the stored row: of float rows here, of FP8 rows in fp8_minmax.h.
 *
 * The scale is the largest magnitude over the largest code M. It, its inverse and the inverse's product with a weight are
 * float32 operations, each off by 2^-24 of its result at most: the first two are never subnormal (LEAST_MAGNITUDE ≤ largest
 * < 2^128), and where the product is one, the code is 0. So |w · inverse| ≤ M · (1 + 2^-22), which rounds to M at most:
 * there is nothing to clamp. */
#ifndef NPUQ_CONVERT_INT4_MINMAX_H
#define NPUQ_CONVERT_INT4_MINMAX_H

#include "common/float_rows.h"
#include "convert/minmax_error.h"

INLINE void zero_row(struct converted *out, size_t n) {
    memset(out->codes, 0, n);
    out->scale = 1;
    out->error = out->norm = 0;
}

/* The largest magnitude of a row without scales; NaN when one is none, or infinite. The bits of magnitudes are in their
 * order, and those of what is not finite above all others. */
static float largest_stored(const void *x, int dtype, size_t n) {
    if (dtype == NPUQ_F32) return largest_finite(x, n);
    const int16_t *at = x;
    const vs magnitude = vs_set(0x7FFF);
    vs most[2] = {vs_set(0), vs_set(0)};
    size_t i = 0;
    for (; i + 2 * PLANE_STEP <= n; i += 2 * PLANE_STEP) {
        most[0] = vs_max(most[0], vs_load(at + i) & magnitude);
        most[1] = vs_max(most[1], vs_load(at + i + PLANE_STEP) & magnitude);
    }
    int16_t lane[2 * PLANE_STEP] = {0};
    memcpy(lane, at + i, (n - i) * sizeof *at);
    most[0] = vs_max(most[0], vs_load(lane) & magnitude);
    most[1] = vs_max(most[1], vs_load(lane + PLANE_STEP) & magnitude);
    const vs both = vs_max(most[0], most[1]);
    int16_t bits = 0;
    for (int k = 0; k < PLANE_STEP; k++) bits = both[k] > bits ? both[k] : bits;
    if (bits >= (dtype == NPUQ_BF16 ? 0x7F80 : 0x7C00)) return NAN;
    float largest[VW];
    uint16_t first[VW] = {(uint16_t)bits};
    to_float(first, dtype, VW, largest);
    return largest[0];
}

/* CODE_STEP stored weights, in the order of the level's `vs_pack` backwards: packed two by two they are as they lie there. For
 * float32 and float16 only `vi_store_i8x4` puts them so. */
INLINE void load_step(const char *x, const int dtype, vf v[4]) {
    if (dtype == NPUQ_BF16) {
        vs_upper_halves(vs_load((const int16_t *)x), v);
        vs_upper_halves(vs_load((const int16_t *)x + PLANE_STEP), v + 2);
        return;
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) v[k] = vf_load_as(x, dtype, (size_t)k * VW);
}

/* int4 codes of a step. */
INLINE void round_step(const char *x, const int dtype, float unit, float inverse, int8_t *codes, struct error_part *part) {
    vf v[4];
    vi fixed[4], code[4];
    load_step(x, dtype, v);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        fixed[k] = vf_round(v[k] * unit);
        code[k] = vf_round(v[k] * inverse);
    }
    const vs first_two = vs_pack(code[0], code[1]), last_two = vs_pack(code[2], code[3]);
    add_to_part(part, vs_pack(fixed[0], fixed[1]), vs_pack(fixed[2], fixed[3]), first_two, last_two,
         first_two * first_two + last_two * last_two);
    if (dtype == NPUQ_BF16) vs_store_i8x2(codes, first_two, last_two);
    else vi_store_i8x4(codes, code[0], code[1], code[2], code[3]);
}

/* int4 codes of `count` stored weights that have no scales. */
INLINE struct error_sums round_stored(const char *x, const int dtype, size_t count, float unit, float inverse, int8_t *codes) {
    const size_t size = size_of(dtype);
    struct error_sums sums = {0};
    for (size_t i = 0; i < count;) {
        struct error_part part = {0};
        for (const size_t end = i + PART; i < end && i + CODE_STEP <= count; i += CODE_STEP) {
            __builtin_prefetch(x + (count + i) * size, 0, 2); /* the next row */
            round_step(x + i * size, dtype, unit, inverse, codes + i, &part);
        }
        if (count - i < CODE_STEP && i < count) {
            char lane[CODE_STEP * 4] = {0};
            int8_t to[CODE_STEP];
            memcpy(lane, x + i * size, (count - i) * size);
            round_step(lane, dtype, unit, inverse, to, &part);
            memcpy(codes + i, to, count - i);
            i = count;
        }
        add_part(&sums, &part);
    }
    return sums;
}

/* int4 from a row without scales; a function each, as loops of their own. */
__attribute__((noinline)) static struct error_sums round_f32(const char *x, size_t n, float unit, float inverse, int8_t *codes) {
    return round_stored(x, NPUQ_F32, n, unit, inverse, codes);
}
__attribute__((noinline)) static struct error_sums round_bf16(const char *x, size_t n, float unit, float inverse, int8_t *codes) {
    return round_stored(x, NPUQ_BF16, n, unit, inverse, codes);
}
__attribute__((noinline)) static struct error_sums round_f16(const char *x, size_t n, float unit, float inverse, int8_t *codes) {
    return round_stored(x, NPUQ_F16, n, unit, inverse, codes);
}

static int convert_minmax_int4(const char *x, int dtype, size_t n, struct converted *out) {
    const float largest = largest_stored(x, dtype, n);
    int exponent;
    if (largest != largest) return NPUQ_NOT_FINITE;
    if (largest < LEAST_MAGNITUDE) {
        zero_row(out, n);
        return NPUQ_OK;
    }
    out->scale = largest / 7;
    const float unit = unit_of(ERROR_BITS, largest, &exponent), inverse = 1.0f / out->scale;
    const struct error_sums sums = dtype == NPUQ_F32    ? round_f32(x, n, unit, inverse, out->codes)
                             : dtype == NPUQ_BF16 ? round_bf16(x, n, unit, inverse, out->codes)
                                                  : round_f16(x, n, unit, inverse, out->codes);
    account_error(out, &sums, exponent);
    return NPUQ_OK;
}

/* int8 from floats, LEAST_MAGNITUDE ≤ largest. */
static int convert_minmax_int8(const float *w, size_t n, float largest, struct converted *out) {
    int exponent;
    uint64_t squares;
    const float unit = fixed_unit(largest, &exponent);
    out->scale = largest / 127;
    const struct exact_state state = round_codes_as(w, n, unit, 1.0f / out->scale, 8, 0, out->codes, &squares);
    account(out, (double)squares, state, exponent);
    return NPUQ_OK;
}

#endif
