/* The last step of both searches for a row's best scale: every breakpoint inside a window of scales is collected, ordered
 * by its exact integer κ, and walked. quant/optimal_scale.py has the mathematics. */
#ifndef NPUQ_CONVERT_MSE_MSE_BREAKPOINTS_H
#define NPUQ_CONVERT_MSE_MSE_BREAKPOINTS_H

#include <stdlib.h>

#include "common/levels.h"
#include "common/vectors.h"

enum {
    FIXED_BITS = 23,
    KAPPA_BITS = 17, /* κ = ⌊|w| · 2^17 / (2m − 1)⌋: half a scale */
    WINDOW_BINS = 512,
};

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

/* Breakpoints of one window, kept from row to row. */
struct walk_scratch {
    struct breakpoint *breakpoints;
    size_t capacity;
    struct window_bin window[WINDOW_BINS + 2];
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
