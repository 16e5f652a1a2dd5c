/* A source row becomes codes: it is decoded, scaled and rounded, and its error is summed, while it sits in cache.
 *
 * Every level gives the same bits as quant/scales.py: products and sums whose order could show are of integers, and
 * float operations are one an element, never fused. */
#ifndef NPUQ_CONVERT_QUANTIZE_ROW_H
#define NPUQ_CONVERT_QUANTIZE_ROW_H

#include "convert/int_codes.h"
#include "convert/fp8/fp8_int4_mse.h"
#include "convert/fp8/fp8_minmax.h"
#include "convert/fp4_row.h"
#include "common/float_rows.h"

/* A block of up to `count` weights; raises `largest`. */
INLINE vf decode_block(const uint8_t *x, size_t count, float scale, float *out, vf largest) {
    size_t i = 0;
    for (; i + VW <= count; i += VW) {
        vf w = vf_load_fp8(x + i) * scale;
        vf_store(out + i, w);
        largest = vf_max(vf_abs(w), largest);
    }
    if (i < count) {
        uint8_t lane[16] = {0};
        memcpy(lane, x + i, count - i);
        vf w = vf_load_fp8(lane) * scale;
        vf_store_part(out + i, w, count - i);
        largest = vf_max(vf_abs(w), largest);
    }
    return largest;
}

static float decode_fp8(const uint8_t *x, size_t n, const float *block_scale, size_t block, float *out) {
    uint8_t nan = 0;
    vf most = vf_set(0);
    float poison = 0;
    for (size_t i = 0; i < n; i++) nan |= (x[i] & 0x7F) == 0x7F;
    for (size_t first = 0; first < n; first += block) {
        float scale = block_scale[first / block];
        most = decode_block(x + first, first + block < n ? block : n - first, scale, out + first, most);
        poison += scale * 0.0f;
    }
    /* Finite scales leave only overflow, which a maximum keeps. */
    float largest = vf_largest(most);
    return nan || poison != 0 || isinf(largest) ? NAN : largest;
}

/* 32 codes of 16 bytes. In 16 bits, b | b << 4 has a byte's nibbles in the low halves of both bytes. */
INLINE void spread_u4(const uint8_t *x, int8_t *codes) {
    typedef uint8_t vb16 __attribute__((vector_size(16)));
    typedef uint16_t vh16 __attribute__((vector_size(32)));
    typedef int8_t vc32 __attribute__((vector_size(32)));
    vb16 byte;
    memcpy(&byte, x, sizeof byte);
    vh16 wide = __builtin_convertvector(byte, vh16);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    wide = (wide << 8 | wide >> 4) & 0x0F0F;
#else
    wide = (wide | wide << 4) & 0x0F0F;
#endif
    vc32 code = (vc32)wide - 8;
    memcpy(codes, &code, sizeof code);
}

/* Up to 32 values of a block, an even number; raises `largest`. */
INLINE vf decode_u4_step(const uint8_t *x, size_t count, float scale, float *out, vf largest) {
    uint8_t rest[16] = {0};
    int8_t codes[32];
    if (count < 32) x = memcpy(rest, x, count / 2);
    spread_u4(x, codes);
    for (size_t i = 0; i < count; i += VW) {
        vf w = vf_load_i8(codes + i) * scale;
        if (count - i >= VW) {
            vf_store(out + i, w);
        } else {
            vf_store_part(out + i, w, count - i);
            w = vf_load_part(out + i, count - i);
        }
        largest = vf_max(vf_abs(w), largest);
    }
    return largest;
}

static float decode_u4(const uint8_t *x, size_t n, const float *block_scale, size_t block, float *out) {
    vf most = vf_set(0);
    float poison = 0;
    for (size_t first = 0; first < n; first += block) {
        const float scale = block_scale[first / block];
        const size_t end = first + block < n ? first + block : n;
        size_t i = first;
        for (; i + 32 <= end; i += 32) most = decode_u4_step(x + i / 2, 32, scale, out + i, most);
        if (i < end) most = decode_u4_step(x + i / 2, end - i, scale, out + i, most);
        poison += scale * 0.0f;
    }
    float largest = vf_largest(most);
    return poison != 0 || isinf(largest) ? NAN : largest;
}

static float decode_row(const void *x, int dtype, size_t n, const float *block_scale, size_t block, float *out) {
    if (dtype == NPUQ_F8E4M3) return decode_fp8(x, n, block_scale, block, out);
    if (dtype == NPUQ_U4) return decode_u4(x, n, block_scale, block, out);
    if (dtype == NPUQ_F4) return decode_fp4(x, n, block_scale, block, out);
    to_float(x, dtype, n, out);
    return largest_stored(x, dtype, n);
}

