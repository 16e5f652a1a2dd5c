/* Prefetching: the weights that come next are fetched while others are computed with. */
#ifndef NPUQ_INFERENCE_KERNELS_PREFETCH_H
#define NPUQ_INFERENCE_KERNELS_PREFETCH_H

#include "common/levels.h"
#include "common/vectors.h"

enum {
    LINE = 64,
    SMALL_PAGE = 4096,
    /* How far before its first use a page is touched. Twice and four times as far are as good. */
    PAGE_AHEAD = 2 * SMALL_PAGE,
};

/* Touches one line in each of the pages PAGE_AHEAD behind those at `at`: the core walks the page tables for it. A prefetch
 * into a page whose address is not known yet comes late, and delays those behind it. */
INLINE void touch_pages(const void *at, size_t bytes) {
#if defined(NPUQ_LEVEL_AVX512) || defined(NPUQ_LEVEL_AVX2)
    for (size_t page = 0; page < bytes; page += SMALL_PAGE) {
        __builtin_prefetch((const char *)at + PAGE_AHEAD + page, 0, 3);
    }
#else
    (void)at, (void)bytes; /* not measured on Arm */
#endif
}

/* The data to be read next. lines: cache lines to fetch at a time; mask: fetch at each i of k where i & mask is 0. */
struct ahead {
    const uint8_t *at, *end;
    size_t lines, mask;
};

INLINE struct ahead ahead_of(struct following following, size_t mask) {
    return (struct ahead){following.weights, following.weights + following.bytes, 1, mask};
}

INLINE void fetch_lap(struct ahead *ahead) {
    for (size_t n = 0; n < ahead->lines && ahead->at < ahead->end; n++, ahead->at += LINE) {
        __builtin_prefetch(ahead->at, 0, 2);
    }
}

INLINE void fetch_line(struct ahead *ahead) {
    if (ahead->at < ahead->end) __builtin_prefetch(ahead->at, 0, 2);
    ahead->at += LINE;
}

#endif
