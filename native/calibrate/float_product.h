/* A tile of a float32 product. Each number is one chain of fused multiply-adds over k, from first to last, on what is there
 * already. So neither level, nor tile, nor the cut of k into blocks changes a bit. */
#ifndef NPUQ_CALIBRATE_FLOAT_PRODUCT_H
#define NPUQ_CALIBRATE_FLOAT_PRODUCT_H

#include "common/vectors.h"

/* Rows and vectors of a tile: as many sums as registers hold beside two vectors of b. */
#if defined(NPUQ_LEVEL_AVX512)
enum { PRODUCT_ROWS = 12, PRODUCT_VECTORS = 2 };
#elif defined(NPUQ_LEVEL_AVX2)
enum { PRODUCT_ROWS = 6, PRODUCT_VECTORS = 2 };
#elif defined(NPUQ_LEVEL_NEON)
enum { PRODUCT_ROWS = 8, PRODUCT_VECTORS = 3 };
#else
enum { PRODUCT_ROWS = 4, PRODUCT_VECTORS = 2 };
#endif
enum { PRODUCT_COLUMNS = PRODUCT_VECTORS * VW };

/* a · b + c, rounded once at every level. */
INLINE vf chain_fma(vf a, vf b, vf c) {
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2) || defined(NPUQ_LEVEL_NEON)
    return vf_fma(a, b, c);
#else
    return (vf){fmaf(a[0], b[0], c[0]), fmaf(a[1], b[1], c[1]), fmaf(a[2], b[2], c[2]), fmaf(a[3], b[3], c[3])};
#endif
}

/* c [PRODUCT_ROWS, PRODUCT_COLUMNS] (+)= a · b, of packed a [k, PRODUCT_ROWS] and b [k, PRODUCT_COLUMNS]. */
static void product_tile(size_t k, const float *a, const float *b, int accumulate, float *c, size_t ldc) {
    vf sum[PRODUCT_ROWS][PRODUCT_VECTORS];
#pragma GCC unroll 12
    for (int r = 0; r < PRODUCT_ROWS; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < PRODUCT_VECTORS; v++) sum[r][v] = accumulate ? vf_load(c + (size_t)r * ldc + v * VW) : vf_set(0);
    }
    for (size_t i = 0; i < k; i++, a += PRODUCT_ROWS, b += PRODUCT_COLUMNS) {
        vf column[PRODUCT_VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < PRODUCT_VECTORS; v++) column[v] = vf_load(b + v * VW);
#pragma GCC unroll 12
        for (int r = 0; r < PRODUCT_ROWS; r++) {
            const vf row = vf_set(a[r]);
#pragma GCC unroll 3
            for (int v = 0; v < PRODUCT_VECTORS; v++) sum[r][v] = chain_fma(row, column[v], sum[r][v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < PRODUCT_ROWS; r++) {
#pragma GCC unroll 3
        for (int v = 0; v < PRODUCT_VECTORS; v++) vf_store(c + (size_t)r * ldc + v * VW, sum[r][v]);
    }
}

#endif
