/* Grouped-query attention: query heads that share a head of keys and values are rows of one product.
 *
 * A task takes some queries of one sequence, all heads of one group, and goes through their keys in tiles. Keys and values
 * are read where they lie, a row of channels each; those of NZ pages and codes are decoded first. A query that is alone in
 * its sequence has its keys divided into spans, so that threads share a long context: their results are merged. Neither
 * depends on the number of threads, nor on that of heads. */
#include <math.h>
#include <string.h>

#include "common/checks.h"
#include "common/pool.h"

enum {
    ROWS = 128,
    KEYS = ATTENTION_KEYS,
    SPAN = 16 * KEYS,
    FEW_ROWS = 16, /* up to so many rows a task waits for memory: */
    STRIP = 4,     /* it scores so many keys at a time, */
    AHEAD = 16,    /* and fetches others that far ahead, and the values of these. */
};

/* Some queries of a sequence (counted from the step's first) and the keys that they attend to. */
struct block {
    int64_t sequence, first, count;
    int64_t key, end;
    float *partial; /* where a span's results go, [kv_heads, group, head_dim + 2]; NULL: all keys, to `out` */
};

struct grouped {
    npuq_pool *pool;
    const struct kernels *kernels;
    const npuq_kv_cache *cache;
    const int32_t *table; /* NULL: a sequence's slots follow those of the sequence before */
    size_t table_stride;
    const int64_t *q_ends, *kv_lens;
    const char *q;
    size_t heads, kv_heads, group, dim, rows; /* rows: the most of a task */
    int causal, dtype;
    float scale;
    char *out;
    const struct block *blocks;
};

/* A task's floats, in the thread's scratch. */
struct buffers {
    float *q, *out, *score, *largest, *total, *keys, *values;
};

/* A tile of one head's keys or values. */
struct tile {
    const void *rows;
    int dtype;
    size_t stride;
};

static bool decodes(const npuq_pages *pages) { return pages->layout == NPUQ_NZ || pages->scale != NULL; }

static size_t task_floats(const struct grouped *grouped) {
    size_t tiles = decodes(&grouped->cache->key) || decodes(&grouped->cache->value) ? 2 * KEYS * grouped->dim : 0;
    return grouped->rows * (2 * grouped->dim + KEYS + 2) + tiles;
}

static struct buffers divide(const struct grouped *grouped, float *memory) {
    struct buffers to = {.q = memory};
    to.out = to.q + grouped->rows * grouped->dim;
    to.score = to.out + grouped->rows * grouped->dim;
    to.largest = to.score + grouped->rows * KEYS;
    to.total = to.largest + grouped->rows;
    to.keys = to.total + grouped->rows;
    to.values = to.keys + KEYS * grouped->dim;
    return to;
}

/* The slot of a sequence's key, and how many keys from it on lie in consecutive slots. */
static size_t find_slot(const struct grouped *grouped, const struct block *block, int64_t key, size_t *together) {
    size_t block_size = (size_t)grouped->cache->key.block_size, at = (size_t)key % block_size;
    if (grouped->table == NULL) {
        int64_t before = 0;
        for (int64_t s = 0; s < block->sequence; s++) before += grouped->kv_lens[s];
        *together = KEYS;
        return (size_t)(before + key);
    }
    *together = block_size - at;
    size_t page = (size_t)grouped->table[(size_t)block->sequence * grouped->table_stride + (size_t)key / block_size];
    return page * block_size + at;
}

/* Channels of `head` at `count` slots of one page, as floats [count, dim]. */
static void decode(const struct grouped *grouped, const npuq_pages *pages, size_t slot, size_t count, size_t head, float *to) {
    size_t size = size_of(pages->dtype), block_size = (size_t)pages->block_size, dim = grouped->dim;
    size_t channels = (size_t)pages->channels, width = nz_channels(pages->dtype), first = head * dim;
    const char *page = (const char *)pages->rows + slot / block_size * block_size * channels * size;
    for (size_t j = 0; j < count; j++) {
        size_t offset = slot % block_size + j;
        for (size_t c = 0; c < dim;) {
            size_t channel = first + c, some = dim - c, at = offset * channels + channel;
            if (pages->layout == NPUQ_NZ) {
                size_t left = width - channel % width;
                some = some < left ? some : left;
                at = (channel / width * block_size + offset) * width + channel % width;
            }
            if (pages->scale == NULL) {
                grouped->kernels->to_float(page + at * size, pages->dtype, some, to + j * dim + c);
            } else {
                const int8_t *code = (const int8_t *)page + at;
                for (size_t i = 0; i < some; i++) to[j * dim + c + i] = (float)code[i] * pages->scale[channel + i];
            }
            c += some;
        }
    }
}

