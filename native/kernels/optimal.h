/* The scale of least squared error of one row, the same exact optimum as quant/optimal_scale.py (read its first lines
 * for the mathematics), by other means: a window of scales that holds the optimum (bracket.h for int4, histogram.h for
 * int8), then a walk over the breakpoints inside it (exact.h).
 *
 * The result is a comparison of float64 A² / B over exact integer states, so it is the torch version's. */
#ifndef NPUQ_KERNELS_OPTIMAL_H
#define NPUQ_KERNELS_OPTIMAL_H

#include "bracket.h"
#include "exact.h"
#include "histogram.h"

/* What a search holds from row to row. */
struct optimal_scratch {
    struct walk_scratch walk;
    struct histogram_scratch histogram;
    struct bracket bracket;
    double ratio; /* of the last row: half its scale over its root mean square */
    int16_t *high, *low;
    int32_t *active_fixed;
    float *active_magnitude;
};

/* Half the best scale over the root mean square, for Gaussian weights in int4: the first row's guess. */
#define GAUSSIAN_RATIO 0.1676

/* Walks the window; (a, b) is the sum over weights that are not in `row`. */
static int walk_window(const struct optimal_row *row, struct interval window, int64_t a, int64_t b, double floor_score,
                       struct walk_scratch *scratch, struct exact_state *best) {
    /* A little more than the window is collected, so that floats that round the wrong way do no harm inside it. */
    int64_t highest = (int64_t)ceil(window.hi * (1 << KAPPA_BITS)), lowest = (int64_t)(window.lo * (1 << KAPPA_BITS));
    float inverse_hi = (float)(0.5 / (window.hi * (1 + WINDOW_DOUBT)));
    float inverse_lo = lowest > 0 ? (float)(0.5 / (window.lo * (1 - WINDOW_DOUBT))) : 1e30f;
    size_t count;
    int64_t more_a, more_b;
    *best = (struct exact_state){0, 0, 0};
    if (collect(row, inverse_hi, inverse_lo, scratch, &count, &more_a, &more_b) != NPUQ_OK) return NPUQ_NO_MEMORY;
    return search_window(scratch, count, a + more_a, b + more_b, highest, lowest, floor_score, best);
}

static int optimal_int4(const struct optimal_row *row, float largest, double all, struct optimal_scratch *scratch,
                        struct exact_state *best) {
    struct bracket *bracket = &scratch->bracket;
    const struct planes planes = {scratch->high, scratch->low, (row->n + 63) / 64 * 64};
    double rms = sqrt(row->norm / (double)row->n), ratio = scratch->ratio > 0 ? scratch->ratio : GAUSSIAN_RATIO;
    struct interval window = bracket_row(bracket, row, &planes, largest, ratio * rms, all);
    double known = bracket->best;
    struct active_row active = {*row, 0, 0};
    if (window.lo > 0) {
        keep_active(row, (float)(0.5 / (window.hi * (1 + 2 * WINDOW_DOUBT))),
                    (float)(0.5 / (window.lo * (1 - 2 * WINDOW_DOUBT))), scratch->active_fixed,
                    scratch->active_magnitude, &active);
        window = bracket_active(bracket, &active, window, known);
        known = fmax(known, bracket->best);
    }
    int status = walk_window(&active.row, window, active.a, active.b, known * COARSE_SLACK, &scratch->walk, best);
    if (best->b > 0) scratch->ratio = (double)best->a / (double)best->b / 2 / rms;
    return status;
}

/* The best state of a row whose largest magnitude is `largest` > 0; `all`: Σ |w| times its last code. */
static int optimal_state(const struct optimal_row *row, float largest, double all, struct optimal_scratch *scratch,
                         struct exact_state *best) {
    if (row->levels == 8) return optimal_int4(row, largest, all, scratch, best);
    double floor_score;
    struct histogram histogram = fill_bins(row, &scratch->histogram);
    struct interval window = find_window(row, &histogram, largest, &scratch->histogram, &floor_score);
    return walk_window(row, window, 0, 0, floor_score, &scratch->walk, best);
}

#endif
