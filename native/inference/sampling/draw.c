/* Draws a token: the one of those that the filters leave whose score + Gumbel noise is highest. */
#include <math.h>

#include "inference/philox.h"
#include "inference/sampling/row.h"

/* Sums of likelihoods stay below 2^63. */
enum { MOST_LOGITS = 1 << 22 };

/* No random number's noise is above this. */
static const double MOST_NOISE = 36.8;

static void find_range(const void *context, size_t chunk, int thread) {
    const struct row *row = context;
    struct partial *partial = pool_thread_scratch(row->pool, thread);
    float least, *groups = row->group_largest + chunk * GROUP_LANES, largest = -INFINITY;
    row->kernels->logit_range(row->logits + chunk * CHUNK, chunk_size(row, chunk), &least, groups);
    for (size_t lane = 0; lane < GROUP_LANES; lane++) largest = groups[lane] > largest ? groups[lane] : largest;
    row->chunk_largest[chunk] = largest;
    partial->least = partial->least <= least || partial->least != partial->least ? partial->least : least;
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