static struct tile find_tile(const struct grouped *grouped, const npuq_pages *pages, size_t slot, size_t count,
                             size_t head, float *decoded) {
    if (decodes(pages)) {
        decode(grouped, pages, slot, count, head, decoded);
        return (struct tile){decoded, NPUQ_F32, grouped->dim};
    }
    size_t channels = (size_t)pages->channels, at = slot * channels + head * grouped->dim;
    return (struct tile){(const char *)pages->rows + at * size_of(pages->dtype), pages->dtype, channels};
}

static void load_queries(const struct grouped *grouped, const struct block *block, size_t head, struct buffers *to) {
    size_t size = size_of(grouped->dtype), dim = grouped->dim, group = grouped->group;
    for (size_t i = 0; i < (size_t)block->count; i++) {
        for (size_t g = 0; g < group; g++) {
            size_t row = i * group + g, from = ((size_t)block->first + i) * grouped->heads + head * group + g;
            float *q = to->q + row * dim;
            grouped->kernels->to_float(grouped->q + from * dim * size, grouped->dtype, dim, q);
            grouped->kernels->multiply_row(grouped->scale, dim, q);
            to->largest[row] = -INFINITY;
            to->total[row] = 0;
        }
    }
    memset(to->out, 0, (size_t)block->count * group * dim * sizeof(float));
}

/* Keys that the block's query `i` sees. */
static int64_t seen_by(const struct grouped *grouped, const struct block *block, int64_t i) {
    int64_t keys = grouped->kv_lens[block->sequence];
    return grouped->causal ? keys - (grouped->q_ends[block->sequence] - 1 - block->first - i) : keys;
}

/* The number of `keys` keys from `key` on that the block's query `i` sees. */
static size_t visible(const struct grouped *grouped, const struct block *block, int64_t i, int64_t key, size_t keys) {
    int64_t seen = seen_by(grouped, block, i) - key;
    return seen < 0 ? 0 : (size_t)seen < keys ? (size_t)seen : keys;
}

static void fetch_rows(const struct tile *tile, size_t row, size_t rows, size_t dim) {
    size_t size = size_of(tile->dtype), bytes = dim * size;
    for (size_t j = row; j < row + rows; j++) {
        const char *at = (const char *)tile->rows + j * tile->stride * size;
        for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
    }
}

/* Scores of `count` keys for `rows` queries from `q` on. */
static void score_keys(const struct grouped *grouped, const struct tile *keys, const struct tile *values, size_t count,
                       const float *q, size_t rows, float *score) {
    size_t dim = grouped->dim, size = size_of(keys->dtype), strip = rows > FEW_ROWS ? count : STRIP;
    for (size_t j = 0; j < count; j += strip) {
        size_t some = count - j < strip ? count - j : strip;
        if (rows <= FEW_ROWS) {
            fetch_rows(keys, j + AHEAD, some, dim); /* maybe behind the page's end, where it does nothing */
            fetch_rows(values, j, some, dim);
        }
        grouped->kernels->dot_float((const char *)keys->rows + j * keys->stride * size, keys->dtype, keys->stride, some, q,
                                    dim, rows, dim, score + j, KEYS, (struct following){0});
    }
}

/* Merges a tile's keys into the block's queries. A value behind those that a query sees does not meet its weight of 0: it
 * may be no number. */
