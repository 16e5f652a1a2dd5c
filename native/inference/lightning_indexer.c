/* Scores of index keys, and selection of the largest: for as many queries at a time as their scores fit in memory. */
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"

enum {
    SPAN = 1024,             /* keys of a task */
    MOST_SCORES = 4 << 20,   /* of the queries at a time, but at least of one */
    BINS = 1 << 11,          /* of a digit of a score's rank: 11, 11 and 10 bits */
};

struct scoring {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_pages *keys;
    const char *query, *weights;
    size_t heads, first, spans, stride; /* the first token; a row of scores */
    const int64_t *q_ends, *kv_lens;
    const int32_t *table;
    size_t table_stride;
    float *scores;
};

struct seen_keys {
    size_t sequence, count;
};

/* The sequence of a token, and how many keys the token sees. */
static struct seen_keys keys_of(const struct scoring *scoring, size_t token) {
    size_t sequence = 0;
    while ((size_t)scoring->q_ends[sequence] <= token) sequence++;
    int64_t seen = scoring->kv_lens[sequence] - (scoring->q_ends[sequence] - 1 - (int64_t)token);
    return (struct seen_keys){sequence, seen > 0 ? (size_t)seen : 0};
}

/* One query and some of its keys, a tile of them at a time. */
static void score_task(const void *context, size_t index, int thread) {
    const struct scoring *scoring = context;
    const struct kernels *kernels = scoring->kernels;
    const npuq_pages *keys = scoring->keys;
    size_t d = (size_t)keys->channels, heads = scoring->heads, size = size_of(keys->dtype);
    size_t block_size = (size_t)keys->block_size, row = index / scoring->spans, token = scoring->first + row;
    struct seen_keys seen = keys_of(scoring, token);
    size_t key = index % scoring->spans * SPAN, end = key + SPAN < seen.count ? key + SPAN : seen.count;
    if (key >= end) return;
    float *q = pool_thread_scratch(scoring->pool, thread), *weights = q + heads * d, *products = weights + heads;
    kernels->to_float(scoring->query + token * heads * d * size, keys->dtype, heads * d, q);
    kernels->to_float(scoring->weights + token * heads * size, keys->dtype, heads, weights);
    const int32_t *table = scoring->table + seen.sequence * scoring->table_stride;
    for (size_t some; key < end; key += some) {
        size_t offset = key % block_size;
        some = block_size - offset < ATTENTION_KEYS ? block_size - offset : ATTENTION_KEYS;
        some = end - key < some ? end - key : some;
        const char *at = (const char *)keys->rows + ((size_t)table[key / block_size] * block_size + offset) * d * size;
        kernels->dot_float(at, keys->dtype, d, some, q, d, heads, d, products, ATTENTION_KEYS, (struct following){0});
        kernels->weigh_relu(products, ATTENTION_KEYS, weights, heads, some, scoring->scores + row * scoring->stride + key);
    }
}

struct selection {
    npuq_pool *pool;
    const struct scoring *scoring; /* NULL: `seen` counts the keys */
    const int64_t *seen;
    const float *scores;
    size_t stride, count;
    int32_t *selected;
};

