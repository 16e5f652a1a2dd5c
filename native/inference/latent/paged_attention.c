/* Absorbed attention on the paged latent cache: to all keys that a query sees, or to selected ones.
 *
 * A query's keys are divided into spans, whose number depends on the number of its keys alone. The spans' results are merged
 * in order: by one task, or, where there are few queries, after tasks of their own, which share one long context. Where heads
 * are few, a task takes several tokens of a sequence whose spans begin at the same keys. So results depend neither on threads
 * nor on what else a call computes. */
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

/* How many tokens from `token` on share their tasks: their spans begin at the same keys. */
static size_t count_together(const struct attention *attention, size_t sequence, size_t token, size_t most) {
    const size_t end = (size_t)attention->q_ends[sequence];
    if (most == 1) return 1;
    const size_t keys = count_keys(attention, sequence, token, NULL), size = span_size(keys);
    size_t tokens = 1;
    while (keys > 0 && tokens < most && token + tokens < end && span_size(keys + tokens) == size) tokens++;
    return tokens;
}

/* Divides the call's tokens into groups of at most `most`; returns how many there are. */
static size_t group_tokens(const struct attention *attention, size_t most, struct group *groups) {
    size_t count = 0, token = 0;
    for (size_t s = 0; s < attention->sequences; s++) {
        while (token < (size_t)attention->q_ends[s]) {
            const size_t tokens = count_together(attention, s, token, most);
            if (groups != NULL) groups[count] = (struct group){.sequence = s, .token = token, .tokens = tokens};
            token += tokens;
            count++;
        }
    }
    return count;
}

/* Some rows and all their keys, by number of the task. */
static struct span find_span(const struct attention *attention, size_t index) {
    const struct group *group = attention->groups + index / attention->tasks_per_group;
    struct span span = {.sequence = group->sequence, .token = group->token, .tokens = group->tokens};
    span.head = index % attention->tasks_per_group * attention->heads_per_task;
    const size_t left = attention->heads - span.head;
    span.rows = group->tokens * (left < attention->heads_per_task ? left : attention->heads_per_task);
    if (attention->selected != NULL) span.selected = attention->selected + span.token * attention->selected_stride;
    span.seen = count_keys(attention, span.sequence, span.token, span.selected);
    span.end = span.seen + span.tokens - 1;
    return span;
}

static void clear(struct running *running, size_t rows, size_t width) {
    for (size_t r = 0; r < TASK_ROWS; r++) { /* vectors may read some behind the last row */
        running->largest[r] = -INFINITY;
        running->total[r] = 0;
    }
    memset(running->out, 0, rows * width * sizeof *running->out);
}

/* Merges the keys from number `first` on, which are in `more`, into `all`, for the rows that see any of them. */
static void merge(const struct span *span, size_t first, size_t width, struct running *all, const struct running *more) {
    for (size_t r = 0; r < span->rows; r++) {
        if (seen_by(span, r, first, 1) == 0) continue;
        const float largest = more->largest[r] > all->largest[r] ? more->largest[r] : all->largest[r];
        const float keep = all->largest[r] == -INFINITY ? 0 : expf(all->largest[r] - largest);
        const float add = more->largest[r] == -INFINITY ? 0 : expf(more->largest[r] - largest);
        float *out = all->out + r * width;
        const float *other = more->out + r * width;
        for (size_t c = 0; c < width; c++) out[c] = out[c] * keep + other[c] * add;
        /* A sum that is no number stays one: of such scores the maximum need not be. */
        all->total[r] = all->total[r] * keep + more->total[r] * add + (more->total[r] - more->total[r]) + (all->total[r] - all->total[r]);
        all->largest[r] = largest;
    }
}

static void store(const struct attention *attention, const struct span *span, const struct running *from) {
    const npuq_latent_cache *cache = attention->cache;
    const size_t l = (size_t)cache->latent.channels, first = first_row(attention, span);
    for (size_t r = 0; r < span->rows; r++) {
        float total = from->total[r], *out = from->out + r * attention->latent_width;
        float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
        for (size_t c = 0; c < l; c++) out[c] *= share;
        if (cache->latent.scale != NULL) {
            for (size_t c = 0; c < l; c++) out[c] *= cache->latent.scale[c];
        }
        attention->kernels->from_float(out, l, attention->out + (first + r) * l * size_of(cache->rope.dtype), cache->rope.dtype);
    }
}

static size_t rows_per_task(const struct attention *attention) { return attention->heads_per_task * attention->tokens_per_task; }

static size_t out_floats(const struct attention *attention) { return rows_per_task(attention) * attention->latent_width; }

