/* Absorbed attention on the paged latent cache: to all keys that a query sees, or to selected ones. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"

/* Heads that share a task: its keys come from memory once for all of them, and from L2 for all but the first. Their
 * floats stay in L2 too. */
enum { TASK_HEADS = 32 };

struct attention {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_latent_cache *cache;
    const char *q_latent, *q_rope;
    size_t heads, heads_per_task, tasks_per_token;
    const int64_t *q_ends, *kv_lens;
    const int32_t *table;
    size_t sequences, table_stride;
    const int32_t *selected; /* [tokens, selected_stride], −1 after the last; NULL: all keys that a query sees */
    size_t selected_stride;
    float scale;
    size_t latent_width, rope_width; /* channels in whole groups: those of q, and of a tile of copied keys */
    char *out;
};

/* A query as int8 keys see it: times their channels' scales, and rounded to int8 itself. `codes` is scratch. */
static void round_query(const struct attention *attention, float *q, int8_t *codes) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels;
    float scale;
    for (size_t i = 0; i < l; i++) q[i] *= cache->latent.scale[i];
    attention->kernels->quant_row(q, l, codes, &scale);
    for (size_t i = 0; i < l; i++) q[i] = (float)codes[i] * scale;
}

/* Floats of `n` channels, zeros after them up to `width`. */
static void load_channels(const struct attention *attention, const void *x, int dtype, size_t n, size_t width, float *q) {
    attention->kernels->to_float(x, dtype, n, q);
    for (size_t i = n; i < width; i++) q[i] = 0;
}

static void load_query(const struct attention *attention, size_t row, float *q, int8_t *codes) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels, size = size_of(cache->rope.dtype);
    size_t wide = attention->latent_width, all = wide + attention->rope_width;
    load_channels(attention, attention->q_latent + row * l * size, cache->rope.dtype, l, wide, q);
    if (cache->latent.scale != NULL) round_query(attention, q, codes);
    load_channels(attention, attention->q_rope + row * d * size, cache->rope.dtype, d, attention->rope_width, q + wide);
    for (size_t i = 0; i < all; i++) q[i] *= attention->scale;
}

/* Some keys of one block in NZ layout, and their place in it. */
struct place {
    const char *latent, *rope; /* the block */
    size_t block_size, first, keys;
};

/* The sequence's keys from `key` on, of `keys` in all: as many as a tile takes of one block. */
static struct place find_keys(const struct attention *attention, size_t sequence, size_t key, size_t keys) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, d = (size_t)cache->rope.channels;
    size_t block_size = (size_t)cache->latent.block_size;
    if (key >= keys) return (struct place){0};
    size_t block = (size_t)attention->table[sequence * attention->table_stride + key / block_size];
    size_t first = key % block_size, some = block_size - first;
    some = some < ATTENTION_KEYS ? some : ATTENTION_KEYS;
    some = some < keys - key ? some : keys - key;
    return (struct place){
        .latent = (const char *)cache->latent.rows + block * l * block_size * size_of(cache->latent.dtype),
        .rope = (const char *)cache->rope.rows + block * d * block_size * size_of(cache->rope.dtype),
        .block_size = block_size,
        .first = first,
        .keys = some,
    };
}

/* Copies a token's channels into place `at` of a tile: NZ groups of 16, zeros in the last one where it is not full. */
static void copy_row(const npuq_pages *pages, size_t slot, size_t at, char *tile) {
    const size_t size = size_of(pages->dtype), group = nz_channels(pages->dtype) * size;
    const size_t bytes = (size_t)pages->channels * size, block_size = (size_t)pages->block_size;
    const char *from = (const char *)pages->rows;
    size_t step = group; /* from group to group */
    if (pages->layout == NPUQ_ND) {
        from += slot * bytes;
    } else {
        from += slot / block_size * block_size * bytes + slot % block_size * group;
        step = block_size * group;
    }
    char *to = tile + at * group;
    size_t whole = bytes / group, rest = bytes % group;
    if (group == 32) { /* a constant size is no call */
        for (size_t g = 0; g < whole; g++) memcpy(to + g * ATTENTION_KEYS * 32, from + g * step, 32);
    } else {
        for (size_t g = 0; g < whole; g++) memcpy(to + g * ATTENTION_KEYS * 64, from + g * step, 64);
    }
    if (rest > 0) {
        memset(to + whole * ATTENTION_KEYS * group, 0, group);
        memcpy(to + whole * ATTENTION_KEYS * group, from + whole * step, rest);
    }
}

