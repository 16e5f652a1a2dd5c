/* The size of a dtype's values, and the operators that take it. */
#ifndef NPUQ_COMMON_DTYPES_H
#define NPUQ_COMMON_DTYPES_H

#include <stdbool.h>

#include "npuq.h"

/* Bytes of a value; for I4, of two values. Kernels call it with constants, which must fold away. */
static inline __attribute__((always_inline)) size_t size_of(int dtype) {
    return dtype >= NPUQ_F8E4M3 ? 1 : dtype == NPUQ_F32 ? 4 : 2;
}

/* Contiguous channels of a token in the NZ layout of the paged cache. */
static inline __attribute__((always_inline)) size_t nz_channels(int dtype) { return dtype == NPUQ_I8 ? 32 : 16; }

/* Dtypes of activations. */
static inline bool computes(int dtype) { return dtype == NPUQ_F32 || dtype == NPUQ_BF16; }

static inline bool is_integer(int dtype) { return dtype == NPUQ_I4 || dtype == NPUQ_I8; }

/* Dtypes of stored float weights. */
static inline bool is_float(int dtype) { return computes(dtype) || dtype == NPUQ_F16; }

#endif
