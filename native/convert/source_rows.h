/* Rows of a source weight where they are stored (npuq_source). */
#ifndef NPUQ_CONVERT_SOURCE_ROWS_H
#define NPUQ_CONVERT_SOURCE_ROWS_H

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

static const void *row_at(const npuq_source *source, int64_t row, int64_t cols) {
    const size_t values = (size_t)row * (size_t)cols;
    return (const char *)source->data + (source->dtype == NPUQ_U4 ? values / 2 : values * size_of(source->dtype));
}

static const float *scales_at(const npuq_source *source, int64_t row) {
    if (source->block_scale == NULL) return NULL;
    return source->block_scale + (source->first_row + row) / source->block_rows * source->scale_stride;
}

/* The kernels of a level, -1 for the best; NULL where this CPU lacks it. */
static const struct kernels *kernels_of(int level) {
    if (level >= npuq_level_count() || (level >= 0 && !npuq_level_usable(level))) return NULL;
    return level_kernels(level < 0 ? level_best() : level);
}

static bool is_readable(const npuq_source *source, int64_t rows, int64_t cols) {
    const bool u4 = source->dtype == NPUQ_U4, scaled = u4 || source->dtype == NPUQ_F8E4M3;
    if (!(scaled || is_float(source->dtype)) || scaled != (source->block_scale != NULL)) return false;
    if (source->first_row < 0 || source->block_rows < 1 || source->block_cols < 1) return false;
    if (u4 && (cols % 2 != 0 || source->block_cols % 2 != 0)) return false;
    if (scaled && source->scale_stride < (cols + source->block_cols - 1) / source->block_cols) return false;
    return rows >= 0 && cols >= 1 && cols <= NPUQ_MOST_COLUMNS;
}

/* Decode a row as float32; gives its largest magnitude, NaN where a value is not finite. */
static float decoded(const struct kernels *kernels, const npuq_source *source, int64_t row, int64_t cols, float *w) {
    const void *x = row_at(source, row, cols);
    return kernels->decode_row(x, source->dtype, (size_t)cols, scales_at(source, row), (size_t)source->block_cols, w);
}

#endif
