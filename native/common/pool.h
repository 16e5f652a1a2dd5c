/* A pool of threads. One parallel region runs at a time; its tasks are handed out one by one, so that the load evens out. */
#ifndef NPUQ_COMMON_POOL_H
#define NPUQ_COMMON_POOL_H

#include "common/levels.h"
#include "common/succession.h"
#include "npuq.h"

/* Runs task `index` on thread `thread` (0 is the caller). */
typedef void (*pool_task)(const void *context, size_t index, int thread);

/* The kernels of the pool's level. */
const struct kernels *pool_kernels(const npuq_pool *pool);
int pool_threads(const npuq_pool *pool);

/* A call on the pool: begin, any number of scratch and run, end. Calls of other threads wait in between. The same thread
 * may begin further calls inside, POOL_DEPTH deep; they share its scratch, but each depth has a workspace of its own. */
enum { POOL_DEPTH = 4 };
void pool_begin(npuq_pool *pool);
void pool_end(npuq_pool *pool);

/* Gives every thread at least `bytes` of its own, and the call `shared` bytes (64-byte aligned, kept between calls).
 * NPUQ_NO_MEMORY when there is none. */
int pool_scratch(npuq_pool *pool, size_t bytes, size_t shared);
void *pool_thread_scratch(const npuq_pool *pool, int thread);
void *pool_shared_scratch(const npuq_pool *pool);

/* `bytes` that the calls inside this one leave alone (64-byte aligned, kept between calls); NULL: no memory. */
void *pool_workspace(npuq_pool *pool, size_t bytes);

/* Says what the next region reads of stored weights. `product` names it from step to step. Threads without a task then
 * fetch what followed it before. Between begin and end. */
void pool_note(npuq_pool *pool, const void *product, struct weights_read read);

/* Runs all `count` tasks and returns when they are done. */
void pool_run(npuq_pool *pool, pool_task task, const void *context, size_t count);

#endif
