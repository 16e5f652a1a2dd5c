/* Absorbed attention on the paged latent cache: to all keys that a query sees, or to selected ones.
 *
 * A query's keys are divided into spans, whose number depends on the number of its keys alone. The spans' results are merged
 * in order: by one task, or, where there are few queries, after tasks of their own, which share one long context. So results
 * depend neither on threads nor on what else a call computes. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "inference/latent/keys.h"

enum { MOST_SPANS = 16, LEAST_SPAN = 4 * ATTENTION_KEYS };

static size_t span_size(size_t keys) {
    const size_t size = (keys + MOST_SPANS - 1) / MOST_SPANS;
    return size < LEAST_SPAN ? LEAST_SPAN : (size + ATTENTION_KEYS - 1) / ATTENTION_KEYS * ATTENTION_KEYS;
}

static size_t count_spans(size_t keys) { return keys == 0 ? 1 : (keys + span_size(keys) - 1) / span_size(keys); }

/* Some heads of a query and all its keys, by number of the task. */
static struct span find_span(const struct attention *attention, size_t index) {
    struct span span = {.token = index / attention->tasks_per_token};
    span.head = index % attention->tasks_per_token * attention->heads_per_task;
    const size_t left = attention->heads - span.head;
    span.heads = left < attention->heads_per_task ? left : attention->heads_per_task;
    while ((size_t)attention->q_ends[span.sequence] <= span.token) span.sequence++;
    if (attention->selected != NULL) span.selected = attention->selected + span.token * attention->selected_stride;
    span.end = count_keys(attention, span.sequence, span.token, span.selected);
    return span;
}

static void clear(struct running *running, size_t heads, size_t width) {
    for (size_t h = 0; h < TASK_HEADS; h++) { /* vectors may read some behind the last head */
        running->largest[h] = -INFINITY;
        running->total[h] = 0;
    }
    memset(running->out, 0, heads * width * sizeof *running->out);
}

/* Merges the keys of `more` into `all`. */
static void merge(struct running *all, const struct running *more, size_t heads, size_t width) {
    for (size_t h = 0; h < heads; h++) {
        const float largest = more->largest[h] > all->largest[h] ? more->largest[h] : all->largest[h];
        const float keep = all->largest[h] == -INFINITY ? 0 : expf(all->largest[h] - largest);
        const float add = more->largest[h] == -INFINITY ? 0 : expf(more->largest[h] - largest);
        float *out = all->out + h * width;
        const float *other = more->out + h * width;
        for (size_t c = 0; c < width; c++) out[c] = out[c] * keep + other[c] * add;
        /* A sum that is no number stays one: of such scores the maximum need not be. */
        all->total[h] = all->total[h] * keep + more->total[h] * add + (more->total[h] - more->total[h]) + (all->total[h] - all->total[h]);
        all->largest[h] = largest;
    }
}

static void store(const struct attention *attention, const struct span *span, const struct running *from) {
    const npuq_latent_cache *cache = attention->cache;
    const size_t l = (size_t)cache->latent.channels;
    for (size_t h = 0; h < span->heads; h++) {
        float total = from->total[h], *out = from->out + h * attention->latent_width;
        float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
        for (size_t c = 0; c < l; c++) out[c] *= share;
        if (cache->latent.scale != NULL) {
            for (size_t c = 0; c < l; c++) out[c] *= cache->latent.scale[c];
        }
        size_t row = span->token * attention->heads + span->head + h;
        attention->kernels->from_float(out, l, attention->out + row * l * size_of(cache->rope.dtype), cache->rope.dtype);
    }
}

static size_t out_floats(const struct attention *attention) { return attention->heads_per_task * attention->latent_width; }

/* Some heads of one query token, over all its keys. */
static void query_task(const void *context, size_t index, int thread) {
    const struct attention *attention = context;
    struct span span = find_span(attention, index);
    const size_t keys = span.end, size = span_size(keys), width = attention->latent_width;
    float *memory = pool_thread_scratch(attention->pool, thread);
    struct running all = {.out = memory}, more = {.out = memory + out_floats(attention)};
    void *rest = memory + 2 * out_floats(attention);
    attention->arithmetic->load_queries(attention, &span, rest);
    clear(&all, span.heads, width);
    for (size_t first = 0; first < keys; first += size) {
        struct running *now = first == 0 ? &all : &more;
        span.first = first;
        span.end = keys - first < size ? keys : first + size;
        if (first > 0) clear(now, span.heads, width);
        attention->arithmetic->attend_span(attention, &span, now, rest);
        if (first > 0) merge(&all, now, span.heads, width);
    }
    store(attention, &span, &all);
}

static struct running *partial(const struct attention *attention, size_t index, size_t number) {
    const size_t each = sizeof(struct running) + out_floats(attention) * sizeof(float);
    struct running *running = (struct running *)(void *)((char *)attention->partial + (index * attention->spans + number) * each);
    running->out = (float *)(running + 1);
    return running;
}

/* One span of the same. */
static void span_task(const void *context, size_t index, int thread) {
    const struct attention *attention = context;
    const size_t number = index % attention->spans;
    struct span span = find_span(attention, index / attention->spans);
    const size_t keys = span.end, size = span_size(keys);
    if (number >= count_spans(keys)) return;
    struct running *in = partial(attention, index / attention->spans, number);
    void *memory = pool_thread_scratch(attention->pool, thread);
    span.first = number * size;
    span.end = keys - span.first < size ? keys : span.first + size;
    clear(in, span.heads, attention->latent_width);
    attention->arithmetic->load_queries(attention, &span, memory);
    attention->arithmetic->attend_span(attention, &span, in, memory);
}