/* Some rows, over all their keys. */
static void query_task(const void *context, size_t index, int thread) {
    const struct attention *attention = context;
    struct span span = find_span(attention, index);
    const size_t keys = span.end, size = span_size(span.seen), width = attention->latent_width;
    float *memory = pool_thread_scratch(attention->pool, thread);
    struct running all = {.out = memory}, more = {.out = memory + out_floats(attention)};
    void *rest = memory + 2 * out_floats(attention);
    attention->arithmetic->load_queries(attention, &span, rest);
    clear(&all, span.rows, width);
    for (size_t first = 0; first < keys; first += size) {
        struct running *now = first == 0 ? &all : &more;
        span.first = first;
        span.end = keys - first < size ? keys : first + size;
        if (first > 0) clear(now, span.rows, width);
        attention->arithmetic->attend_span(attention, &span, now, rest);
        if (first > 0) merge(&span, first, width, &all, now);
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
    const size_t keys = span.end, size = span_size(span.seen);
    if (number >= count_spans(keys)) return;
    struct running *in = partial(attention, index / attention->spans, number);
    void *memory = pool_thread_scratch(attention->pool, thread);
    span.first = number * size;
    span.end = keys - span.first < size ? keys : span.first + size;
    clear(in, span.rows, attention->latent_width);
    attention->arithmetic->load_queries(attention, &span, memory);
    attention->arithmetic->attend_span(attention, &span, in, memory);
}

static void merge_task(const void *context, size_t index, int thread) {
    (void)thread;
    const struct attention *attention = context;
    const struct span span = find_span(attention, index);
    const size_t size = span_size(span.seen);
    struct running *all = partial(attention, index, 0);
    for (size_t number = 1; number < count_spans(span.end); number++) {
        merge(&span, number * size, attention->latent_width, all, partial(attention, index, number));
    }
    store(attention, &span, all);
}

/* How the call is divided: as many heads or tokens a task as share their keys best, and spans of their own where queries are
 * few. Selected keys are each token's own. Returns the number of groups of tokens. */
static size_t divide(struct attention *attention, size_t threads) {
    size_t most = TASK_ROWS, together = 1, spans = 1, longest = 0;
    for (size_t s = 0; s < attention->sequences; s++) {
        const size_t keys = (size_t)attention->kv_lens[s];
        longest = keys > longest ? keys : longest;
    }
    if (attention->selected != NULL && longest > attention->selected_stride) longest = attention->selected_stride;
    if (attention->selected == NULL && attention->heads < TASK_ROWS) together = TASK_ROWS / attention->heads;
    size_t groups = group_tokens(attention, together, NULL);
    while (together > 1 && groups * count_spans(longest) < threads * 2) {
        together /= 2;
        groups = group_tokens(attention, together, NULL);
    }
    if (groups * ((attention->heads + most - 1) / most) < threads * 4) spans = count_spans(longest);
    /* A query with fewer keys may have more spans than the longest, but none has more than this. */
    if (spans > 1) spans = MOST_SPANS;
    while (most > ATTENTION_HEADS && groups * spans * ((attention->heads + most - 1) / most) < threads * 2) most /= 2;
    while (most > 1 && groups * spans * ((attention->heads + most - 1) / most) < threads) most /= 2;
    attention->heads_per_task = together > 1 ? attention->heads : most;
    attention->tokens_per_task = together;
    attention->tasks_per_group = (attention->heads + attention->heads_per_task - 1) / attention->heads_per_task;
    attention->spans = spans > 1 ? spans : 0;
    return groups;
}

static size_t whole_groups(const npuq_pages *pages) {
    size_t group = nz_channels(pages->dtype);
    return ((size_t)pages->channels + group - 1) / group * group;
}

static int attend(npuq_pool *pool, struct attention *attention) {
    if (attention->sequences == 0) return NPUQ_OK;
    const npuq_latent_cache *cache = attention->cache;
    attention->pool = pool;
    attention->kernels = pool_kernels(pool);
    const bool short_products = attention->kernels->bf16_scores != NULL && cache->rope.dtype == NPUQ_BF16;
    const bool codes = cache->latent.scale != NULL;
    attention->arithmetic = !short_products ? &float_attention : codes ? &int8_attention : &bf16_attention;
    attention->latent_width = whole_groups(&cache->latent);
    attention->rope_width = whole_groups(&cache->rope);
    const size_t groups = divide(attention, (size_t)pool_threads(pool)), tasks = groups * attention->tasks_per_group;
    const size_t out = out_floats(attention) * sizeof(float), listed = (groups * sizeof(struct group) + 63) / 64 * 64;
    const size_t bytes = 2 * out + attention->arithmetic->span_bytes(attention, rows_per_task(attention));
    pool_begin(pool);
    int status = pool_scratch(pool, bytes, listed + tasks * attention->spans * (sizeof(struct running) + out));
    if (status == NPUQ_OK) {
        attention->groups = pool_shared_scratch(pool);
        attention->partial = (char *)attention->groups + listed;
        group_tokens(attention, attention->tokens_per_task, attention->groups);
    }
    if (status == NPUQ_OK && attention->spans == 0) {
        pool_run(pool, query_task, attention, tasks);
    } else if (status == NPUQ_OK) {
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
