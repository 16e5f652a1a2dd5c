/* Prefetching: the weights that come next are fetched while others are computed with. */
#ifndef NPUQ_INFERENCE_KERNELS_PREFETCH_H
#define NPUQ_INFERENCE_KERNELS_PREFETCH_H

#include "common/levels.h"
#include "common/vectors.h"

enum { LINE = 64 };

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
