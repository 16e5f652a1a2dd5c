/* The cuts of top-k, top-p and min-p, found by a radix search that adds up whole numbers: they depend neither on threads nor on
 * the level. */
#include <math.h>
#include <stdatomic.h>

#include "inference/sampling/row.h"

/* The shift that makes a digit begin at the highest bit in which keys differ. */
static int shift_for(uint64_t differing) {
    const int bits = differing == 0 ? 0 : 64 - __builtin_clzll(differing);
    return bits > DIGIT ? bits - DIGIT : 0;
}

static void add_digits(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    if (!chunk_has_kept(row, chunk)) return;
    const size_t count = chunk_size(row, chunk), first = chunk * CHUNK;
    int64_t *likelihood = partial->likelihood;
    row->kernels->falling_order(row->logits + first, count, partial->order);
    if (row->by_likelihood) {
        row->kernels->likelihoods(row->logits + first, count, row->largest, row->inverse, likelihood);
    } else {
        for (size_t i = 0; i < count; i++) likelihood[i] = 1;
    }
    if (row->cut != UINT64_MAX) {
        for (size_t i = 0; i < count; i++) likelihood[i] = key_of(partial->order[i], first + i) <= row->cut ? likelihood[i] : 0;
    }
    for (size_t i = 0; i < count; i++) partial->sum[i % 2][(partial->order[i] >> row->shift) % DIGITS] += likelihood[i];
}

/* Keys of the chunk's tokens whose upper halves are list_first to list_last, and that the cut leaves. */
static void list_chunk(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    if (!chunk_has_kept(row, chunk) || falling(row->chunk_largest[chunk]) > row->list_last) return;
    const size_t count = chunk_size(row, chunk), first = chunk * CHUNK;
    const uint32_t range = row->list_last - row->list_first;
    row->kernels->falling_order(row->logits + first, count, partial->order);
    size_t found = 0;
    for (size_t i = 0; i < count; i++) {
        const uint64_t key = key_of(partial->order[i], first + i);
        if (partial->order[i] - row->list_first <= range && key <= row->cut) partial->key[found++] = key;
    }
    const size_t place = atomic_fetch_add_explicit(row->list_size, found, memory_order_relaxed);
    memcpy(row->listed + place, partial->key, found * sizeof *row->listed);
}

static size_t list_keys(struct row *row, uint32_t first, uint32_t last) {
    _Atomic size_t size = 0;
    row->list_size = &size;
    row->list_first = first;
    row->list_last = last;
    pool_run(row->pool, list_chunk, row, row->chunks);
    return atomic_load(&size);
}

/* The digit within which the running sum reaches `target`, from which the sum of those before is taken. */
static uint64_t find_digit(int64_t (*sum)[DIGITS], int64_t *target) {
    uint64_t digit = 0;
    for (; digit < DIGITS - 1; digit++) {
        const int64_t now = sum[0][digit] + sum[1][digit];
        if (now >= *target) break;
        *target -= now;
    }
    return digit;
}

static void weigh_listed(const struct row *row, size_t first, size_t count, struct partial *partial) {
    float logits[CHUNK];
    for (size_t i = 0; i < count; i++) {
        logits[i] = logit_of(row->listed[first + i]);
        partial->likelihood[i] = 1;
    }
    if (row->by_likelihood) row->kernels->likelihoods(logits, count, row->largest, row->inverse, partial->likelihood);
}

/* The key, of `left` ≥ 1 listed ones, with which their weights in ranking reach `target`. */
static uint64_t search_list(const struct row *row, size_t left, int64_t target) {
    struct partial *partial = pool_thread_scratch(row->pool, 0);
    uint64_t *key = row->listed;
    while (left > 1) {
        uint64_t some = 0, every = UINT64_MAX;
        for (size_t i = 0; i < left; i++) {
            some |= key[i];
            every &= key[i];
        }
        const int shift = shift_for(some ^ every);
        memset(partial->sum, 0, sizeof partial->sum);
        for (size_t first = 0; first < left; first += CHUNK) {
            const size_t count = left - first < CHUNK ? left - first : CHUNK;
            weigh_listed(row, first, count, partial);
            for (size_t i = 0; i < count; i++) partial->sum[i % 2][(key[first + i] >> shift) % DIGITS] += partial->likelihood[i];
        }
        const uint64_t digit = find_digit(partial->sum, &target);
        size_t kept = 0;
        for (size_t i = 0; i < left; i++) {
            if ((key[i] >> shift) % DIGITS == digit) key[kept++] = key[i];
        }
        left = kept;
    }
    return key[0];
}

