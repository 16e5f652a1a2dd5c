/* Rows of a source weight become the rows of a quantized linear, one row (int4: two) at a time. */
#include <stdlib.h>
#include <string.h>

#include "convert/source_rows.h"

static int convert_one(const struct kernels *kernels, const npuq_source *source, int64_t row, size_t n, int bits, int mse,
                       void *memory, float *w, struct converted *out) {
    const void *x = row_at(source, row, (int64_t)n);
    const float *scales = scales_at(source, row);
    const size_t block = (size_t)source->block_cols;
    const int status = kernels->convert_stored(x, source->dtype, n, scales, block, bits, mse, memory, out);
    if (status >= 0) return status;
    float largest = decoded(kernels, source, row, (int64_t)n, w);
    if (largest != largest) return NPUQ_NOT_FINITE;
    if (bits == 4 && !mse) return kernels->convert_stored(w, NPUQ_F32, n, NULL, 0, bits, mse, memory, out);
    return kernels->convert_row(w, n, largest, bits, mse, memory, out);
}

static bool quantizes(const npuq_source *source, int64_t rows, int64_t cols, int bits, int64_t bias_columns) {
    if (!is_readable(source, rows, cols)) return false;
    if (bits == 8) return true;
    return bits == 4 && rows % 2 == 0 && bias_columns >= 1 && bias_columns <= NPUQ_MOST_BIAS_COLUMNS && cols % bias_columns == 0;
}

int npuq_quantize_rows(int32_t level, const npuq_source *source, int64_t rows, int64_t cols, int32_t bits, int32_t mse,
                       int64_t bias_columns, int8_t *codes, float *scale, float *bias, double *error, double *norm,
                       int64_t *bad_row) {
    const struct kernels *kernels = kernels_of(level);
    if (kernels == NULL || !quantizes(source, rows, cols, bits, bias_columns)) return NPUQ_BAD_SIZE;
    size_t n = (size_t)cols, wide = (n + 63) / 64 * 64;
    size_t scratch = mse ? (kernels->convert_scratch(n) + 63) / 64 * 64 : 0;
    char *memory = aligned_alloc(64, scratch + wide * 6);
    if (memory == NULL) return NPUQ_NO_MEMORY;
    memset(memory, 0, scratch + wide * 6);
    float *w = (float *)(memory + scratch);
    int8_t *pair[2] = {(int8_t *)(w + wide), (int8_t *)(w + wide) + wide};
    int status = NPUQ_OK;
    const float_mode mode = keep_subnormals();
    for (int64_t r = 0; r < rows && status == NPUQ_OK; r++) {
        struct converted out = {.codes = bits == 4 ? pair[r % 2] : codes + (size_t)r * n};
        status = convert_one(kernels, source, r, n, bits, mse, memory, w, &out);
        if (status != NPUQ_OK) {
            *bad_row = r;
            break;
        }
        scale[r] = out.scale;
        error[r] = out.error;
        norm[r] = out.norm;
        if (bits == 8 || r % 2 == 0) continue;
        int32_t sums[2 * NPUQ_MOST_BIAS_COLUMNS];
        kernels->pack_rows(pair[0], pair[1], n, (size_t)bias_columns, codes + (size_t)(r / 2) * n, sums);
        float *at = bias + (r - 1) * bias_columns;
        for (int64_t c = 0; c < 2 * bias_columns; c++) at[c] = (float)(8 * sums[c]) * scale[r - (c < bias_columns)];
    }
    put_back(mode);
    if (mse) kernels->convert_release(memory);
    free(memory);
    return status;
}
