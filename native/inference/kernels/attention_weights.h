/* Weights of attention from scores, sixteen rows to a vector: as pairs of bf16 or as four bytes, which products of bf16
 * and of int8 take. A row's maximum and sum go on from tile to tile (online softmax), with no step across lanes.
 *
 * Weights are rounded, and their sum is that of the rounded ones. A score that is no number, or infinite, makes the sum none. */
#ifndef NPUQ_INFERENCE_KERNELS_ATTENTION_WEIGHTS_H
#define NPUQ_INFERENCE_KERNELS_ATTENTION_WEIGHTS_H

#include "common/levels.h"
#include "common/vectors.h"

#if defined(NPUQ_LEVEL_BF16)

INLINE vf bf16_dot(vf sum, vi a, vi b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

/* e^x of x ≤ 0 to 3e-6 of itself, and exactly 1 of 0; below e^-87 and for a NaN it is 2^-125. A polynomial of 2^f on
 * |f| ≤ 1/2 (least relative error, fitted with its first coefficient 1): less than vf_exp, whose digits rounding would drop. */
INLINE vf falling_exp(vf x) {
    const vf power = vf_max(x * 1.44269504f, vf_set(-125));
    const vi whole = vf_round(power);
    const vf f = power - vi_float(whole);
    vf p = vf_fma(f, vf_set(0.009582849219441414f), vf_set(0.05590642988681793f));
    p = vf_fma(p, f, vf_set(0.24024099111557007f));
    p = vf_fma(p, f, vf_set(0.6931241750717163f));
    p = vf_fma(p, f, vf_set(1));
    return (vf)((vi)p + (whole << 23));
}

/* What a tile's scores add to the rows: their greatest, from `most` on, and 0, or a NaN for scores that are none. */
struct tile_range {
    vf most, poison;
};

INLINE vf pick(vi mask, vf a) { return (vf)(mask & (vi)a); }

INLINE void add_score(const float *score, size_t j, float scale, const int all, vi sees, vf *most, vf *poison) {
    vf now = vf_load(score + 16 * j) * scale, there = now;
    if (!all) {
        const vi seen = sees > (int32_t)j;
        there = pick(seen, now); /* 0 where not seen */
        now = (vf)((vi)there | (~seen & (vi)vf_set(-INFINITY)));
    }
    *most = vf_max(now, *most); /* the maximum so far where a score is no number */
    *poison = vf_fma(there, vf_set(0), *poison);
}

/* By turns in two sums, so that one need not wait for the one before it. */
INLINE struct tile_range find_range(const float *score, size_t count, float scale, vf most, const int all, vi sees) {
    vf high = most, other_high = most, poison = vf_set(0), other_poison = vf_set(0);
    size_t j = 0;
    for (; j + 2 <= count; j += 2) {
        add_score(score, j, scale, all, sees, &high, &poison);
        add_score(score, j + 1, scale, all, sees, &other_high, &other_poison);
    }
    if (j < count) add_score(score, j, scale, all, sees, &high, &poison);
    return (struct tile_range){vf_max(high, other_high), poison + other_poison};
}

INLINE vf bf16_weight(const float *score, size_t j, float scale, vf base, const int all, vi sees) {
    const vf weight = falling_exp(vf_load(score + 16 * j) * scale - base);
    return all ? weight : pick(sees > (int32_t)j, weight);
}

/* Two keys' weights, each to the nearest bf16 (halves away from zero). */
INLINE vi bf16_pair(vf first, vf second) {
    typedef uint32_t vu __attribute__((vector_size(VW * 4)));
    return (vi)((((vu)first + 0x8000) >> 16) | (((vu)second + 0x8000) & 0xFFFF0000));
}

INLINE void bf16_softmax_of(const float *score, size_t count, float scale, const int all, vi sees, float *largest, float *total,
                            float *keep, uint32_t *weight) {
    const vf before = vf_load(largest), limit = vf_set(-INFINITY);
    const struct tile_range range = find_range(score, count, scale, before, all, sees);
    const vf base = pick(range.most != limit, range.most);
    const vi ones = (vi)vf_set(1) | ((vi)vf_set(1) >> 16);
    vf sum = vf_set(0);
    size_t j = 0;
    for (; j + 2 <= count; j += 2) {
        const vi pair = bf16_pair(bf16_weight(score, j, scale, base, all, sees), bf16_weight(score, j + 1, scale, base, all, sees));
        sum = bf16_dot(sum, pair, ones);
        vf_store((float *)weight + 8 * j, (vf)pair);
    }
    if (j < count) {
        const vi pair = bf16_pair(bf16_weight(score, j, scale, base, all, sees), vf_set(0));
        sum = bf16_dot(sum, pair, ones);
        vf_store((float *)weight + 8 * j, (vf)pair);
    }
    const vf kept = pick(before != limit, vf_exp(before - base));
    vf_store(keep, kept);
    vf_store(total, vf_load(total) * kept + (sum + range.poison));
    vf_store(largest, range.most);
}

static void bf16_softmax(const float *score, size_t count, float scale, const int32_t *seen, float *largest, float *total,
                         float *keep, uint32_t *weight) {
    if (seen == NULL) bf16_softmax_of(score, count, scale, 1, (vi)vf_set(0), largest, total, keep, weight);
    else bf16_softmax_of(score, count, scale, 0, vi_load(seen), largest, total, keep, weight);
}

/* Weights in units of 1/255 of the tile's largest, which `factor` holds. */
static void int8_softmax(const float *score, size_t count, float scale, float *largest, float *total, float *keep, float *factor,
                         uint32_t *weight) {
    const vf before = vf_load(largest), limit = vf_set(-INFINITY);
    const struct tile_range range = find_range(score, count, scale, limit, 1, (vi)limit);
    const vf tile = pick(range.most != limit, range.most), most = vf_max(range.most, before), base = pick(most != limit, most);
    vi sum = (vi)vf_set(0);
    for (size_t j = 0; j < count; j += 4) {
        vi four = (vi)vf_set(0);
        for (size_t k = 0; k < 4 && j + k < count; k++) {
            const vi code = vf_round(falling_exp(vf_load(score + 16 * (j + k)) * scale - tile) * 255.0f);
            sum = sum + code;
            four = four | code << (int)(8 * k);
        }
        vf_store((float *)weight + 4 * j, (vf)four);
    }
    const vf kept = pick(before != limit, vf_exp(before - base));
    const vf unit = pick(range.most != limit, vf_exp(range.most - base)) / 255.0f;
    vf_store(keep, kept);
    vf_store(factor, unit);
    vf_store(total, vf_load(total) * kept + (vi_float(sum) * unit + range.poison));
    vf_store(largest, most);
}

#endif

#endif
