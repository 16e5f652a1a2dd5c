/* Float32 products of matrices of any strides: packed into tiles, in blocks that stay in the caches. */
#include <stdlib.h>
#include <string.h>

#include "common/levels.h"

/* Blocks of k (a tile of b stays in the first cache), of rows (a block of a in the second) and of columns. */
enum { BLOCK_K = 256, BLOCK_ROWS = 192, BLOCK_COLUMNS = 1536 };

struct matrix {
    const float *data;
    size_t row, column; /* strides */
};

/* [k, width] of k numbers in `count` ≤ width lanes, zeros in the others; the sign is turned where `negate`. */
static void pack_lanes(const float *from, size_t lane, size_t step, size_t count, size_t width, size_t k, int negate,
                       float *to) {
    const float sign = negate ? -1.0f : 1.0f;
    if (count < width) memset(to, 0, k * width * sizeof *to);
    if (lane == 1) {
        for (size_t i = 0; i < k; i++) {
            for (size_t r = 0; r < count; r++) to[i * width + r] = sign * from[i * step + r];
        }
        return;
    }
    enum { STEPS = 16 }; /* a cache line of each lane at a time */
    for (size_t start = 0; start < k; start += STEPS) {
        const size_t end = start + STEPS < k ? start + STEPS : k;
        for (size_t r = 0; r < count; r++) {
            for (size_t i = start; i < end; i++) to[i * width + r] = sign * from[r * lane + i * step];
        }
    }
}

/* One tile that the matrix does not fill. */
static void edge_tile(const struct kernels *kernels, size_t k, const float *a, const float *b, int accumulate, float *c,
                      size_t ldc, size_t rows, size_t cols) {
    float tile[MOST_TILE] = {0};
    const size_t width = kernels->tile_columns;
    for (size_t r = 0; accumulate && r < rows; r++) memcpy(tile + r * width, c + r * ldc, cols * sizeof *c);
    kernels->product_tile(k, a, b, accumulate, tile, width);
    for (size_t r = 0; r < rows; r++) memcpy(c + r * ldc, tile + r * width, cols * sizeof *c);
}

static size_t least(size_t a, size_t b) { return a < b ? a : b; }

static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static void product_block(const struct kernels *kernels, const float *a, const float *b, size_t rows, size_t cols, size_t k,
                          int accumulate, float *c, size_t ldc) {
    const size_t height = kernels->tile_rows, width = kernels->tile_columns;
    for (size_t j = 0; j < cols; j += width) {
        for (size_t i = 0; i < rows; i += height) {
            const float *left = a + i * k, *right = b + j * k;
            float *to = c + i * ldc + j;
            if (i + height <= rows && j + width <= cols) kernels->product_tile(k, left, right, accumulate, to, ldc);
            else edge_tile(kernels, k, left, right, accumulate, to, ldc, least(height, rows - i), least(width, cols - j));
        }
    }
}

static void product(const struct kernels *kernels, struct matrix a, struct matrix b, size_t m, size_t n, size_t k, int negate,
                    int accumulate, float *left, float *right, float *c, size_t ldc) {
    const size_t height = kernels->tile_rows, width = kernels->tile_columns;
    for (size_t j = 0; j < n; j += BLOCK_COLUMNS) {
        const size_t cols = least(n - j, BLOCK_COLUMNS);
        for (size_t p = 0; p < k; p += BLOCK_K) {
            const size_t depth = least(k - p, BLOCK_K);
            for (size_t t = 0; t < cols; t += width) {
                const float *from = b.data + p * b.row + (j + t) * b.column;
                pack_lanes(from, b.column, b.row, least(width, cols - t), width, depth, 0, right + t * depth);
            }
            for (size_t i = 0; i < m; i += BLOCK_ROWS) {
                const size_t rows = least(m - i, BLOCK_ROWS);
                for (size_t t = 0; t < rows; t += height) {
                    const float *from = a.data + (i + t) * a.row + p * a.column;
                    pack_lanes(from, a.row, a.column, least(height, rows - t), height, depth, negate, left + t * depth);
                }
                product_block(kernels, left, right, rows, cols, depth, accumulate || p > 0, c + i * ldc + j, ldc);
            }
        }
    }
}

int npuq_float_product(int32_t level, const float *a, int64_t a_row, int64_t a_column, const float *b, int64_t b_row,
                       int64_t b_column, int64_t m, int64_t n, int64_t k, int32_t negate, int32_t accumulate, float *c,
                       int64_t ldc) {
    if (level >= npuq_level_count() || (level >= 0 && !npuq_level_usable(level))) return NPUQ_BAD_SIZE;
    if (m < 0 || n < 0 || k < 0 || a_row < 0 || a_column < 0 || b_row < 0 || b_column < 0 || ldc < n) return NPUQ_BAD_SIZE;
    if (k == 0 && !accumulate) {
        for (int64_t i = 0; i < m; i++) memset(c + i * ldc, 0, (size_t)n * sizeof *c);
    }
    if (m == 0 || n == 0 || k == 0) return NPUQ_OK;
    const struct kernels *kernels = level_kernels(level < 0 ? level_best() : level);
    const size_t depth = least((size_t)k, BLOCK_K);
    const size_t rows = round_up(least((size_t)m, BLOCK_ROWS), kernels->tile_rows);
    const size_t cols = round_up(least((size_t)n, BLOCK_COLUMNS), kernels->tile_columns);
    const size_t left = round_up(depth * rows * sizeof(float), 64), right = round_up(depth * cols * sizeof(float), 64);
    char *memory = aligned_alloc(64, left + right);
    if (memory == NULL) return NPUQ_NO_MEMORY;
    const struct matrix first = {a, (size_t)a_row, (size_t)a_column}, second = {b, (size_t)b_row, (size_t)b_column};
    product(kernels, first, second, (size_t)m, (size_t)n, (size_t)k, negate, accumulate, (float *)memory,
            (float *)(memory + left), c, (size_t)ldc);
    free(memory);
    return NPUQ_OK;
}