/* Numbers in the order of scores: −0 is 0, and a NaN comes last. */
static uint32_t rank_of(float score) {
    if (score != score) return UINT32_MAX;
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The rank of the count-th largest score, found digit by digit; *equal: how many of this rank belong to them. */
static uint32_t least_selected(const float *scores, size_t seen, size_t count, uint32_t *bins, size_t *equal) {
    static const int shifts[3] = {21, 10, 0};
    uint32_t found = 0, known = 0; /* the digits so far, and a mask of them */
    for (int digit = 0; digit < 3; digit++) {
        int shift = shifts[digit];
        uint32_t last = (digit < 2 ? BINS : BINS / 2) - 1, bin = last;
        memset(bins, 0, BINS * sizeof *bins);
        for (size_t i = 0; i < seen; i++) {
            uint32_t rank = rank_of(scores[i]);
            if ((rank & known) == found) bins[rank >> shift & last]++;
        }
        while (bins[bin] < count) count -= bins[bin--];
        found |= bin << shift;
        known |= last << shift;
    }
    *equal = count;
    return found;
}

static void select_task(const void *context, size_t row, int thread) {
    const struct selection *selection = context;
    const float *scores = selection->scores + row * selection->stride;
    size_t count = selection->count, seen = 0, found = 0, equal = 0;
    size_t token = row;
    if (selection->scoring != NULL) {
        token += selection->scoring->first;
        seen = keys_of(selection->scoring, token).count;
    } else {
        seen = (size_t)selection->seen[row];
    }
    int32_t *selected = selection->selected + token * count;
    uint32_t least = 0; /* fewer than wanted: all */
    if (seen > count && count > 0) {
        least = least_selected(scores, seen, count, pool_thread_scratch(selection->pool, thread), &equal);
    }
    for (size_t i = 0; i < seen && found < count; i++) {
        uint32_t rank = seen > count ? rank_of(scores[i]) : 1;
        bool one_of_equals = rank == least && equal > 0;
        equal -= one_of_equals;
        if (rank > least || one_of_equals) selected[found++] = (int32_t)i;
    }
    while (found < count) selected[found++] = -1;
}

int npuq_top_k(npuq_pool *pool, const float *scores, int64_t rows, int64_t cols, const int64_t *seen, int64_t count,
               int32_t *selected) {
    if (rows < 0 || cols < 0 || cols > INT32_MAX || count < 0) return NPUQ_BAD_SIZE;
    for (int64_t row = 0; row < rows; row++) {
        if (seen[row] < 0 || seen[row] > cols) return NPUQ_BAD_INDEX;
    }
    struct selection selection = {pool, NULL, seen, scores, (size_t)cols, (size_t)count, selected};
    pool_begin(pool);
    int status = pool_scratch(pool, BINS * sizeof(uint32_t), 0);
    if (status == NPUQ_OK) pool_run(pool, select_task, &selection, (size_t)rows);
    pool_end(pool);
    return status;
}

static size_t longest(const int64_t *kv_lens, int64_t sequences) {
    int64_t most = 0;
    for (int64_t s = 0; s < sequences; s++) most = kv_lens[s] > most ? kv_lens[s] : most;
    return (size_t)most;
}

/* Scores and selections of as many tokens at a time as `scores` has rows for. */
static void select_by_rows(struct scoring *scoring, struct selection *selection, size_t tokens, size_t rows) {
    for (size_t first = 0; first < tokens; first += rows) {
        size_t some = tokens - first < rows ? tokens - first : rows;
        scoring->first = first;
        pool_run(scoring->pool, score_task, scoring, some * scoring->spans);
        pool_run(scoring->pool, select_task, selection, some);
    }
}

int npuq_lightning_indexer(npuq_pool *pool, const npuq_pages *keys, const void *query, const void *weights,
                           int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                           const int32_t *table, int64_t table_stride, int64_t count, int32_t *selected) {
    if (!pages_fit(keys) || keys->layout != NPUQ_ND || heads < 1 || count < 0) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(keys, kv_lens, sequences, table, table_stride)) {
        return NPUQ_BAD_INDEX;
    }
    if (sequences == 0) return NPUQ_OK;
    size_t tokens = (size_t)q_ends[sequences - 1], most = longest(kv_lens, sequences), rows = MOST_SCORES;
    if (most > INT32_MAX) return NPUQ_BAD_INDEX;
    rows = most > 0 ? rows / most : tokens;
    rows = rows < 1 ? 1 : rows < tokens ? rows : tokens;
    size_t floats = (size_t)heads * ((size_t)keys->channels + 1 + ATTENTION_KEYS), bins = BINS * sizeof(uint32_t);
    size_t bytes = floats * sizeof(float) > bins ? floats * sizeof(float) : bins;
    pool_begin(pool);
    int status = pool_scratch(pool, bytes, rows * most * sizeof(float));
    if (status == NPUQ_OK) {
        struct scoring scoring = {
            .pool = pool, .kernels = pool_kernels(pool), .keys = keys, .query = query, .weights = weights,
            .heads = (size_t)heads, .spans = (most + SPAN - 1) / SPAN, .stride = most, .q_ends = q_ends,
            .kv_lens = kv_lens, .table = table, .table_stride = (size_t)table_stride,
            .scores = pool_shared_scratch(pool),
        };
        struct selection selection = {pool, &scoring, NULL, scoring.scores, most, (size_t)count, selected};
        select_by_rows(&scoring, &selection, tokens, rows);
    }
    pool_end(pool);
    return status;
}