/* The keys from number `key` on, of `keys` in all, copied into a tile: selected ones, or those of ND pages. */
static struct place copy_keys(const struct attention *attention, size_t sequence, const int32_t *selected, size_t key,
                              size_t keys, char *tile) {
    const npuq_latent_cache *cache = attention->cache;
    const int32_t *table = attention->table + sequence * attention->table_stride;
    size_t some = keys - key < ATTENTION_KEYS ? keys - key : ATTENTION_KEYS, block_size = (size_t)cache->latent.block_size;
    char *rope = tile + ATTENTION_KEYS * attention->latent_width * size_of(cache->latent.dtype);
    for (size_t j = 0; j < some; j++) {
        size_t position = selected != NULL ? (size_t)selected[key + j] : key + j;
        size_t slot = (size_t)table[position / block_size] * block_size + position % block_size;
        copy_row(&cache->latent, slot, j, tile);
        copy_row(&cache->rope, slot, j, rope);
    }
    return (struct place){.latent = tile, .rope = rope, .block_size = ATTENTION_KEYS, .keys = some};
}

static const char *first_row(const char *block, int dtype, size_t first) {
    return block == NULL ? NULL : block + first * nz_channels(dtype) * size_of(dtype);
}

/* A task's floats, head after head. */
struct gathered {
    float *q, *out; /* [heads, latent + rope], [heads, latent] */
    float largest[TASK_HEADS], total[TASK_HEADS];
};

/* Merges a tile's keys into all heads of a task: the first of them fetch the keys that follow. */
static void attend_heads(const struct attention *attention, const struct place *now, const struct place *next,
                         size_t heads, struct gathered *in) {
    const npuq_latent_cache *cache = attention->cache;
    size_t l = attention->latent_width, d = attention->rope_width;
    for (size_t head = 0; head < heads; head += ATTENTION_HEADS) {
        struct attention_tile tile = {
            .latent = now->latent, .rope = now->rope, .dtype = cache->rope.dtype, .latent_dtype = cache->latent.dtype,
            .block_size = now->block_size, .first = now->first, .keys = now->keys, .latent_dim = l,
            .rope_dim = d, .heads = heads - head < ATTENTION_HEADS ? heads - head : ATTENTION_HEADS,
            .q = in->q + head * (l + d),
            .next_latent = head > 0 ? NULL : first_row(next->latent, cache->latent.dtype, next->first),
            .next_rope = head > 0 ? NULL : first_row(next->rope, cache->rope.dtype, next->first),
            .largest = in->largest + head, .total = in->total + head, .out = in->out + head * l,
        };
        attention->kernels->attend(&tile);
    }
}

/* The number of a query's keys: of those that it sees, or of those selected among them. */
static size_t count_keys(const struct attention *attention, size_t sequence, size_t token, const int32_t *selected) {
    if (selected != NULL) {
        size_t keys = 0;
        while (keys < attention->selected_stride && selected[keys] >= 0) keys++;
        return keys;
    }
    /* The sequence's last query sees all of its keys, the one before all but one, … */
    int64_t seen = attention->kv_lens[sequence] - (attention->q_ends[sequence] - 1 - (int64_t)token);
    return seen > 0 ? (size_t)seen : 0;
}

static void attend_pages(const struct attention *attention, size_t sequence, size_t keys, size_t heads,
                         struct gathered *in) {
    struct place now = find_keys(attention, sequence, 0, keys);
    for (size_t key = 0; key < keys;) {
        key += now.keys;
        struct place next = find_keys(attention, sequence, key, keys);
        attend_heads(attention, &now, &next, heads, in);
        now = next;
    }
}

