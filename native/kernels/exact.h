/* The last step of the search for a row's best scale: every breakpoint inside a window of scales is collected, ordered
 * by its exact integer κ and walked. See quant/optimal_scale.py for the mathematics. */
#ifndef NPUQ_KERNELS_EXACT_H
#define NPUQ_KERNELS_EXACT_H

#include <stdlib.h>

#include "../levels.h"
#include "simd.h"

enum {
    FIXED_BITS = 23,
    KAPPA_BITS = 17, /* κ = ⌊|w| · 2^17 / (2m − 1)⌋: half a scale */
    INT8_LEVELS = 128, /* breakpoints that a negative weight has; a positive one has one less */
    WINDOW_BINS = 512,
};

/* Float32 thresholds may miss a bin's edge by this. */
#define EDGE_DOUBT 1e-6f
/* States of step 1 are compared with this tolerance, those of step 2 exactly (1e-12 covers float64's rounding). */
#define COARSE_SLACK (1 - 1e-9)
#define FINE_SLACK (1 - 1e-12)

struct breakpoint {
    int64_t kappa;
    uint32_t magnitude, odd, next;
};

struct window_bin {
    uint64_t a;
    uint32_t b, count, first;
};

struct interval {
    double hi, lo, bound; /* half scales, in the fixed unit */
};

/* Breakpoints of one window, kept from row to row. */
struct walk_scratch {
    struct breakpoint *breakpoints;
    size_t capacity;
    struct window_bin window[WINDOW_BINS + 2];
};

/* A row for int8 codes in fixed point: values, and their magnitudes as floats (exact). */
struct optimal_row {
    const int32_t *fixed;
    const float *magnitude;
    size_t n;
    double norm; /* Σ fixed² */
};

struct state {
    double a, b;
};

/* Without the calls that NaN takes. */
INLINE double larger(double a, double b) { return a > b ? a : b; }
INLINE double smaller(double a, double b) { return a < b ? a : b; }

INLINE double score_of(struct state state) { return state.b > 0 ? state.a * state.a / state.b : 0; }

/* The largest A² / B of any state between half scales hi and lo. */
static double interval_bound(struct state high, struct state low, double hi, double lo) {
    double alpha = low.a - high.a, beta = low.b - high.b;
    double crossing = (alpha - beta * lo) / (hi - lo);
    crossing = crossing < 0 ? 0 : crossing > beta ? beta : crossing;
    double kink = score_of((struct state){high.a + crossing * hi, high.b + crossing});
    return larger(kink, larger(score_of(high), score_of(low)));
}

INLINE int64_t kappa_of(uint32_t magnitude, const double inverse) {
    /* Fractions are multiples of 1 / 255 at least: the doubt of the product is far less than what is added. */
    return (int64_t)((double)magnitude * inverse + 0.002);
}

struct exact_state {
    int64_t a, b;
    double score;
};

static void offer(struct exact_state *best, int64_t a, int64_t b) {
    double real = (double)a, score = b > 0 ? real * real / (double)b : 0;
    if (score > best->score || (score == best->score && b < best->b)) *best = (struct exact_state){a, b, score};
}

/* Room for that many breakpoints; those that are there stay. */
static int reserve_breakpoints(struct walk_scratch *scratch, size_t count) {
    if (count <= scratch->capacity) return NPUQ_OK;
    struct breakpoint *larger = realloc(scratch->breakpoints, 2 * count * sizeof *larger);
    if (larger == NULL) return NPUQ_NO_MEMORY;
    scratch->breakpoints = larger;
    scratch->capacity = 2 * count;
    return NPUQ_OK;
}

/* Codes at a scale as this level's floats round them. Where they are in doubt (within 1e-6 of the window's ends) no
 * state is offered. */
INLINE vi window_codes(vf magnitude, vf inverse, vf limit) {
    return vf_truncate(vf_min(vf_fma(magnitude, inverse, vf_set(0.5f)), limit));
}

/* Collects every breakpoint between the two scales and sums the state above them. NPUQ_NO_MEMORY if they do not fit. */
static int collect(const struct optimal_row *row, float inverse_hi, float inverse_lo, struct walk_scratch *scratch,
                   size_t *count, int64_t *a, int64_t *b) {
    double inverse[INT8_LEVELS + 1]; /* 2^17 / (2m − 1) */
    for (int m = 1; m <= INT8_LEVELS; m++) inverse[m] = (double)(1 << KAPPA_BITS) / (2 * m - 1);
    size_t found = 0;
    int64_t sum_a = 0, sum_b = 0;
    for (size_t first = 0; first < row->n; first += 256) {
        size_t n = row->n - first < 256 ? row->n - first : 256;
        int32_t high[256], low[256];
        vi changed = {0};
        for (size_t i = 0; i < n; i += VW) {
            /* Arrays are padded to whole vectors of zeros, whose code is 0 at any scale. */
            vf magnitude = vf_load(row->magnitude + first + i);
            vf limit = vi_float((vi_load(row->fixed + first + i) < 0) & 1) + (float)(INT8_LEVELS - 1);
            vi above = window_codes(magnitude, vf_set(inverse_hi), limit);
            vi below = window_codes(magnitude, vf_set(inverse_lo), limit);
            memcpy(high + i, &above, sizeof above);
            memcpy(low + i, &below, sizeof below);
            changed -= above != below;
        }
        uint32_t any = 0, squares = 0;
        for (int lane = 0; lane < VW; lane++) any += (uint32_t)changed[lane];
        for (size_t i = 0; i < n; i++) squares += (uint32_t)(high[i] * high[i]);
        for (size_t i = 0; i < n; i++) sum_a += (int64_t)abs(row->fixed[first + i]) * high[i];
        sum_b += squares;
        if (any == 0) continue;
        if (reserve_breakpoints(scratch, found + (size_t)any * INT8_LEVELS) != NPUQ_OK) return NPUQ_NO_MEMORY;
        uint8_t place[256];
        uint32_t places = 0;
        for (size_t i = 0; i < n; i++) { /* branch-free: which differ cannot be predicted */
            place[places] = (uint8_t)i;
            places += high[i] != low[i];
        }
        for (uint32_t p = 0; p < places; p++) {
            uint32_t i = place[p], magnitude = (uint32_t)abs(row->fixed[first + i]);
            for (int32_t m = high[i] + 1; m <= low[i]; m++) {
                uint32_t odd = 2 * (uint32_t)m - 1;
                scratch->breakpoints[found++] =
                    (struct breakpoint){kappa_of(magnitude, inverse[m]), magnitude, odd, 0};
            }
        }
    }
    *count = found;
    *a = sum_a;
    *b = sum_b;
    return NPUQ_OK;
}

