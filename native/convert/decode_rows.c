/* Rows of a source weight become rows of a float dtype. */
#include <math.h>
#include <stdlib.h>

#include "convert/source_rows.h"

int npuq_decode_rows(int32_t level, const npuq_source *source, int64_t rows, int64_t cols, int32_t out_dtype, void *out,
                     int64_t *bad_row) {
    const struct kernels *kernels = kernels_of(level);
    if (kernels == NULL || !is_readable(source, rows, cols) || !computes(out_dtype)) return NPUQ_BAD_SIZE;
    const size_t n = (size_t)cols, wide = (n + 63) / 64 * 64;
    float *w = aligned_alloc(64, wide * sizeof *w);
    if (w == NULL) return NPUQ_NO_MEMORY;
    int status = NPUQ_OK;
    const float_mode mode = keep_subnormals();
    for (int64_t r = 0; r < rows; r++) {
        const float largest = decoded(kernels, source, r, cols, w);
        /* Rounding is monotonic: no value overflows where the largest does not. */
        float rounded = largest;
        if (out_dtype != NPUQ_F32) {
            uint16_t narrow;
            kernels->from_float(&largest, 1, &narrow, out_dtype);
            kernels->to_float(&narrow, out_dtype, 1, &rounded);
        }
        if (!isfinite(rounded)) {
            *bad_row = r;
            status = NPUQ_NOT_FINITE;
            break;
        }
        if (out != NULL) kernels->from_float(w, n, (char *)out + (size_t)r * n * size_of(out_dtype), out_dtype);
    }
    put_back(mode);
    free(w);
    return status;
}
