/* GPTQ of a panel of columns, from the last to the first, a vector of rows at a time. Matrices are transposed: a row of memory
 * has one column of all rows of the weight. */
#ifndef NPUQ_CALIBRATE_GPTQ_COLUMNS_H
#define NPUQ_CALIBRATE_GPTQ_COLUMNS_H

#include "calibrate/float_product.h"
#include "common/levels.h"

/* Columns whose errors reach the columns before them at once: their errors stay in registers. */
enum { GPTQ_STEP = 8 };

INLINE vi column_code(vf scaled, const int bits) {
    const float bound = (float)(1 << (bits - 1));
    return vf_round(vf_min(vf_max(scaled, vf_set(-bound)), vf_set(bound - 1)));
}

/* Rounds column j of the rows at `row`; returns its errors. */
INLINE vf round_column(const struct gptq_panel *panel, size_t j, size_t row, vf scale, vf inverse, const int bits) {
    const float diagonal = panel->lower[j * panel->ldl + j];
    float *sums = panel->sums + j * panel->rows + row;
    const vf weight = vf_load(panel->weight + j * panel->rows + row), before = vf_load(sums);
    const vf target = weight + before * vf_set(1.0f / diagonal);
    const vi code = column_code(target * inverse, bits);
    const vf error = weight - vi_float(code) * scale;
    vi_store_i8(panel->codes + j * panel->rows + row, code);
    vf_store(panel->errors + j * panel->rows + row, error);
    vf_store(sums, chain_fma(error, vf_set(diagonal), before));
    return error;
}

/* Adds the errors of `count` columns below `end` to column i, the last column first. */
INLINE void add_errors(const struct gptq_panel *panel, const vf *error, size_t end, const int count, size_t i, size_t row) {
    float *to = panel->sums + i * panel->rows + row;
    vf sum = vf_load(to);
#pragma GCC unroll 8
    for (int t = 0; t < count; t++) {
        sum = chain_fma(error[t], vf_set(panel->lower[(end - 1 - (size_t)t) * panel->ldl + i]), sum);
    }
    vf_store(to, sum);
}

INLINE void gptq_lanes(const struct gptq_panel *panel, size_t row, const int bits) {
    const vf scale = vf_load(panel->scale + row), inverse = vf_set(1) / scale;
    size_t end = panel->columns;
    while (end >= GPTQ_STEP) {
        vf error[GPTQ_STEP];
        for (size_t t = 0; t < GPTQ_STEP; t++) {
            error[t] = round_column(panel, end - 1 - t, row, scale, inverse, bits);
            for (size_t i = end - GPTQ_STEP; i < end - 1 - t; i++) add_errors(panel, error + t, end - t, 1, i, row);
        }
        for (size_t i = 0; i < end - GPTQ_STEP; i++) add_errors(panel, error, end, GPTQ_STEP, i, row);
        end -= GPTQ_STEP;
    }
    for (; end > 0; end--) {
        const vf error = round_column(panel, end - 1, row, scale, inverse, bits);
        for (size_t i = 0; i + 1 < end; i++) add_errors(panel, &error, end, 1, i, row);
    }
}

static void gptq_columns(const struct gptq_panel *panel) {
    for (size_t row = 0; row < panel->rows; row += VW) {
        if (panel->bits == 4) gptq_lanes(panel, row, 4);
        else gptq_lanes(panel, row, 8);
    }
}

#endif
