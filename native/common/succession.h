/* Which stored weights are read after which, learned from the steps before: threads that wait fetch what comes next.
 *
 * Between two products a step passes through small operators on one thread, and between two calls through Python. Memory
 * rests meanwhile. Steps are alike, so what followed a product before will probably follow it again. A wrong guess only
 * fetches in vain: addresses are prefetched, never read, and may belong to memory that is gone. */
#ifndef NPUQ_COMMON_SUCCESSION_H
#define NPUQ_COMMON_SUCCESSION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    /* Products that are remembered: a power of two, several times those of a large model's step. */
    LINKS = 4096,
    FETCHED_LINE = 64,
    /* Lines between two pauses. Without pauses a core drops what its queues cannot hold; with 16 it keeps 0.95 of what one
     * thread can read. */
    FETCHED_LINES = 16,
    /* What a thread fetches at most: half of a small second-level cache. */
    FETCHED_BYTES = 512 << 10,
};

/* Stored weights that a region reads in order: `step` bytes by each of its first tasks, `bytes` in all. */
struct weights_read {
    const void *start;
    size_t step, bytes;
};

struct link {
    const void *product;
    struct weights_read next;
    bool missed; /* something else followed the last time */
};

/* Written by the calling thread; `next_` also read by the others, as three numbers that need not belong together. */
struct succession {
    struct link link[LINKS];
    const void *last;
    _Atomic(uintptr_t) next_start; /* 0: nothing is known */
    atomic_size_t next_step, next_bytes;
};

/* What one thread will fetch. */
struct fetch {
    uintptr_t at, end;
};

static inline struct link *link_of(struct succession *succession, const void *product) {
    return &succession->link[((uint64_t)(uintptr_t)product * 0x9E3779B97F4A7C15u >> 40) % LINKS];
}

/* Replaced once two others in a row followed: an odd step between others changes nothing. Tasks of the same weights have
 * another size in a step of another number of tokens: the last one counts. */
static inline void learn(struct link *link, const void *product, struct weights_read next) {
    if (link->product == product && link->next.start != next.start && !link->missed) link->missed = true;
    else *link = (struct link){product, next, false};
}

/* The product of that name begins, and reads that. */
static inline void note_product(struct succession *succession, const void *product, struct weights_read read) {
    if (succession->last != NULL) learn(link_of(succession, succession->last), succession->last, read);
    succession->last = product;
    const struct link *link = link_of(succession, product);
    const bool known = link->product == product;
    atomic_store_explicit(&succession->next_step, known ? link->next.step : 0, memory_order_relaxed);
    atomic_store_explicit(&succession->next_bytes, known ? link->next.bytes : 0, memory_order_relaxed);
    atomic_store_explicit(&succession->next_start, known ? (uintptr_t)link->next.start : 0, memory_order_relaxed);
}

/* The weights of the first task that this thread will probably take. */
static inline struct fetch fetch_of(const struct succession *succession, int thread) {
    const uintptr_t start = atomic_load_explicit(&succession->next_start, memory_order_relaxed);
    const size_t step = atomic_load_explicit(&succession->next_step, memory_order_relaxed);
    const size_t bytes = atomic_load_explicit(&succession->next_bytes, memory_order_relaxed);
    const size_t first = (size_t)thread * step;
    if (start == 0 || first >= bytes) return (struct fetch){0, 0};
    size_t most = bytes - first < step ? bytes - first : step;
    if (most > FETCHED_BYTES) most = FETCHED_BYTES;
    return (struct fetch){start + first, start + first + most};
}

static inline void fetch_some(struct fetch *fetch) {
    for (int line = 0; line < FETCHED_LINES && fetch->at < fetch->end; line++, fetch->at += FETCHED_LINE) {
        __builtin_prefetch((const void *)fetch->at, 0, 2);
    }
}

#endif
