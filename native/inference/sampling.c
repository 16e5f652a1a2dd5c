/* Draws a token: the one of those that the filters leave whose score + Gumbel noise is highest.
 *
 * The ranking of tokens is one integer a token, its key: logits fall as keys rise, and equal logits rank by id. Each filter
 * keeps a beginning of the ranking, so all of them together are one greatest key, the cut. It is found by a radix search
 * that adds up whole numbers, and so depends neither on threads nor on the level. */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "common/pool.h"
#include "inference/philox.h"

enum { CHUNK = 1024, DIGIT = 11, DIGITS = 1 << DIGIT };

/* Sums of likelihoods stay below 2^63. */
enum { MOST_LOGITS = 1 << 22 };

/* No random number's noise is above this. */
static const double MOST_NOISE = 36.8;

/* One thread's part of a pass. */
struct partial {
    float least;
    double best;       /* score + noise */
    uint64_t best_key; /* of that token */
    uint32_t order[CHUNK];
    uint64_t key[CHUNK];
    int64_t likelihood[CHUNK];
    int64_t sum[2][DIGITS]; /* by turns: an addition need not wait for the one before it */
};

struct row {
    npuq_pool *pool;
    const struct kernels *kernels;
    const float *logits;
    size_t n, chunks;
    const npuq_draw *draw;
    double inverse; /* of the temperature */
    float least, largest;
    float *group_largest, *chunk_largest; /* [chunks, GROUP_LANES], [chunks] */
    uint64_t cut;                         /* tokens of greater keys are filtered out */
    int by_likelihood;                    /* what a token weighs in a search: its likelihood, or 1 */
    int shift;                            /* behind the digit of a pass over all tokens; of the upper half of keys */
    uint64_t *listed;                     /* [n]: keys */
    _Atomic size_t *list_size;
    uint32_t list_first, list_last; /* the upper halves of listed keys */
};

static uint32_t falling(float logit) {
    const float positive = logit + 0.0f; /* as the kernel falling_order */
    uint32_t bits;
    memcpy(&bits, &positive, sizeof bits);
    return bits >> 31 ? bits : 0x7FFFFFFFu - bits;
}

static uint64_t key_of(uint32_t order, size_t id) { return (uint64_t)order << 32 | id; }

static float logit_of(uint64_t key) {
    uint32_t bits = (uint32_t)(key >> 32);
    bits = bits >> 31 ? bits : 0x7FFFFFFFu - bits;
    float logit;
    memcpy(&logit, &bits, sizeof logit);
    return logit;
}

/* The shift that makes a digit begin at the highest bit in which keys differ. */
static int shift_for(uint64_t differing) {
    const int bits = differing == 0 ? 0 : 64 - __builtin_clzll(differing);
    return bits > DIGIT ? bits - DIGIT : 0;
}

static double score(const struct row *row, float logit) {
    return ((double)logit - (double)row->largest) / row->draw->temperature;
}