static void attend_tile(const struct grouped *grouped, const struct block *block, const struct tile *keys,
                        const struct tile *values, int64_t key, size_t count, struct buffers *in) {
    const struct kernels *kernels = grouped->kernels;
    size_t dim = grouped->dim, group = grouped->group, queries = (size_t)block->count, from = 0;
    while (from < queries && visible(grouped, block, (int64_t)from, key, count) == 0) from++;
    if (from == queries) return;
    score_keys(grouped, keys, values, count, in->q + from * group * dim, (queries - from) * group,
               in->score + from * group * KEYS);
    size_t whole = queries;
    for (size_t i = queries; i-- > from;) {
        size_t seen = visible(grouped, block, (int64_t)i, key, count), first = i * group;
        for (size_t row = first; row < first + group; row++) {
            float keep = kernels->online_softmax(in->score + row * KEYS, seen, count, in->largest + row, in->total + row);
            if (keep != 1) kernels->multiply_row(keep, dim, in->out + row * dim);
        }
        if (seen == count) whole = i;
        else kernels->axpy_add(values->rows, values->dtype, values->stride, seen, dim, in->score + first * KEYS, KEYS, group, in->out + first * dim, dim);
    }
    kernels->axpy_add(values->rows, values->dtype, values->stride, count, dim, in->score + whole * group * KEYS, KEYS,
                      (queries - whole) * group, in->out + whole * group * dim, dim);
}

static void store(const struct grouped *grouped, int64_t token, size_t head, float total, float *row) {
    float share = total > 0 || total != total ? 1 / total : 0; /* no key seen: zeros */
    grouped->kernels->multiply_row(share, grouped->dim, row);
    size_t place = (size_t)token * grouped->heads + head;
    grouped->kernels->from_float(row, grouped->dim, grouped->out + place * grouped->dim * size_of(grouped->dtype), grouped->dtype);
}

static void grouped_task(const void *context, size_t index, int thread) {
    const struct grouped *grouped = context;
    const struct block *block = &grouped->blocks[index / grouped->kv_heads];
    size_t head = index % grouped->kv_heads, group = grouped->group, dim = grouped->dim;
    struct buffers in = divide(grouped, pool_thread_scratch(grouped->pool, thread));
    load_queries(grouped, block, head, &in);
    for (int64_t key = block->key; key < block->end;) {
        size_t together, count = (size_t)(block->end - key < KEYS ? block->end - key : KEYS);
        size_t slot = find_slot(grouped, block, key, &together);
        count = count < together ? count : together;
        struct tile keys = find_tile(grouped, &grouped->cache->key, slot, count, head, in.keys);
        struct tile values = find_tile(grouped, &grouped->cache->value, slot, count, head, in.values);
        attend_tile(grouped, block, &keys, &values, key, count, &in);
        key += (int64_t)count;
    }
    for (size_t row = 0; row < (size_t)block->count * group; row++) {
        float *out = in.out + row * dim;
        if (block->partial == NULL) {
            store(grouped, block->first + (int64_t)(row / group), head * group + row % group, in.total[row], out);
        } else {
            float *to = block->partial + (head * group + row) * (dim + 2);
            to[0] = in.largest[row];
            to[1] = in.total[row];
            memcpy(to + 2, out, dim * sizeof *out);
        }
    }
}

/* The spans of one head of one query, into the first of them. `index`: block after block, head after head. */
static void merge_task(const void *context, size_t index, int thread) {
    (void)thread;
    const struct grouped *grouped = context;
    const struct block *block = &grouped->blocks[index / grouped->heads];
    if (block->partial == NULL || block->key > 0) return; /* no span, or not the first */
    size_t head = index % grouped->heads, dim = grouped->dim;
    size_t spans = 1;
    while (block[spans - 1].end < seen_by(grouped, block, 0)) spans++;
    float largest = -INFINITY;
    for (size_t s = 0; s < spans; s++) {
        const float *part = block[s].partial + head * (dim + 2);
        largest = part[0] > largest ? part[0] : largest;
    }
    float total = 0, *sum = block->partial + head * (dim + 2) + 2;
    for (size_t s = 0; s < spans; s++) {
        const float *part = block[s].partial + head * (dim + 2);
        float weight = part[0] == -INFINITY ? 0 : expf(part[0] - largest);
        total += weight * part[1];
        if (s == 0) grouped->kernels->multiply_row(weight, dim, sum);
        else grouped->kernels->scale_add_row(weight, part + 2, dim, sum);
    }
    store(grouped, block->first, head, total, sum);
}

