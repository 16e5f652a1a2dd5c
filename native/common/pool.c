/* The pool of threads. A worker spins between regions for a while, then sleeps; within a region it takes tasks by a counter. */
#define _GNU_SOURCE
#include "common/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

/* A decode step is a few hundred regions of 10 to 500 µs with as little Python between them: a worker that slept in
 * each gap would pay a wake-up (50 µs in a virtual machine) for each. It spins for about 100 µs, then sleeps. */
enum { SPINS = 4000, ALIGNMENT = 64 };

/* `gate` counts the workers inside a region; this bit says that one is open. */
#define GATE_OPEN (1u << 30)

struct buffer {
    void *data;
    size_t bytes;
};

struct worker {
    npuq_pool *pool;
    pthread_t thread;
    int index;
};

struct npuq_pool {
    const struct kernels *kernels;
    int level;
    int threads;
    pid_t owner; /* threads do not survive fork: a child works alone */
    pthread_mutex_t calls;
    struct worker *workers;   /* threads - 1 of them */
    struct buffer *scratch;   /* one a thread */
    struct buffer shared, workspace[POOL_DEPTH];
    int depth; /* of calls inside calls; under `calls` */

    /* The open region. Written only while the gate is shut and empty. */
    pool_task task;
    const void *context;
    size_t count;
    _Alignas(ALIGNMENT) atomic_size_t next;
    _Alignas(ALIGNMENT) atomic_uint gate;
    _Alignas(ALIGNMENT) atomic_uint generation; /* grows with every region, so that a worker joins each one once */
    atomic_int sleepers;
    atomic_bool stopping;
    struct succession *succession;
    pthread_mutex_t sleep_lock;
    pthread_cond_t wake;
};

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(npuq_pool *pool, int thread) {
    for (;;) {
        size_t index = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (index >= pool->count) return;
        pool->task(pool->context, index, thread);
    }
}

static unsigned await_generation(npuq_pool *pool, int thread, unsigned seen) {
    struct fetch fetch = fetch_of(pool->succession, thread);
    for (int spin = 0; spin < SPINS; spin++) {
        unsigned now = atomic_load_explicit(&pool->generation, memory_order_acquire);
        if (now != seen) return now;
        fetch_some(&fetch);
        relax();
    }
    pthread_mutex_lock(&pool->sleep_lock);
    /* Sequentially consistent on both sides: either this thread sees the new generation, or pool_run sees a sleeper. */
    atomic_fetch_add(&pool->sleepers, 1);
    unsigned now;
    while ((now = atomic_load(&pool->generation)) == seen) pthread_cond_wait(&pool->wake, &pool->sleep_lock);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->sleep_lock);
    return now;
}

static void *worker_main(void *argument) {
    struct worker *self = argument;
    npuq_pool *pool = self->pool;
    unsigned seen = 0;
    for (;;) {
        seen = await_generation(pool, self->index, seen);
        if (atomic_load(&pool->stopping)) return NULL;
        /* A worker that comes late finds the gate shut and leaves: the caller never waits for one to wake up. */
        if (atomic_fetch_add_explicit(&pool->gate, 1, memory_order_acq_rel) & GATE_OPEN) work(pool, self->index);
        atomic_fetch_sub_explicit(&pool->gate, 1, memory_order_release);
    }
}

static void announce(npuq_pool *pool) {
    atomic_fetch_add(&pool->generation, 1);
    if (atomic_load(&pool->sleepers) == 0) return;
    pthread_mutex_lock(&pool->sleep_lock);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->sleep_lock);
}

void pool_run(npuq_pool *pool, pool_task task, const void *context, size_t count) {
    if (pool->threads == 1 || count <= 1 || pool->owner != getpid()) {
        for (size_t index = 0; index < count; index++) task(context, index, 0);
        return;
    }
    /* Workers that were late for the last region may still be stepping back from its gate. */
    while (atomic_load_explicit(&pool->gate, memory_order_acquire) != 0) relax();
    pool->task = task;
    pool->context = context;
    pool->count = count;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_fetch_or_explicit(&pool->gate, GATE_OPEN, memory_order_release);
    announce(pool);
    work(pool, 0);
    atomic_fetch_and_explicit(&pool->gate, ~GATE_OPEN, memory_order_acq_rel);
    struct fetch fetch = fetch_of(pool->succession, 0);
    for (int spin = 0; atomic_load_explicit(&pool->gate, memory_order_acquire) != 0; spin++) {
        fetch_some(&fetch);
        if (spin < SPINS) relax();
        else usleep(10); /* a worker lost its core in mid-task: leave this one to it */
    }
}

