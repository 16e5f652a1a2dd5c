/* Likelihoods of logits as whole numbers: their sums do not depend on the order, so neither does what a filter keeps.
 *
 * Plain loops, which compilers turn into vectors. Without fused multiply-adds, and with rounding by addition, every level
 * computes the same numbers. */
#ifndef NPUQ_INFERENCE_KERNELS_LIKELIHOODS_H
#define NPUQ_INFERENCE_KERNELS_LIKELIHOODS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "common/levels.h"

/* The least of n logits, and the largest of each GROUP_LANES-th of them: of those at i, i + GROUP_LANES, … (−inf for none). Where
 * one is a NaN, so is `least`. */
static void logit_range(const float *x, size_t n, float *least, float *largest) {
    float low[GROUP_LANES], high[GROUP_LANES], poison[GROUP_LANES];
    for (size_t lane = 0; lane < GROUP_LANES; lane++) {
        low[lane] = INFINITY;
        high[lane] = -INFINITY;
        poison[lane] = 0;
    }
    size_t whole = n / GROUP_LANES * GROUP_LANES;
    for (size_t i = 0; i < whole; i += GROUP_LANES) {
        for (size_t lane = 0; lane < GROUP_LANES; lane++) {
            const float now = x[i + lane];
            low[lane] = now < low[lane] ? now : low[lane];
            high[lane] = now > high[lane] ? now : high[lane];
            poison[lane] = now != now ? now : poison[lane];
        }
    }
    for (size_t lane = 0; lane < n - whole; lane++) {
        const float now = x[whole + lane];
        low[lane] = now < low[lane] ? now : low[lane];
        high[lane] = now > high[lane] ? now : high[lane];
        poison[lane] = now != now ? now : poison[lane];
    }
    *least = INFINITY;
    float bad = 0;
    for (size_t lane = 0; lane < GROUP_LANES; lane++) {
        *least = low[lane] < *least ? low[lane] : *least;
        bad = poison[lane] != poison[lane] ? poison[lane] : bad;
        largest[lane] = high[lane];
    }
    *least += bad;
}

/* Whole numbers that fall as logits rise; both zeros have one. */
static void falling_order(const float *x, size_t n, uint32_t *order) {
    for (size_t i = 0; i < n; i++) {
        const float positive = x[i] + 0.0f; /* no negative zero */
        uint32_t bits;
        memcpy(&bits, &positive, sizeof bits);
        order[i] = bits >> 31 ? bits : 0x7FFFFFFFu - bits;
    }
}

/* likelihood[i] = exp((x[i] − highest) · inverse) in units of 2^-40, of which the highest logit has all 2^40; below e^-64 it
 * is 0. The exponential is off by 3e-10 of itself at most: Taylor's polynomial on |r| ≤ ln(2) / 2. */
static void likelihoods(const float *x, size_t n, float highest, double inverse, int64_t *likelihood) {
    const double shift = 0x1.8p52; /* adding it leaves a whole number in the low bits */
    for (size_t i = 0; i < n; i++) {
        double power = ((double)x[i] - (double)highest) * inverse;
        power = power > -64.0 ? power : -64.0;
        const double rounded = power * 1.4426950408889634 + shift, whole = rounded - shift;
        double r = power - whole * 0x1.62e42fefa38p-1; /* ln 2 in two parts */
        r = r - whole * 0x1.ef35793c7673p-45;
        double p = 1.0 / 40320;
        p = p * r + 1.0 / 5040;
        p = p * r + 1.0 / 720;
        p = p * r + 1.0 / 120;
        p = p * r + 1.0 / 24;
        p = p * r + 1.0 / 6;
        p = p * r + 0.5;
        p = p * r + 1.0;
        p = p * r + 1.0;
        uint64_t bits;
        double scale;
        memcpy(&bits, &rounded, sizeof bits);
        bits = (bits + 1023 + 40) << 52; /* the power of two's exponent; higher bits of `rounded` go */
        memcpy(&scale, &bits, sizeof scale);
        const double unit = p * scale + shift;
        memcpy(&bits, &unit, sizeof bits);
        likelihood[i] = (int64_t)(bits & 0x7FFFFFFFFFFFFu);
    }
}

#endif