/* Lists the blocks of a step, `blocks` NULL to count them; `floats`: of spans' results. */
static size_t list_blocks(const struct grouped *grouped, int64_t sequences, struct block *blocks, float *partial, size_t *floats) {
    size_t count = 0, part = grouped->heads * (grouped->dim + 2);
    int64_t most = (int64_t)(grouped->rows / grouped->group);
    *floats = 0;
    for (int64_t s = 0; s < sequences; s++) {
        int64_t start = s > 0 ? grouped->q_ends[s - 1] : 0, stop = grouped->q_ends[s];
        for (int64_t first = start; first < stop; first += most) {
            struct block block = {.sequence = s, .first = first, .count = stop - first < most ? stop - first : most};
            int64_t seen = seen_by(grouped, &block, block.count - 1);
            bool divided = stop - start == 1 && seen > SPAN;
            do {
                block.end = divided && seen - block.key > SPAN ? block.key + SPAN : seen;
                if (blocks != NULL) {
                    if (divided) block.partial = partial + *floats;
                    blocks[count] = block;
                }
                if (divided) *floats += part;
                count++;
                block.key = block.end;
            } while (block.key < seen);
        }
    }
    return count;
}

static int attend(struct grouped *grouped, int64_t sequences) {
    npuq_pool *pool = grouped->pool;
    size_t floats = 0;
    grouped->kernels = pool_kernels(pool);
    grouped->group = grouped->heads / grouped->kv_heads;
    grouped->rows = grouped->group > ROWS ? grouped->group : ROWS / grouped->group * grouped->group;
    size_t blocks = list_blocks(grouped, sequences, NULL, NULL, &floats);
    pool_begin(pool);
    int status = pool_scratch(pool, task_floats(grouped) * sizeof(float), (floats + 1) * sizeof(float) + blocks * sizeof(struct block));
    if (status == NPUQ_OK) {
        float *partial = pool_shared_scratch(pool);
        struct block *listed = (struct block *)(partial + floats + floats % 2);
        list_blocks(grouped, sequences, listed, partial, &floats);
        grouped->blocks = listed;
        pool_run(pool, grouped_task, grouped, blocks * grouped->kv_heads);
        if (floats > 0) pool_run(pool, merge_task, grouped, blocks * grouped->heads);
    }
    pool_end(pool);
    return status;
}

static bool heads_fit(const npuq_kv_cache *cache, int64_t heads, int64_t kv_heads, int64_t head_dim) {
    return kv_cache_fits(cache) && kv_heads > 0 && head_dim > 0 && heads > 0 && heads % kv_heads == 0 &&
           cache->key.channels == kv_heads * head_dim;
}

int npuq_grouped_attention_paged(npuq_pool *pool, const npuq_kv_cache *cache, const void *q, int32_t dtype,
                                 int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                                 const int64_t *kv_lens, int64_t sequences, const int32_t *table, int64_t table_stride,
                                 float softmax_scale, void *out) {
    if (!heads_fit(cache, heads, kv_heads, head_dim) || !computes(dtype)) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !tables_fit(&cache->key, kv_lens, sequences, table, table_stride)) {
        return NPUQ_BAD_INDEX;
    }
    struct grouped grouped = {
        .pool = pool, .cache = cache, .table = table, .table_stride = (size_t)table_stride, .q_ends = q_ends,
        .kv_lens = kv_lens, .q = q, .heads = (size_t)heads, .kv_heads = (size_t)kv_heads, .dim = (size_t)head_dim,
        .causal = 1, .dtype = dtype, .scale = softmax_scale, .out = out,
    };
    return attend(&grouped, sequences);
}

int npuq_grouped_attention(npuq_pool *pool, const void *q, const void *key, const void *value, int32_t dtype,
                           int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                           const int64_t *kv_lens, int64_t sequences, int64_t keys, float softmax_scale, int32_t causal,
                           void *out) {
    npuq_pages rows = {.blocks = 1, .block_size = keys > 0 ? keys : 1, .channels = kv_heads * head_dim, .dtype = dtype,
                       .layout = NPUQ_ND};
    npuq_kv_cache cache = {rows, rows};
    cache.key.rows = (void *)key;
    cache.value.rows = (void *)value;
    if (keys < 0 || !heads_fit(&cache, heads, kv_heads, head_dim)) return NPUQ_BAD_SIZE;
    if (!is_cumulative(q_ends, sequences) || !groups_fit(kv_lens, sequences, keys)) return NPUQ_BAD_INDEX;
    struct grouped grouped = {
        .pool = pool, .cache = &cache, .q_ends = q_ends, .kv_lens = kv_lens, .q = q, .heads = (size_t)heads,
        .kv_heads = (size_t)kv_heads, .dim = (size_t)head_dim, .causal = causal, .dtype = dtype,
        .scale = softmax_scale, .out = out,
    };
    return attend(&grouped, sequences);
}