void pool_note(npuq_pool *pool, const void *product, struct weights_read read) {
    note_product(pool->succession, product, read);
}

void pool_begin(npuq_pool *pool) {
    pthread_mutex_lock(&pool->calls);
    pool->depth++;
}

void pool_end(npuq_pool *pool) {
    pool->depth--;
    pthread_mutex_unlock(&pool->calls);
}

static int grow(struct buffer *buffer, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    /* Exactly the requested size, so that sanitizers see uses behind it. */
    free(buffer->data);
    *buffer = (struct buffer){0};
    if (posix_memalign(&buffer->data, ALIGNMENT, bytes + (bytes == 0)) != 0) return NPUQ_NO_MEMORY;
    return NPUQ_OK;
#endif
    if (buffer->bytes >= bytes) return NPUQ_OK;
    /* Some room to spare: sequences grow token by token, and so would a buffer that fits exactly. */
    size_t size = (bytes + bytes / 4 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    void *data = aligned_alloc(ALIGNMENT, size);
    if (data == NULL) return NPUQ_NO_MEMORY;
    free(buffer->data);
    *buffer = (struct buffer){data, size};
    return NPUQ_OK;
}

int pool_scratch(npuq_pool *pool, size_t bytes, size_t shared) {
    for (int thread = 0; thread < pool->threads; thread++) {
        if (grow(&pool->scratch[thread], bytes) != NPUQ_OK) return NPUQ_NO_MEMORY;
    }
    return grow(&pool->shared, shared);
}

void *pool_workspace(npuq_pool *pool, size_t bytes) {
    struct buffer *workspace = &pool->workspace[pool->depth - 1];
    return grow(workspace, bytes + 1) == NPUQ_OK ? workspace->data : NULL;
}

void *pool_thread_scratch(const npuq_pool *pool, int thread) { return pool->scratch[thread].data; }

void *pool_shared_scratch(const npuq_pool *pool) { return pool->shared.data; }

const struct kernels *pool_kernels(const npuq_pool *pool) { return pool->kernels; }

int pool_threads(const npuq_pool *pool) { return pool->threads; }

int npuq_pool_level(const npuq_pool *pool) { return pool->level; }

npuq_pool *npuq_pool_create(int threads, int level) {
    if (level < 0) level = level_best();
    if (threads < 1 || level >= npuq_level_count() || !npuq_level_usable(level)) return NULL;
    npuq_pool *pool = aligned_alloc(ALIGNMENT, (sizeof *pool + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (pool == NULL) return NULL;
    *pool = (npuq_pool){.kernels = level_kernels(level), .level = level, .threads = 1, .owner = getpid()};
    pthread_mutexattr_t nested;
    pthread_mutexattr_init(&nested);
    pthread_mutexattr_settype(&nested, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&pool->calls, &nested);
    pthread_mutexattr_destroy(&nested);
    pthread_mutex_init(&pool->sleep_lock, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->scratch = calloc((size_t)threads, sizeof *pool->scratch);
    pool->workers = calloc((size_t)threads, sizeof *pool->workers);
    pool->succession = calloc(1, sizeof *pool->succession);
    if (pool->scratch == NULL || pool->workers == NULL || pool->succession == NULL) {
        npuq_pool_destroy(pool);
        return NULL;
    }
    for (int index = 1; index < threads; index++) {
        struct worker *worker = &pool->workers[index - 1];
        *worker = (struct worker){.pool = pool, .index = index};
        if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0) {
            npuq_pool_destroy(pool);
            return NULL;
        }
        pool->threads++; /* destroy joins as many as were started */
    }
    return pool;
}

void npuq_pool_destroy(npuq_pool *pool) {
    if (pool == NULL) return;
    if (pool->owner == getpid()) {
        atomic_store(&pool->stopping, true);
        announce(pool);
        for (int index = 1; index < pool->threads; index++) pthread_join(pool->workers[index - 1].thread, NULL);
    }
    for (int thread = 0; pool->scratch != NULL && thread < pool->threads; thread++) free(pool->scratch[thread].data);
    free(pool->shared.data);
    for (int depth = 0; depth < POOL_DEPTH; depth++) free(pool->workspace[depth].data);
    free(pool->succession);
    free(pool->scratch);
    free(pool->workers);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->sleep_lock);
    pthread_mutex_destroy(&pool->calls);
    free(pool);
}
