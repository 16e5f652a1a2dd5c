/* The scale of least squared error of one row, the same exact optimum as quant/optimal_scale.py (read its first lines
 * for the mathematics), by other means: a window of scales that holds the optimum (bracket.h for int4, histogram.h for
 * int8), then a walk over the breakpoints inside it (narrow.h and exact.h).
 *
 * The result is a comparison of float64 A² / B over exact integer states, so it is the torch version's. */
#ifndef NPUQ_KERNELS_OPTIMAL_H
#define NPUQ_KERNELS_OPTIMAL_H

#include "histogram.h"
#include "narrow.h"

/* What a search holds from row to row. */
struct optimal_scratch {
    struct walk_scratch walk;
    struct histogram_scratch histogram;
    struct bracket bracket;
    double ratio; /* of the last row: half its scale over its root mean square */
};

/* Half the best scale over the root mean square, for Gaussian weights in int4: the first row's guess. */
#define GAUSSIAN_RATIO 0.1676
/* How much wider than the window breakpoints are collected, so that floats that round the wrong way do no harm in it. */
#define WINDOW_DOUBT 1e-5

/* Of a row in tables: it must be searched in planes. */
enum { NOT_IN_TABLES = -1 };

/* Half the scale that is likely the best, in the unit of the norm. */
static double guess_half_scale(const struct optimal_scratch *scratch, double norm, size_t n) {
    return (scratch->ratio > 0 ? scratch->ratio : GAUSSIAN_RATIO) * sqrt(norm / (double)n);
}

/* The best state of an int4 row of n weights w · unit (w is not looked at where the row is in tables). `largest` > 0 and
 * `norm` are its largest magnitude and Σ w². NOT_IN_TABLES if the best scale may be below those that tables know. */
static int optimal_int4(const struct searched *row, const float *w, float unit, double largest, double norm,
                        const struct changes *changes, struct optimal_scratch *scratch, struct exact_state *best) {
    const double rms = sqrt(norm / row->weights);
    const double guess = guess_half_scale(scratch, norm, (size_t)row->weights);
    const struct window window = bracket_row(&scratch->bracket, norm, row, largest, guess);
    if (window.open && row->tables != NULL) return NOT_IN_TABLES;
    int status = walk_row(row, w, unit, window, scratch->bracket.best, changes, &scratch->walk, best);
    if (best->b > 0) scratch->ratio = (double)best->a / (double)best->b / 2 / rms;
    return status;
}

/* The best state of an int8 row whose largest magnitude is `largest` > 0. */
static int optimal_int8(const struct optimal_row *row, float largest, struct optimal_scratch *scratch,
                        struct exact_state *best) {
    double floor_score;
    const struct histogram histogram = fill_bins(row, &scratch->histogram);
    const struct interval window = find_window(row, &histogram, largest, &scratch->histogram, &floor_score);
    const int64_t highest = (int64_t)ceil(window.hi * (1 << KAPPA_BITS)), lowest = (int64_t)(window.lo * (1 << KAPPA_BITS));
    const float inverse_hi = (float)(0.5 / (window.hi * (1 + WINDOW_DOUBT)));
    const float inverse_lo = lowest > 0 ? (float)(0.5 / (window.lo * (1 - WINDOW_DOUBT))) : 1e30f;
    size_t count;
    int64_t a, b;
    *best = (struct exact_state){0, 0, 0};
    if (collect(row, inverse_hi, inverse_lo, &scratch->walk, &count, &a, &b) != NPUQ_OK) return NPUQ_NO_MEMORY;
    const int64_t top = highest + (int64_t)((double)highest * 10 * WINDOW_DOUBT) + 1;
    return search_window(&scratch->walk, count, a, b, top, highest, lowest, floor_score, best);
}

#endif