static size_t chunk_size(const struct row *row, size_t chunk) {
    const size_t left = row->n - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

/* False if the cut leaves none of the chunk's tokens. */
static int chunk_has_kept(const struct row *row, size_t chunk) {
    return falling(row->chunk_largest[chunk]) <= row->cut >> 32;
}

static void find_range(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    float least, *groups = row->group_largest + chunk * GROUP_LANES, largest = -INFINITY;
    row->kernels->logit_range(row->logits + chunk * CHUNK, chunk_size(row, chunk), &least, groups);
    for (size_t lane = 0; lane < GROUP_LANES; lane++) largest = groups[lane] > largest ? groups[lane] : largest;
    row->chunk_largest[chunk] = largest;
    partial->least = partial->least <= least || partial->least != partial->least ? partial->least : least;
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

static uint64_t search_best(struct row *row, int64_t count) {
    if (!is_few(row, count)) return search_all(row, count, 0);
    /* So many groups have a token from here on. */
    const size_t groups = row->chunks * GROUP_LANES;
    row->by_likelihood = 0;
    for (size_t group = 0; group < groups; group++) row->listed[group] = key_of(falling(row->group_largest[group]), group);
    const uint64_t last = search_list(row, groups, count) >> 32;
    return search_list(row, list_keys(row, falling(row->largest), (uint32_t)last), count);
}

static uint64_t search_likely(struct row *row, double fraction) {
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
static uint64_t search_min_p(const struct row *row) {
    uint32_t kept = falling(row->largest), dropped = falling(-INFINITY);
    while (dropped - kept > 1) {
        const uint32_t middle = kept + (dropped - kept) / 2;
        if (exp(score(row, logit_of(key_of(middle, 0)))) >= row->draw->min_p) kept = middle;
        else dropped = middle;
    }
    return key_of(kept, UINT32_MAX);
}

/* −log(−log u), u being the upper 52 bits in the middle of their step. */
static double gumbel(uint64_t number) { return -log(-log(((double)(number >> 12) + 0.5) * 0x1p-52)); }

/* The least random number whose noise may exceed `noise`; a step of u lower, for the rounding of logarithms. */
static uint64_t least_number(double noise) {
    const int64_t most = ((int64_t)1 << 52) - 2, step = (int64_t)(exp(-exp(-noise)) * 0x1p52) - 2;
    return (uint64_t)(step < 0 ? 0 : step > most ? most : step) << 12;
}

/* The best token's key and score + noise: a bound for all others. */
static uint64_t find_best(const struct row *row, double *noisy) {
    size_t chunk = 0;
    while (row->chunk_largest[chunk] < row->largest) chunk++;
    size_t id = chunk * CHUNK;
    while (row->logits[id] < row->largest) id++;
    uint64_t number[PHILOX_WORDS];
    philox(id / PHILOX_WORDS, row->draw->position, row->draw->seed, row->draw->choice, number);
    *noisy = score(row, row->largest) + gumbel(number[id % PHILOX_WORDS]);
    return key_of(falling(row->largest), id);
}

static void draw_chunk(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    const npuq_draw *draw = row->draw;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    if (!chunk_has_kept(row, chunk)) return;
    const double highest = score(row, row->chunk_largest[chunk]);
    if (!(partial->best - highest <= MOST_NOISE)) return;
    uint64_t needed = least_number(partial->best - highest);
    const size_t count = chunk_size(row, chunk), first = chunk * CHUNK;
    for (size_t i = 0; i < count; i += PHILOX_WORDS) {
        uint64_t number[PHILOX_WORDS];
        philox((first + i) / PHILOX_WORDS, draw->position, draw->seed, draw->choice, number);
        for (size_t word = 0; word < PHILOX_WORDS && i + word < count; word++) {
            if (number[word] < needed) continue;
            const float logit = row->logits[first + i + word];
            const uint64_t key = key_of(falling(logit), first + i + word);
            if (key > row->cut) continue;
            const double noisy = score(row, logit) + gumbel(number[word]);
            if (noisy < partial->best || (noisy == partial->best && key >= partial->best_key)) continue;
            partial->best = noisy;
            partial->best_key = key;
            needed = least_number(noisy - highest);
        }
    }
}

static int allocate(struct row *row) {
    const size_t groups = row->chunks * GROUP_LANES, keys = row->n > groups ? row->n : groups;
    const size_t bytes = keys * sizeof(uint64_t) + (groups + row->chunks) * sizeof(float);
    if (pool_scratch(row->pool, sizeof(struct partial), bytes) != NPUQ_OK) return NPUQ_NO_MEMORY;
    row->listed = pool_shared_scratch(row->pool);
    row->group_largest = (float *)(void *)(row->listed + keys);
    row->chunk_largest = row->group_largest + groups;
    return NPUQ_OK;
}

/* Memory for a row, and the range of its logits. */
static int open_row(struct row *row) {
    const int threads = pool_threads(row->pool);
    if (allocate(row) != NPUQ_OK) return NPUQ_NO_MEMORY;
    for (int thread = 0; thread < threads; thread++) {
        struct partial *partial = pool_thread_scratch(row->pool, thread);
        partial->least = INFINITY;
    }
    pool_run(row->pool, find_range, row, row->chunks);
    row->least = INFINITY;
    row->largest = -INFINITY;
    for (int thread = 0; thread < threads; thread++) {
        const struct partial *partial = pool_thread_scratch(row->pool, thread);
        if (partial->least != partial->least) return NPUQ_NOT_FINITE;
        row->least = partial->least < row->least ? partial->least : row->least;
    }
    for (size_t chunk = 0; chunk < row->chunks; chunk++) {
        row->largest = row->chunk_largest[chunk] > row->largest ? row->chunk_largest[chunk] : row->largest;
    }
    row->cut = UINT64_MAX;
    return isfinite(row->largest) ? NPUQ_OK : NPUQ_NOT_FINITE;
}

static int draw_row(struct row *row, int64_t *token) {
    const npuq_draw *draw = row->draw;
    const int threads = pool_threads(row->pool), status = open_row(row);
    if (status != NPUQ_OK) return status;
    if (draw->top_k > 0 && (size_t)draw->top_k < row->n) row->cut = search_best(row, draw->top_k);
    if (draw->top_p < 1) row->cut = search_likely(row, draw->top_p);
    if (draw->min_p > 0) {
        const uint64_t cut = search_min_p(row);
        row->cut = cut < row->cut ? cut : row->cut;
    }
    double best;
    uint64_t best_key = find_best(row, &best);
    for (int thread = 0; thread < threads; thread++) {
        struct partial *partial = pool_thread_scratch(row->pool, thread);
        partial->best = best;
        partial->best_key = best_key;
    }
    pool_run(row->pool, draw_chunk, row, row->chunks);
    for (int thread = 0; thread < threads; thread++) {
        const struct partial *partial = pool_thread_scratch(row->pool, thread);
        if (partial->best < best || (partial->best == best && partial->best_key >= best_key)) continue;
        best = partial->best;
        best_key = partial->best_key;
    }
    *token = (int64_t)(uint32_t)best_key;
    return NPUQ_OK;
}

static void add_likelihoods(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    const size_t count = chunk_size(row, chunk);
    row->kernels->likelihoods(row->logits + chunk * CHUNK, count, row->largest, row->inverse, partial->likelihood);
    for (size_t i = 0; i < count; i++) partial->sum[0][0] += partial->likelihood[i];
}

static int sum_row(struct row *row, double *sum) {
    const int status = open_row(row);
    if (status != NPUQ_OK) return status;
    for (int thread = 0; thread < pool_threads(row->pool); thread++) {
        ((struct partial *)pool_thread_scratch(row->pool, thread))->sum[0][0] = 0;
    }
    pool_run(row->pool, add_likelihoods, row, row->chunks);
    int64_t all = 0;
    for (int thread = 0; thread < pool_threads(row->pool); thread++) {
        all += ((struct partial *)pool_thread_scratch(row->pool, thread))->sum[0][0];
    }
    *sum = (double)all * 0x1p-40;
    return NPUQ_OK;
}

static struct row row_of(npuq_pool *pool, const float *logits, int64_t n, double temperature) {
    const double inverse = 1 / temperature;
    return (struct row){
        .pool = pool, .kernels = pool_kernels(pool), .logits = logits, .n = (size_t)n,
        .chunks = ((size_t)n + CHUNK - 1) / CHUNK, .inverse = inverse < 1e300 ? inverse : 1e300,
    };
}

static int row_fits(int64_t n, double temperature) {
    return n >= 1 && n <= MOST_LOGITS && temperature > 0 && isfinite(temperature);
}

int npuq_draw_token(npuq_pool *pool, const float *logits, int64_t n, const npuq_draw *draw, int64_t *token) {
    if (!row_fits(n, draw->temperature) || draw->top_k < 0 || !(draw->top_p > 0 && draw->top_p <= 1) ||
        !(draw->min_p >= 0 && draw->min_p <= 1)) {
        return NPUQ_BAD_SIZE;
    }
    pool_begin(pool);
    struct row row = row_of(pool, logits, n, draw->temperature);
    row.draw = draw;
    int status = draw_row(&row, token);
    pool_end(pool);
    return status;
}

int npuq_likelihood_sum(npuq_pool *pool, const float *logits, int64_t n, double temperature, double *sum) {
    if (!row_fits(n, temperature)) return NPUQ_BAD_SIZE;
    pool_begin(pool);
    struct row row = row_of(pool, logits, n, temperature);
    int status = sum_row(&row, sum);
    pool_end(pool);
    return status;
}
