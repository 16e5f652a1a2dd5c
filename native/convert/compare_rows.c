/* Rows of a quantized linear beside those of its source: sums of codes, and the error of the dequantized weights. */
#include <stdlib.h>

#include "convert/source_rows.h"

static bool compares(const npuq_source *source, int64_t rows, int64_t cols, int bits, int64_t sum_columns) {
    if (source != NULL && !is_readable(source, rows, cols)) return false;
    if (rows < 0 || cols < 1 || cols > NPUQ_MOST_COLUMNS || (bits != 8 && !(bits == 4 && rows % 2 == 0))) return false;
    return sum_columns >= 0 && sum_columns <= NPUQ_MOST_BIAS_COLUMNS && (sum_columns == 0 || cols % sum_columns == 0);
}

int npuq_compare_rows(int32_t level, const npuq_source *source, const int8_t *codes, const float *scale, int64_t rows,
                      int64_t cols, int32_t bits, int64_t sum_columns, int32_t *sums, double *error, double *norm) {
    const struct kernels *kernels = kernels_of(level);
    if (kernels == NULL || !compares(source, rows, cols, bits, sum_columns)) return NPUQ_BAD_SIZE;
    const size_t n = (size_t)cols, wide = (n + 63) / 64 * 64;
    char *memory = aligned_alloc(64, wide * (2 * sizeof(float) + 2));
    if (memory == NULL) return NPUQ_NO_MEMORY;
    float *w = (float *)memory, *dequantized = w + wide;
    int8_t *pair[2] = {(int8_t *)(dequantized + wide), (int8_t *)(dequantized + wide) + wide};
    const float_mode mode = keep_subnormals();
    for (int64_t r = 0; r < rows; r++) {
        const int8_t *row = bits == 8 ? codes + (size_t)r * n : pair[r % 2];
        if (bits == 4 && r % 2 == 0) kernels->unpack_rows(codes + (size_t)(r / 2) * n, n, pair[0], pair[1]);
        for (int64_t c = 0; c < sum_columns; c++) {
            const size_t width = n / (size_t)sum_columns;
            sums[r * sum_columns + c] = kernels->sum_i8(row + (size_t)c * width, width);
        }
        if (source == NULL) continue;
        (void)decoded(kernels, source, r, cols, w);
        kernels->compare_row(w, row, scale[r], n, dequantized, error + r, norm + r);
    }
    put_back(mode);
    free(memory);
    return NPUQ_OK;
}
