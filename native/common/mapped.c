/* Zeros instead of SIGBUS for pages of mapped files that became shorter.
 *
 * The handler is installed for the whole process, but handles only addresses inside the watched ranges: for all others it
 * does what the previous action does. It calls only mmap and sigaction, which Linux allows in a handler. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <unistd.h>

#include "npuq.h"

enum { MOST_RANGES = 4096 };

/* Free where start is 0. */
struct range {
    atomic_uintptr_t start;
    atomic_size_t bytes;
    atomic_bool lost;
};

static struct range ranges[MOST_RANGES];
static atomic_int highest; /* ranges from this one on were never used */
static pthread_mutex_t changes = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;
static uintptr_t page_bytes;

static struct range *range_of(uintptr_t at) {
    int count = atomic_load(&highest);
    for (int i = 0; i < count; i++) {
        uintptr_t start = atomic_load(&ranges[i].start);
        if (start != 0 && at >= start && at - start < atomic_load(&ranges[i].bytes)) return &ranges[i];
    }
    return NULL;
}

/* Zeros from the page of `at` to the end of its range. */
static bool replace(uintptr_t at) {
    struct range *range = range_of(at);
    if (range == NULL) return false;
    uintptr_t page = at / page_bytes * page_bytes;
    uintptr_t end = atomic_load(&range->start) + atomic_load(&range->bytes);
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (mmap((void *)page, end - page, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED) return false;
    atomic_store(&range->lost, true);
    return true;
}

static void on_bus_error(int signal, siginfo_t *info, void *context) {
    const int kept = errno;
    const bool done = info->si_code == BUS_ADRERR && replace((uintptr_t)info->si_addr);
    errno = kept;
    if (done) return;
    if (before.sa_flags & SA_SIGINFO) {
        before.sa_sigaction(signal, info, context);
    } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        before.sa_handler(signal);
    } else {
        /* The instruction runs again, with the previous action; a signal that was sent is sent again. */
        sigaction(SIGBUS, &before, NULL);
        if (info->si_code <= 0) raise(signal);
    }
}

static bool install(void) {
    static bool installed;
    if (installed) return true;
    struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    sigemptyset(&action.sa_mask);
    page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    installed = sigaction(SIGBUS, NULL, &before) == 0 && sigaction(SIGBUS, &action, NULL) == 0;
    return installed;
}

int npuq_watch(const void *start, int64_t bytes) {
    int status = NPUQ_NO_MEMORY;
    if (start == NULL || bytes < 1) return NPUQ_BAD_SIZE;
    pthread_mutex_lock(&changes);
    for (int i = 0; i < MOST_RANGES && status != NPUQ_OK && install(); i++) {
        if (atomic_load(&ranges[i].start) != 0) continue;
        atomic_store(&ranges[i].bytes, (size_t)bytes);
        atomic_store(&ranges[i].lost, false);
        atomic_store(&ranges[i].start, (uintptr_t)start);
        if (i >= atomic_load(&highest)) atomic_store(&highest, i + 1);
        status = NPUQ_OK;
    }
    pthread_mutex_unlock(&changes);
    return status;
}

void npuq_unwatch(const void *start) {
    struct range *range = range_of((uintptr_t)start);
    if (range != NULL) atomic_store(&range->start, 0);
}

int npuq_is_lost(const void *start) {
    const struct range *range = range_of((uintptr_t)start);
    return range != NULL && atomic_load(&range->lost);
}
