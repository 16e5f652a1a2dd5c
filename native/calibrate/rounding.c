/* Codes that minimize a linear's output error: GPTQ on a panel of columns, and a sweep of coordinate descent. */
#include <stdlib.h>

#include "common/levels.h"

static const struct kernels *kernels_of(int level) {
    if (level >= npuq_level_count() || (level >= 0 && !npuq_level_usable(level))) return NULL;
    return level_kernels(level < 0 ? level_best() : level);
}

int npuq_gptq_columns(int32_t level, const float *lower, int64_t ldl, int64_t columns, int64_t rows, int32_t bits,
                      const float *scale, const float *weight, float *sums, float *errors, int8_t *codes) {
    const struct kernels *kernels = kernels_of(level);
    if (kernels == NULL || columns < 0 || ldl < columns || rows < 0 || rows % NPUQ_LANES != 0 || (bits != 4 && bits != 8)) {
        return NPUQ_BAD_SIZE;
    }
    const struct gptq_panel panel = {lower, (size_t)ldl, weight, scale, sums, errors, codes, (size_t)columns, (size_t)rows,
                                     bits};
    kernels->gptq_columns(&panel);
    return NPUQ_OK;
}

int npuq_descend(int32_t level, const float *hessian, const float *inverse_diagonal, int64_t columns, int64_t rows,
                 int32_t bits, const float *scale, float *gradient, int8_t *codes, int64_t *moves) {
    const struct kernels *kernels = kernels_of(level);
    if (kernels == NULL || columns < 0 || rows < 0 || (bits != 4 && bits != 8)) return NPUQ_BAD_SIZE;
    if (columns == 0 || rows == 0) {
        *moves = 0;
        return NPUQ_OK;
    }
    const size_t count = (size_t)rows, slots = count * DESCENT_BLOCK;
    char *memory = malloc(count * sizeof(size_t) + slots * (sizeof(float) + sizeof(uint16_t)));
    if (memory == NULL) return NPUQ_NO_MEMORY;
    struct descent task = {hessian, inverse_diagonal, scale, gradient, codes, (size_t)columns, count, bits, NULL, NULL, NULL};
    task.count = (size_t *)memory;
    task.change = (float *)(task.count + count);
    task.place = (uint16_t *)(task.change + slots);
    *moves = (int64_t)kernels->descend(&task);
    free(memory);
    return NPUQ_OK;
}
