/* int4 by least squared error: the exact optimum of quant/optimal_scale.py, whose first lines have the mathematics. Here
 * it takes two steps: a window of scales that holds the optimum (int4_mse_window.h), then a walk over the breakpoints
 * inside it (int4_mse_walk.h, mse_breakpoints.h).
 *
 * States are exact integers and are compared by A² / B in float64, as in the torch version: the results are equal. */
#ifndef NPUQ_CONVERT_MSE_INT4_MSE_H
#define NPUQ_CONVERT_MSE_INT4_MSE_H

#include "convert/mse/int8_mse.h"
#include "convert/mse/int4_mse_walk.h"

/* The state of a search that is kept from row to row. */
struct optimal_scratch {
    struct walk_scratch walk;
    struct bracket bracket;
    struct int8_search int8;
    struct place_rows rows;
    double ratio; /* of the last row: half its scale over its root mean square */
};

/* Half the best scale over the root mean square, for Gaussian weights in int4: the first row's guess. */
#define GAUSSIAN_RATIO 0.1676

/* Of a row in tables: it must be searched in planes. */
enum { NOT_IN_TABLES = -1 };

/* Half the scale that is likely the best, in the unit of the norm. */
static double guess_half_scale(const struct optimal_scratch *scratch, double norm, size_t n) {
    return (scratch->ratio > 0 ? scratch->ratio : GAUSSIAN_RATIO) * sqrt(norm / (double)n);
}

/* The best state of an int4 row of n weights w · unit (w is not looked at where the row is in tables). `largest` > 0 and
 * `norm` are its largest magnitude and Σ w². NOT_IN_TABLES if the best scale may be below those that tables know, or
 * the window is wide. */
static int optimal_int4(const struct searched *row, const float *w, float unit, double largest, double norm,
                        const struct changes *changes, struct optimal_scratch *scratch, struct exact_state *best) {
    const double rms = sqrt(norm / row->weights);
    const double guess = guess_half_scale(scratch, norm, (size_t)row->weights);
    const struct window window = bracket_row(&scratch->bracket, norm, row, largest, guess);
    if (row->tables != NULL && !is_narrow(window)) return NOT_IN_TABLES;
    int status = walk_row(row, w, unit, window, scratch->bracket.best, changes, &scratch->walk, best);
    if (best->b > 0) scratch->ratio = (double)best->a / (double)best->b / 2 / rms;
    return status;
}

#endif