/* The sum of weights that a search by likelihood goes to: the least that is not below `fraction` of all. */
static int64_t share(int64_t all, double fraction) {
    const int64_t target = (int64_t)ceil((double)all * fraction);
    return target < 1 ? 1 : target > all ? all : target;
}

/* The same search over all tokens that the cut leaves; count 0: for the share `fraction` of their likelihoods. */
static uint64_t search_all(struct row *row, int64_t count, double fraction) {
    struct partial *all = pool_thread_scratch(row->pool, 0);
    const uint32_t first = falling(row->largest), last = falling(row->least);
    row->by_likelihood = count == 0;
    row->shift = shift_for(first ^ last);
    for (int thread = 0; thread < pool_threads(row->pool); thread++) {
        struct partial *partial = pool_thread_scratch(row->pool, thread);
        memset(partial->sum, 0, sizeof partial->sum);
    }
    pool_run(row->pool, add_digits, row, row->chunks);
    for (int thread = 1; thread < pool_threads(row->pool); thread++) {
        const struct partial *partial = pool_thread_scratch(row->pool, thread);
        for (size_t digit = 0; digit < DIGITS; digit++) all->sum[0][digit] += partial->sum[0][digit] + partial->sum[1][digit];
    }
    int64_t total = 0, target = count;
    for (size_t digit = 0; digit < DIGITS; digit++) total += all->sum[0][digit] + all->sum[1][digit];
    if (count == 0) target = share(total, fraction);
    const uint32_t digit = (uint32_t)find_digit(all->sum, &target), rest = (1u << row->shift) - 1;
    const uint32_t from = (row->shift + DIGIT < 32 ? first >> (row->shift + DIGIT) << (row->shift + DIGIT) : 0) | digit << row->shift;
    return search_list(row, list_keys(row, from, from | rest), target);
}

/* Tokens that are listed at once: few, for many of one chunk seldom are. */
static int is_few(const struct row *row, int64_t count) { return (size_t)count <= row->chunks * GROUP_LANES / 4; }

uint64_t search_best(struct row *row, int64_t count) {
    if (!is_few(row, count)) return search_all(row, count, 0);
    /* So many groups have a token from here on. */
    const size_t groups = row->chunks * GROUP_LANES;
    row->by_likelihood = 0;
    for (size_t group = 0; group < groups; group++) row->listed[group] = key_of(falling(row->group_largest[group]), group);
    const uint64_t last = search_list(row, groups, count) >> 32;
    return search_list(row, list_keys(row, falling(row->largest), (uint32_t)last), count);
}

uint64_t search_likely(struct row *row, double fraction) {
    if (row->cut == UINT64_MAX || !is_few(row, row->draw->top_k)) return search_all(row, 0, fraction);
    struct partial *partial = pool_thread_scratch(row->pool, 0);
    const size_t left = list_keys(row, falling(row->largest), (uint32_t)(row->cut >> 32));
    int64_t total = 0;
    row->by_likelihood = 1;
    for (size_t first = 0; first < left; first += CHUNK) {
        const size_t count = left - first < CHUNK ? left - first : CHUNK;
        weigh_listed(row, first, count, partial);
        for (size_t i = 0; i < count; i++) total += partial->likelihood[i];
    }
    return search_list(row, left, share(total, fraction));
}

/* The greatest key that min_p leaves: that of the least logit whose likelihood reaches it. */
uint64_t search_min_p(const struct row *row) {
    uint32_t kept = falling(row->largest), dropped = falling(-INFINITY);
    while (dropped - kept > 1) {
        const uint32_t middle = kept + (dropped - kept) / 2;
        if (exp(score(row, logit_of(key_of(middle, 0)))) >= row->draw->min_p) kept = middle;
        else dropped = middle;
    }
    return key_of(kept, UINT32_MAX);
}
