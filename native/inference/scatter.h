/* Writing of one token's channels into its slot of a paged cache. */
#ifndef NPUQ_INFERENCE_SCATTER_H
#define NPUQ_INFERENCE_SCATTER_H

#include <string.h>

#include "common/dtypes.h"

/* Rows of the pages' dtype: ND, or NZ [block, channel / group, offset, channel % group]. */
static inline void scatter_row(const npuq_pages *pages, int64_t slot, const void *row) {
    size_t channels = (size_t)pages->channels, size = size_of(pages->dtype), block_size = (size_t)pages->block_size;
    if (pages->layout == NPUQ_ND) {
        memcpy((char *)pages->rows + (size_t)slot * channels * size, row, channels * size);
        return;
    }
    size_t bytes = nz_channels(pages->dtype) * size, groups = channels / nz_channels(pages->dtype);
    size_t block = (size_t)slot / block_size, offset = (size_t)slot % block_size;
    for (size_t g = 0; g < groups; g++) {
        size_t at = (block * groups + g) * block_size + offset;
        memcpy((char *)pages->rows + at * bytes, (const char *)row + g * bytes, bytes);
    }
}

#endif
