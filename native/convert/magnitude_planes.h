/* A row of 24-bit magnitudes as a plane of int16 and one of int8, fixed = 256 · high + low, so that the state of any scale
 * costs less than an instruction a weight. Codes are rounded from `high` alone: which side of a threshold a weight is on
 * is certain up to PLANE_DOUBT of its magnitude; the sums A and B of the codes so found are exact.
 *
 * A weight within PLANE_DOUBT of 2^23 would need a `high` of 2^15: it has 2^15 − 1, and what is missing is in `excess`.
 * It is up to twice as far off, but so are all of its thresholds except the first, which lies above every half scale
 * that is looked at. */
#ifndef NPUQ_CONVERT_MAGNITUDE_PLANES_H
#define NPUQ_CONVERT_MAGNITUDE_PLANES_H

#include "common/vectors_int16.h"

enum { PLANE_SHIFT = 8, PLANE_DOUBT = 1 << (PLANE_SHIFT - 1), PLANE_PART = 8192 };

enum { MOST_HIGH = 32767 };

/* Zero-padded to a multiple of 64. */
struct planes {
    int16_t *high;
    int8_t *low;
    size_t n;
    int64_t excess; /* Σ fixed − (256 · high + low), over weights whose `high` is MOST_HIGH */
};

/* The rounding of codes at a half scale: (high · inverse / 2^16 + 2^(shift − 1)) / 2^shift. */
struct rounding {
    int inverse, shift;
};

enum { PLANE_LEAST = 32 << PLANE_SHIFT };

/* The rounding at half scale h or very little beside it, where it is stored; PLANE_LEAST ≤ h ≤ 2^23. */
INLINE struct rounding rounding_at(double *h) {
    /* high · inverse / 2^16 is below 2^14, of which `shift` bits are fraction: |high| ≥ (2m − 1) · h / 256 gives m. */
    uint64_t bits;
    memcpy(&bits, h, sizeof bits);
    int shift = (int)(bits >> 52) - 1023 - PLANE_SHIFT;
    if (shift > 13) shift = 13;
    double unit = (double)(1ull << (15 + PLANE_SHIFT + shift));
    int inverse = (int)(unit / *h);
    if (inverse > 32767) inverse = 32767;
    *h = unit / inverse;
    return (struct rounding){inverse, shift};
}

/* A rounding spread over vectors. */
struct factors {
    vs inverse, half;
    int shift;
};

INLINE struct factors factors_of(struct rounding rounding) {
    return (struct factors){vs_set(rounding.inverse), vs_set(1 << (rounding.shift - 1)), rounding.shift};
}

INLINE vs plane_codes(vs high, struct factors by) {
    return vs_max(vs_min((vs_mulhi(high, by.inverse) + by.half) >> by.shift, vs_set(7)), vs_set(-8));
}

/* The same of one weight. */
INLINE int code_at(int high, struct rounding rounding) {
    int code = (((high * rounding.inverse) >> 16) + (1 << (rounding.shift - 1))) >> rounding.shift;
    return code < -8 ? -8 : code > 7 ? 7 : code;
}

/* A and B. */
struct state_sums {
    int64_t a, b;
};

struct plane_sums {
    vi high, low, squares;
};

INLINE void plane_add(const struct planes *row, size_t i, struct factors by, int exact, struct plane_sums *sums) {
    vs w = vs_load(row->high + i), q = plane_codes(w, by);
    sums->high = vs_dot(sums->high, w, q);
    if (exact) sums->low = vs_dot(sums->low, vs_load_i8(row->low + i), q);
    sums->squares = vs_dot(sums->squares, q, q);
}

/* A and B of the codes of a rounding; without the lower plane A lacks what that adds. */
INLINE struct state_sums sum_planes(const struct planes *row, struct rounding rounding, const int exact) {
    const struct factors by = factors_of(rounding);
    int64_t a = row->excess * code_at(MOST_HIGH, rounding), b = 0;
    for (size_t part = 0; part < row->n; part += PLANE_PART) { /* 32-bit sums hold that many */
        size_t end = part + PLANE_PART < row->n ? part + PLANE_PART : row->n;
        struct plane_sums even = {{0}, {0}, {0}}, odd = even; /* two sets: additions wait for each other */
        for (size_t i = part; i < end; i += 2 * PLANE_STEP) {
            plane_add(row, i, by, exact, &even);
            plane_add(row, i + PLANE_STEP, by, exact, &odd);
        }
        a += vi_total(even.high + odd.high) * (1 << PLANE_SHIFT);
        if (exact) a += vi_total(even.low + odd.low);
        b += vi_total(even.squares + odd.squares);
    }
    return (struct state_sums){a, b};
}

enum { ROUGH_SHIFT = 5, ROUGH_PART = 256 }; /* 2^8 sums of two squares of 2^10 fit 32 bits */

INLINE double rough_squares(int64_t sum) { return ldexp((double)sum, 2 * (ROUGH_SHIFT + PLANE_SHIFT)); }

/* A lower bound of the error that clipping alone makes at half scale h and at all smaller ones. */
static double clipped_planes(const struct planes *row, double h) {
    /* |w| ≥ 256 · |high| − 128 */
    double scale = 2 * h / (1 << PLANE_SHIFT);
    const int top = (int)fmin(7 * scale + 2, 32767), bottom = -(int)fmin(8 * scale + 2, 32767);
    int64_t total = 0;
    for (size_t part = 0; part < row->n; part += ROUGH_PART * PLANE_STEP) {
        size_t end = part + ROUGH_PART * PLANE_STEP < row->n ? part + ROUGH_PART * PLANE_STEP : row->n;
        vi sum = {0};
        for (size_t i = part; i < end; i += PLANE_STEP) {
            vs w = vs_load(row->high + i);
            vs excess = (vs_max(w, vs_set(top)) - vs_set(top)) + (vs_set(bottom) - vs_min(w, vs_set(bottom)));
            excess >>= ROUGH_SHIFT;
            sum = vs_dot(sum, excess, excess);
        }
        total += vi_total(sum);
    }
    return rough_squares(total);
}

/* A lower bound of Σ w² of the weights below half scale h, which are zeros there and at all larger scales. */
static double zeroed_planes(const struct planes *row, double h) {
    const vs limit = vs_set((int)fmax(0, fmin(h / (1 << PLANE_SHIFT) - 1, 32766)));
    int64_t total = 0;
    for (size_t part = 0; part < row->n; part += ROUGH_PART * PLANE_STEP) {
        size_t end = part + ROUGH_PART * PLANE_STEP < row->n ? part + ROUGH_PART * PLANE_STEP : row->n;
        vi sum = {0};
        for (size_t i = part; i < end; i += PLANE_STEP) {
            vs w = vs_max(vs_load(row->high + i), vs_set(-32767)), size = vs_max(w, -w);
            vs least = vs_max(size - vs_set(1), vs_set(0)) & (size <= limit);
            least >>= ROUGH_SHIFT;
            sum = vs_dot(sum, least, least);
        }
        total += vi_total(sum);
    }
    return rough_squares(total);
}

#endif
