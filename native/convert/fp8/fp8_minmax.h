/* Codes by min-max of an FP8 row, straight from its bytes: one pass after that which finds the largest magnitude. */
#ifndef NPUQ_CONVERT_FP8_FP8_MINMAX_H
#define NPUQ_CONVERT_FP8_FP8_MINMAX_H

#include "convert/fp8/fp8_decode.h"
#include "convert/int4_minmax.h"

/* The largest magnitude of an FP8 row; NaN when one is none, or infinite. */
static float largest_of_fp8(const struct fp8_row *row) {
    float largest = 0, poison = 0;
    int nan = 0;
    const float *block_scale = row->block_scale;
    for (size_t first = 0; first < row->n; first += row->block) {
        const uint8_t code = largest_code(row->x + first, row->n - first < row->block ? row->n - first : row->block);
        const float scale = *block_scale++, w = fabsf(fp8_magnitudes[code] * scale);
        nan |= code == FP8_NAN;
        poison += scale * 0.0f;
        largest = w > largest ? w : largest;
    }
    return nan || poison != 0 || isinf(largest) ? NAN : largest;
}

/* FP8 weights times `scale` over FP8_UNIT, and zeros up to a multiple of CODE_STEP. */
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

/* True where a block of that scale, times the unit of fixed point, may hold non-zeros in a finite row. */
INLINE int is_usable(float scale) { return fabsf(scale * FP8_UNIT) < INFINITY; }

/* The bits of an FP8 magnitude as the upper ones of a float32, four places down, are the magnitude over this: subnormal
 * where it is subnormal (quantize_rows.c sees to it that the processor does not take those for zeros). */
#define MAGNITUDE_UNIT 0x1p120f

/* Magnitudes of CODE_STEP weights times `scale`, which has MAGNITUDE_UNIT in it: those at even places, then the others. */
INLINE void decode_magnitudes(const uint8_t *x, vf scale, float *w) {
    const vs both = vs_load((const int16_t *)x);
    vf v[4];
    vs_upper_halves((both << 4) & vs_set(0x7F0), v);
    vs_upper_halves((both >> 4) & vs_set(0x7F0), v + 2);
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) vf_store(w + k * VW, v[k] * scale);
}

/* Bytes with the signs of others. */
INLINE vs with_signs(vs magnitudes, vs signs) {
#if defined(NPUQ_LEVEL_AVX2)
    return (vs)_mm256_sign_epi8((__m256i)magnitudes, (__m256i)signs); /* 0 under 0 */
#else
    typedef int8_t vbytes __attribute__((vector_size(CODE_STEP)));
    const vbytes negative = (vbytes)((vbytes)signs < 0);
    return (vs)(((vbytes)magnitudes ^ negative) - negative);
#endif
}

/* int4 codes of such magnitudes of the weights x. */
INLINE void round_magnitudes(const float *w, vf inverse, const uint8_t *x, int8_t *codes, struct error_part *part) {
    vi fixed[4], code[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        const vf v = vf_load(w + k * VW);
        fixed[k] = vf_round(v);
        code[k] = vf_round(v * inverse);
    }
    const vs even = vs_pack(code[0], code[1]), odd = vs_pack(code[2], code[3]);
    const vs sizes = even | (odd << 8), bytes = with_signs(sizes, vs_load((const int16_t *)x));
    add_to_part(part, vs_pack(fixed[0], fixed[1]), vs_pack(fixed[2], fixed[3]), even, odd, vs_square_bytes(sizes));
    memcpy(codes, &bytes, sizeof bytes);
}

/* int4 codes of up to PART weights, in whole steps. Decoded apart from the rest: chains of half the length. */
INLINE void round_part(const uint8_t *x, size_t count, float scale, float inverse, int8_t *codes, struct error_sums *sums) {
    float w[PART];
    struct error_part part = {0};
#pragma GCC unroll 4
    for (size_t i = 0; i < count; i += CODE_STEP) decode_magnitudes(x + i, vf_set(scale), w + i);
#pragma GCC unroll 4
    for (size_t i = 0; i < count; i += CODE_STEP) round_magnitudes(w + i, vf_set(inverse), x + i, codes + i, &part);
    add_part(sums, &part);
}

/* The same of fewer than PART weights. Like what follows not inlined, so that the sums of whole parts stay in registers. */
__attribute__((noinline)) static struct error_sums round_rest(const uint8_t *x, size_t count, float scale, float inverse,
                                                        int8_t *codes) {
    struct error_sums sums = {0};
    uint8_t lane[PART] = {0};
    int8_t to[PART];
    memcpy(lane, x, count);
    round_part(lane, count, scale, inverse, to, &sums);
    memcpy(codes, to, count);
    return sums;
}

