/* One row of codes: unpacked, and its error against the source's row. */
#ifndef NPUQ_CONVERT_COMPARE_ROW_H
#define NPUQ_CONVERT_COMPARE_ROW_H

#include "common/vectors.h"

/* The inverse of pack_rows: the even row in low nibbles. */
static void unpack_rows(const int8_t *packed, size_t n, int8_t *even, int8_t *odd) {
    for (size_t i = 0; i < n; i++) {
        even[i] = (int8_t)((uint8_t)packed[i] << 4) >> 4;
        odd[i] = packed[i] >> 4;
    }
}

/* Half a vector of float32 is a vector of float64. */
enum { WIDE = VW / 2 };
typedef float half_f __attribute__((vector_size(WIDE * 4)));
typedef double wide_d __attribute__((vector_size(WIDE * 8)));

INLINE wide_d wide_load(const float *p) {
    half_f half;
    memcpy(&half, p, sizeof half);
    return __builtin_convertvector(half, wide_d);
}

/* error: Σ (w − scale · code)², the product rounded to float32; norm: Σ w². Both in float64. */
static void compare_row(const float *w, const int8_t *codes, float scale, size_t n, float *dequantized, double *error,
                        double *norm) {
    size_t i = 0;
    for (; i + VW <= n; i += VW) vf_store(dequantized + i, vf_load_i8(codes + i) * scale);
    for (; i < n; i++) dequantized[i] = (float)codes[i] * scale;
    wide_d errors[2] = {{0}, {0}}, norms[2] = {{0}, {0}};
    for (i = 0; i + VW <= n; i += VW) {
#pragma GCC unroll 2
        for (int k = 0; k < 2; k++) {
            const wide_d x = wide_load(w + i + k * WIDE), difference = wide_load(dequantized + i + k * WIDE) - x;
            errors[k] += difference * difference;
            norms[k] += x * x;
        }
    }
    double lost = 0, whole = 0;
    for (; i < n; i++) {
        const double x = w[i], difference = dequantized[i] - x;
        lost += difference * difference;
        whole += x * x;
    }
    for (int k = 0; k < 2; k++) {
        for (int lane = 0; lane < WIDE; lane++) lost += errors[k][lane], whole += norms[k][lane];
    }
    *error = lost;
    *norm = whole;
}

#endif