/* Rows are zero-padded to padded_length here, and so is what is made of them. Gives the exact Σ w², which is 2^63 at
 * most. `full`: some weight may need a `high` of 2^15. */
INLINE uint64_t to_planes_as(const float *w, float unit, struct planes *planes, const int full) {
    const vi half = (vi){0} + PLANE_DOUBT, most = (vi){0} + 127;
    vl even = {0}, odd = {0};
    vi excess = {0}; /* 2^17 / VW times 2^8 fits */
    for (size_t i = 0; i < planes->n; i += 2 * PLANE_STEP) {
        vi high[4], low[4];
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) {
            vi whole = vf_round(vf_load(w + i + k * VW) * unit);
            high[k] = (whole + half) >> PLANE_SHIFT;
            vi over = full ? high[k] > MOST_HIGH : (vi){0}; /* -1 where it is */
            high[k] += over;
            low[k] = whole - (high[k] << PLANE_SHIFT);
            if (full) {
                excess += (low[k] - most) & over;
                low[k] = (most & over) | (low[k] & ~over);
            }
            vl_squares(whole, &even, &odd);
        }
        vs_narrow(planes->high + i, high[0], high[1]);
        vs_narrow(planes->high + i + PLANE_STEP, high[2], high[3]);
        vi_store_i8x4(planes->low + i, low[0], low[1], low[2], low[3]);
    }
    planes->excess = vi_total(excess);
    return (uint64_t)vl_total(even) + (uint64_t)vl_total(odd);
}

static uint64_t to_planes(const float *w, float unit, float largest, struct planes *planes) {
    if (largest + PLANE_DOUBT < 0x1p23f) return to_planes_as(w, unit, planes, 0);
    return to_planes_as(w, unit, planes, 1);
}

/* Width, relative, below which an interval of scales stays as it is. */
#define PLANE_NARROW 0.02

/* From a stored row; LEAST_MAGNITUDE and below count as zeros. < 0 if it must be decoded and go through convert_row. */
static int convert_stored(const void *x, int dtype, size_t n, const float *block_scale, size_t block, int bits, int mse,
                          void *memory, struct converted *out) {
    if (dtype == NPUQ_F8E4M3) {
        const struct fp8_row row = {x, n, block, block_scale};
        if (!mse) return convert_minmax_fp8(&row, bits, out);
        return bits == 4 ? convert_distinct(&row, memory, out) : NOT_IN_TABLES;
    }
    if (dtype == NPUQ_F4 && bits == 4) return convert_fp4(x, n, block_scale, block, mse, out);
    if (dtype == NPUQ_U4 || dtype == NPUQ_F4) return NOT_IN_TABLES;
    return bits == 4 && !mse ? convert_minmax_int4(x, dtype, n, out) : NOT_IN_TABLES;
}

static int convert_row(const float *w, size_t n, float largest, int bits, int mse, void *memory, struct converted *out) {
    int exponent;
    if (largest < LEAST_MAGNITUDE) {
        zero_row(out, n);
        return NPUQ_OK;
    }
    if (!mse) return convert_minmax_int8(w, n, largest, out); /* int4: convert_stored */
    const float unit = fixed_unit(largest, &exponent);
    struct convert_memory layout = convert_layout(memory, n);
    const float top = rintf(ldexpf(largest, FIXED_BITS - exponent));
    double norm_fixed;
    struct exact_state best;
    if (bits == 4) {
        norm_fixed = (double)to_planes(w, unit, top, &layout.planes);
        const struct searched row = {&layout.planes, NULL, (double)n, PLANE_LEAST, PLANE_DOUBT, PLANE_NARROW};
        int status = optimal_int4(&row, w, unit, top, norm_fixed, &layout.changes, layout.search, &best);
        if (status != NPUQ_OK) return status;
    } else {
        struct int8_row row = {.w = w, .high = layout.high, .low = layout.low, .n = n, .unit = unit};
        split_row(&row);
        norm_fixed = row.norm;
        best = search_int8(&row, top, &layout.search->int8);
    }
    out->scale = (float)ldexp((double)best.a / (double)(best.b > 0 ? best.b : 1), exponent - FIXED_BITS);
    struct exact_state state = round_codes(w, n, unit, 1.0f / out->scale, bits, out->codes);
    account(out, norm_fixed, state, exponent);
    return NPUQ_OK;
}

static void convert_release(void *memory) { free(((struct optimal_scratch *)memory)->walk.breakpoints); }

#endif