static int by_falling_kappa(const void *left, const void *right) {
    int64_t a = ((const struct breakpoint *)left)->kappa, b = ((const struct breakpoint *)right)->kappa;
    return (a < b) - (a > b);
}

static void sort_breakpoints(struct breakpoint *list, size_t n) {
    if (n > 64) {
        qsort(list, n, sizeof *list, by_falling_kappa);
        return;
    }
    for (size_t i = 1; i < n; i++) {
        struct breakpoint now = list[i];
        size_t j = i;
        for (; j > 0 && list[j - 1].kappa < now.kappa; j--) list[j] = list[j - 1];
        list[j] = now;
    }
}

/* Offers every state of the listed breakpoints that lies inside [lowest, highest]; (a, b) is the state above them. */
static void walk_list(struct breakpoint *list, size_t n, int64_t a, int64_t b, int64_t highest, int64_t lowest,
                      struct exact_state *best) {
    sort_breakpoints(list, n);
    for (size_t i = 0; i < n; i++) {
        a += list[i].magnitude;
        b += list[i].odd;
        /* Those of equal κ climb together. */
        int complete = i + 1 == n || list[i + 1].kappa != list[i].kappa;
        if (complete && list[i].kappa <= highest && list[i].kappa >= lowest) offer(best, a, b);
    }
}

/* The same of one bin. NPUQ_NO_MEMORY if the list cannot be held. */
static int walk_bin(const struct breakpoint *all, const struct window_bin *bin, int64_t a, int64_t b, int64_t highest,
                    int64_t lowest, struct exact_state *best) {
    struct breakpoint few[64], *list = bin->count > 64 ? malloc(bin->count * sizeof *list) : few;
    if (list == NULL) return NPUQ_NO_MEMORY;
    size_t n = 0;
    for (uint32_t at = bin->first; at != 0; at = all[at - 1].next) list[n++] = all[at - 1];
    walk_list(list, n, a, b, highest, lowest, best);
    if (list != few) free(list);
    return NPUQ_OK;
}

/* Offers the states between `highest` and `lowest` that may be better than floor_score. Breakpoints lie roughly between
 * them, none above `top`; (a, b) is the state above all. */
static int search_window(struct walk_scratch *scratch, size_t count, int64_t a, int64_t b, int64_t top, int64_t highest,
                         int64_t lowest, double floor_score, struct exact_state *best) {
    struct breakpoint *all = scratch->breakpoints;
    struct window_bin *bins = scratch->window;
    int shift = 0;
    int64_t most = count / 2 + 16 < WINDOW_BINS ? (int64_t)count / 2 + 16 : WINDOW_BINS; /* two breakpoints a bin */
    while (((highest - lowest) >> shift) >= most) shift++;
    size_t used = (size_t)((highest - lowest) >> shift) + 1;
    memset(bins, 0, used * sizeof *bins);
    for (size_t i = 0; i < count; i++) {
        int64_t kappa = all[i].kappa > highest ? highest : all[i].kappa < lowest ? lowest : all[i].kappa;
        struct window_bin *bin = &bins[(highest - kappa) >> shift];
        bin->a += all[i].magnitude;
        bin->b += all[i].odd;
        bin->count++;
        all[i].next = bin->first;
        bin->first = (uint32_t)i + 1;
    }
    /* States at the edges first: a good best drops more bins. The last bin may hold breakpoints below `lowest`. */
    int64_t at = a, bt = b;
    for (size_t j = 0; j + 1 < used; j++) {
        at += (int64_t)bins[j].a;
        bt += bins[j].b;
        double real = (double)at;
        if (real * real >= best->score * FINE_SLACK * (double)bt) offer(best, at, bt);
    }
    double enough = larger(best->score * FINE_SLACK, floor_score);
    for (size_t j = 0; j < used; j++) {
        /* No breakpoint here climbs by more than this a unit of B. */
        double steepest = (double)(j == 0 ? top : highest - ((int64_t)j << shift) + 1) * 0x1p-17;
        double reach = (double)a + bins[j].b * steepest;
        if (bins[j].count > 0 && reach * reach >= enough * (double)(b + bins[j].b)) {
            if (walk_bin(all, &bins[j], a, b, highest, lowest, best) != NPUQ_OK) return NPUQ_NO_MEMORY;
            enough = larger(best->score * FINE_SLACK, enough);
        }
        a += (int64_t)bins[j].a;
        b += bins[j].b;
    }
    return NPUQ_OK;
}

#endif