static void attend_copies(const struct attention *attention, size_t sequence, const int32_t *selected, size_t keys,
                          size_t heads, char *tile, struct gathered *in) {
    const struct place none = {0};
    for (size_t key = 0; key < keys; key += ATTENTION_KEYS) {
        struct place now = copy_keys(attention, sequence, selected, key, keys, tile);
        attend_heads(attention, &now, &none, heads, in);
    }
}

static bool copies_keys(const struct attention *attention) {
    return attention->selected != NULL || attention->cache->latent.layout == NPUQ_ND;
}

/* Some heads of one query token, over all its keys. */
static void attention_task(const void *context, size_t index, int thread) {
    const struct attention *attention = context;
    const npuq_latent_cache *cache = attention->cache;
    size_t l = (size_t)cache->latent.channels, wide = attention->latent_width, all = wide + attention->rope_width;
    size_t token = index / attention->tasks_per_token, sequence = 0;
    size_t head = index % attention->tasks_per_token * attention->heads_per_task, left = attention->heads - head;
    size_t heads = left < attention->heads_per_task ? left : attention->heads_per_task;
    while ((size_t)attention->q_ends[sequence] <= token) sequence++;
    const int32_t *selected = NULL;
    if (attention->selected != NULL) selected = attention->selected + token * attention->selected_stride;
    size_t keys = count_keys(attention, sequence, token, selected);

    struct gathered in = {.q = pool_thread_scratch(attention->pool, thread)};
    in.out = in.q + heads * all;
    for (size_t h = 0; h < heads; h++) {
        load_query(attention, token * attention->heads + head + h, in.q + h * all, (int8_t *)in.out);
        in.largest[h] = -INFINITY;
    }
    memset(in.out, 0, heads * wide * sizeof *in.out);
    if (copies_keys(attention)) {
        attend_copies(attention, sequence, selected, keys, heads, (char *)(in.out + heads * wide), &in);
    } else {
        attend_pages(attention, sequence, keys, heads, &in);
    }
    for (size_t h = 0; h < heads; h++) {
        float total = in.total[h], *out = in.out + h * wide;
        float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
        for (size_t c = 0; c < l; c++) out[c] *= share;
        if (cache->latent.scale != NULL) {
            for (size_t c = 0; c < l; c++) out[c] *= cache->latent.scale[c];
        }
        size_t row = token * attention->heads + head + h;
        char *to = attention->out + row * l * size_of(cache->rope.dtype);
        attention->kernels->from_float(out, l, to, cache->rope.dtype);
    }
}

/* As many heads as share their keys best, but several tasks for every thread; and one, where there are very few. */
static size_t heads_per_task(size_t tokens, size_t heads, size_t threads) {
    size_t most = TASK_HEADS;
    while (most > ATTENTION_HEADS && tokens * ((heads + most - 1) / most) < threads * 4) most /= 2;
    while (most > 1 && tokens * ((heads + most - 1) / most) < threads) most /= 2;
    return most;
}

static size_t whole_groups(const npuq_pages *pages) {
    size_t group = nz_channels(pages->dtype);
    return ((size_t)pages->channels + group - 1) / group * group;
}

static int attend(npuq_pool *pool, struct attention *attention) {
    if (attention->sequences == 0) return NPUQ_OK;
    const npuq_latent_cache *cache = attention->cache;
    size_t tokens = (size_t)attention->q_ends[attention->sequences - 1];
    size_t per_task = heads_per_task(tokens, attention->heads, (size_t)pool_threads(pool));
    attention->pool = pool;
    attention->kernels = pool_kernels(pool);
    attention->heads_per_task = per_task;
    attention->tasks_per_token = (attention->heads + per_task - 1) / per_task;
    attention->latent_width = whole_groups(&cache->latent);
    attention->rope_width = whole_groups(&cache->rope);
    size_t width = attention->latent_width + attention->rope_width;
    size_t bytes = per_task * (width + attention->latent_width) * sizeof(float);
    if (copies_keys(attention)) bytes += ATTENTION_KEYS * width * size_of(cache->rope.dtype);
    pool_begin(pool);
    int status = pool_scratch(pool, bytes, 0);
    if (status == NPUQ_OK) pool_run(pool, attention_task, attention, tokens * attention->tasks_per_token);
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