/* Codes of a block whose scale, without MAGNITUDE_UNIT, is negative or has no room for that: one of small magnitudes in
 * which the row's largest weights are. */
__attribute__((noinline)) static struct error_sums round_odd_block(const uint8_t *x, size_t count, float scale, float inverse,
                                                             int8_t *codes) {
    struct error_sums sums = {0};
    for (size_t part = 0; part < count; part += PART) {
        float w[PART];
        const size_t end = count - part < PART ? count - part : PART;
        decode_part(x + part, end, scale * FP8_UNIT, w);
        sums = join_errors(sums, round_stored((const char *)w, NPUQ_F32, end, 1, inverse, codes + part));
    }
    return sums;
}

/* int4 codes of an FP8 row. The unit of fixed point is a power of two: it may be taken times a block's scale, and off the
 * inverse, without changing what is rounded. */
static struct error_sums round_fp8_int4(const struct fp8_row *row, float unit, float inverse, int8_t *codes) {
    struct error_sums sums = {0};
    const float *block_scale = row->block_scale, to_code = inverse / unit;
    for (size_t first = 0; first < row->n; first += row->block) {
        const size_t count = row->n - first < row->block ? row->n - first : row->block;
        const uint8_t *x = row->x + first;
        const float scale = *block_scale++ * unit, up = scale * MAGNITUDE_UNIT;
        if (up >= 0 && up < INFINITY) {
            size_t i = 0;
            /* Without this prefetch the next row would come too late for the pass that finds the largest. */
            for (size_t line = 0; line < count; line += 64) __builtin_prefetch(x + row->n + line, 0, 2);
            for (; i + PART <= count; i += PART) round_part(x + i, PART, up, to_code, codes + first + i, &sums);
            if (i < count) sums = join_errors(sums, round_rest(x + i, count - i, up, to_code, codes + first + i));
        } else if (is_usable(scale)) {
            sums = join_errors(sums, round_odd_block(x, count, scale, to_code, codes + first));
        } else {
            memset(codes + first, 0, count);
        }
    }
    return sums;
}

/* int8 codes of an FP8 row; Σ w² in fixed point, A and B of them. */
static struct exact_state round_fp8_int8(const struct fp8_row *row, float unit, float inverse, int8_t *codes,
                                         uint64_t *squares) {
    struct code_sums sums = {{0}, {0}, {0}, {0}, {0}};
    const float to_code = inverse / unit;
    for (size_t first = 0; first < row->n; first += row->block) {
        const size_t count = row->n - first < row->block ? row->n - first : row->block;
        const uint8_t *x = row->x + first;
        const float scale = row->block_scale[first / row->block] * unit;
        if (!is_usable(scale)) {
            memset(codes + first, 0, count);
            continue;
        }
        for (size_t part = 0; part < count; part += PART) { /* decoded apart from the rest: chains of half the length */
            float w[PART];
            const size_t end = count - part < PART ? count - part : PART;
            decode_part(x + part, end, scale * FP8_UNIT, w);
            for (size_t i = 0; i < end; i += CODE_STEP) {
                vi code[4];
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    const vf v = vf_load(w + i + k * VW);
                    code[k] = vf_round(v * to_code);
                    sum_codes(vf_round(v), code[k], 8, 1, &sums);
                }
                store_codes(code, end - i, codes + first + part + i, &sums);
            }
            flush_sums(&sums);
        }
    }
    return sums_of(&sums, squares);
}

/* int8 or int4 from an FP8 row. */
static int convert_minmax_fp8(const struct fp8_row *row, int bits, struct converted *out) {
    const float largest = largest_of_fp8(row);
    int exponent;
    if (largest != largest) return NPUQ_NOT_FINITE;
    if (largest < LEAST_MAGNITUDE) {
        zero_row(out, row->n);
        return NPUQ_OK;
    }
    out->scale = largest / (float)((1 << (bits - 1)) - 1);
    if (bits == 4) {
        const float unit = unit_of(ERROR_BITS, largest, &exponent);
        const struct error_sums sums = round_fp8_int4(row, unit, 1.0f / out->scale, out->codes);
        account_error(out, &sums, exponent);
    } else {
        uint64_t squares;
        const float unit = fixed_unit(largest, &exponent);
        const struct exact_state state = round_fp8_int8(row, unit, 1.0f / out->scale, out->codes, &squares);
        account(out, (double)squares, state, exponent);
    }
    return NPUQ_OK;
}

#endif