static void merge_task(const void *context, size_t index, int thread) {
    (void)thread;
    const struct attention *attention = context;
    struct span span = find_span(attention, index);
    struct running *all = partial(attention, index, 0);
    for (size_t number = 1; number < count_spans(span.end); number++) {
        merge(all, partial(attention, index, number), span.heads, attention->latent_width);
    }
    store(attention, &span, all);
}

/* How the call is divided: as many heads a task as share their keys best, and spans of their own where queries are few. */
static void divide(struct attention *attention, size_t tokens, size_t threads) {
    size_t most = TASK_HEADS, spans = 1, longest = 0;
    for (size_t s = 0; s < attention->sequences; s++) {
        const size_t keys = (size_t)attention->kv_lens[s];
        longest = keys > longest ? keys : longest;
    }
    if (attention->selected != NULL && longest > attention->selected_stride) longest = attention->selected_stride;
    if (tokens * ((attention->heads + most - 1) / most) < threads * 4) spans = count_spans(longest);
    /* A query with fewer keys may have more spans than the longest, but none has more than this. */
    if (spans > 1) spans = MOST_SPANS;
    while (most > ATTENTION_HEADS && tokens * spans * ((attention->heads + most - 1) / most) < threads * 2) most /= 2;
    while (most > 1 && tokens * spans * ((attention->heads + most - 1) / most) < threads) most /= 2;
    attention->heads_per_task = most;
    attention->tasks_per_token = (attention->heads + most - 1) / most;
    attention->spans = spans > 1 ? spans : 0;
}

static size_t whole_groups(const npuq_pages *pages) {
    size_t group = nz_channels(pages->dtype);
    return ((size_t)pages->channels + group - 1) / group * group;
}

static int attend(npuq_pool *pool, struct attention *attention) {
    if (attention->sequences == 0) return NPUQ_OK;
    const npuq_latent_cache *cache = attention->cache;
    const size_t tokens = (size_t)attention->q_ends[attention->sequences - 1];
    attention->pool = pool;
    attention->kernels = pool_kernels(pool);
    const bool short_products = attention->kernels->bf16_scores != NULL && cache->rope.dtype == NPUQ_BF16;
    const bool codes = cache->latent.scale != NULL;
    attention->arithmetic = !short_products ? &float_attention : codes ? &int8_attention : &bf16_attention;
    attention->latent_width = whole_groups(&cache->latent);
    attention->rope_width = whole_groups(&cache->rope);
    divide(attention, tokens, (size_t)pool_threads(pool));
    const size_t tasks = tokens * attention->tasks_per_token, out = out_floats(attention) * sizeof(float);
    const size_t bytes = 2 * out + attention->arithmetic->span_bytes(attention, attention->heads_per_task);
    pool_begin(pool);
    int status = pool_scratch(pool, bytes, tasks * attention->spans * (sizeof(struct running) + out));
    if (status == NPUQ_OK && attention->spans == 0) {
        pool_run(pool, query_task, attention, tasks);
    } else if (status == NPUQ_OK) {
        attention->partial = pool_shared_scratch(pool);
        pool_run(pool, span_task, attention, tasks * attention->spans);
        pool_run(pool, merge_task, attention, tasks);
    }
    pool_end(pool);
    return status;
}

int npuq_attention_paged(npuq_pool *pool, const npuq_latent_cache *cache, const void *q_latent, const void *q_rope,
                         int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                         const int32_t *table, int64_t table_stride, float softmax_scale, void *out) {
    if (!latent_cache_fits(cache) || heads < 1) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(&cache->latent, kv_lens, sequences, table, table_stride)) {
        return NPUQ_BAD_INDEX;
    }
    struct attention attention = {
        .cache = cache, .q_latent = q_latent, .q_rope = q_rope, .heads = (size_t)heads, .q_ends = q_ends,
        .kv_lens = kv_lens, .table = table, .sequences = (size_t)sequences, .table_stride = (size_t)table_stride,
        .scale = softmax_scale, .out = out,
    };
    return attend(pool, &attention);
}

/* Every selected position is in its query's sequence. */
static bool selected_fit(const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences, const int32_t *selected,
                         int64_t count) {
    bool good = true;
    for (int64_t s = 0; s < sequences && good; s++) {
        for (int64_t i = (s > 0 ? q_ends[s - 1] : 0) * count; i < q_ends[s] * count; i++) good &= selected[i] < kv_lens[s];
    }
    return good;
}

int npuq_attention_selected(npuq_pool *pool, const npuq_latent_cache *cache, const void *q_latent, const void *q_rope,
                            int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                            const int32_t *table, int64_t table_stride, const int32_t *selected, int64_t count,
                            float softmax_scale, void *out) {
    if (!latent_cache_fits(cache) || cache->latent.scale != NULL || heads < 1 || count < 0) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(&cache->latent, kv_lens, sequences, table, table_stride) ||
        !selected_fit(q_ends, kv_lens, sequences, selected, count)) {
        return NPUQ_BAD_INDEX;
    }
    struct attention attention = {
        .cache = cache, .q_latent = q_latent, .q_rope = q_rope, .heads = (size_t)heads, .q_ends = q_ends,
        .kv_lens = kv_lens, .table = table, .sequences = (size_t)sequences, .table_stride = (size_t)table_stride,
        .selected = selected, .selected_stride = (size_t)count, .scale = softmax_scale, .out = out,
    };
    return attend(pool, &attention);
}
