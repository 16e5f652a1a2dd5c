/* Rows of a source weight become the rows of a quantized linear, one row (int4: two) at a time. */
#include <stdlib.h>
#include <string.h>

#include "common/checks.h"
#include "common/levels.h"

/* FP8's subnormals may pass through those of float32 (fp8_minmax.h). The caller may have set the processor to
 * flush those to zero, as torch.set_flush_denormal does: not here. Returns the mode to restore. */
#if defined(__x86_64__)
#include <immintrin.h>
typedef unsigned float_mode;
static float_mode keep_subnormals(void) {
    const float_mode before = _mm_getcsr();
    _mm_setcsr(before & ~(float_mode)0x8040);
    return before;
}
static void put_back(float_mode mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
typedef uint64_t float_mode;
static void put_back(float_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode)); }
static float_mode keep_subnormals(void) {
    float_mode before;
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    put_back(before & ~((float_mode)1 << 24));
    return before;
}
#else
typedef int float_mode;
static float_mode keep_subnormals(void) { return 0; }
static void put_back(float_mode mode) { (void)mode; }
#endif

/* Two columns a byte. */
static bool is_packed(int dtype) { return dtype == NPUQ_U4 || dtype == NPUQ_F4; }

static const void *row_at(const npuq_source *source, int64_t row, int64_t cols) {
    const size_t values = (size_t)row * (size_t)cols;
    return (const char *)source->data + (is_packed(source->dtype) ? values / 2 : values * size_of(source->dtype));
}

static const float *scales_at(const npuq_source *source, int64_t row) {
    if (source->block_scale == NULL) return NULL;
    return source->block_scale + (source->first_row + row) / source->block_rows * source->scale_stride;
}

static int convert_one(const struct kernels *kernels, const npuq_source *source, int64_t row, size_t n, int bits, int mse,
                       void *memory, float *w, struct converted *out) {
    const void *x = row_at(source, row, (int64_t)n);
    const float *scales = scales_at(source, row);
    const size_t block = (size_t)source->block_cols;
    const int status = kernels->convert_stored(x, source->dtype, n, scales, block, bits, mse, memory, out);
    if (status >= 0) return status;
    float largest = kernels->decode_row(x, source->dtype, n, scales, block, w);
    if (largest != largest) return NPUQ_NOT_FINITE;
    if (bits == 4 && !mse) return kernels->convert_stored(w, NPUQ_F32, n, NULL, 0, bits, mse, memory, out);
    return kernels->convert_row(w, n, largest, bits, mse, memory, out);
}

static bool quantizes(int level, const npuq_source *source, int64_t rows, int64_t cols, int bits, int64_t bias_columns) {
    const bool packed = is_packed(source->dtype), scaled = packed || source->dtype == NPUQ_F8E4M3;
    if (level >= npuq_level_count() || (level >= 0 && !npuq_level_usable(level))) return false;
    if (!(scaled || is_float(source->dtype)) || scaled != (source->block_scale != NULL)) return false;
    if (source->first_row < 0 || source->block_rows < 1 || source->block_cols < 1) return false;
    if (packed && (cols % 2 != 0 || source->block_cols % 2 != 0)) return false;
    if (scaled && source->scale_stride < (cols + source->block_cols - 1) / source->block_cols) return false;
    if (rows < 0 || cols < 1 || cols > NPUQ_MOST_COLUMNS) return false;
    if (bits == 8) return true;
    return bits == 4 && rows % 2 == 0 && bias_columns >= 1 && bias_columns <= NPUQ_MOST_BIAS_COLUMNS && cols % bias_columns == 0;
}

int npuq_quantize_rows(int32_t level, const npuq_source *source, int64_t rows, int64_t cols, int32_t bits, int32_t mse,
                       int64_t bias_columns, int8_t *codes, float *scale, float *bias, double *error, double *norm,
                       int64_t *bad_row) {
    if (!quantizes(level, source, rows, cols, bits, bias_columns)) return NPUQ_BAD_SIZE;
    const struct kernels *kernels = level_kernels(level < 0 ? level_best() : level);
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
