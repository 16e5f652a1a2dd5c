/* Absorbed attention's call, and where a query's keys lie: in pages, or copied into tiles. */
#ifndef NPUQ_INFERENCE_LATENT_KEYS_H
#define NPUQ_INFERENCE_LATENT_KEYS_H

#include <stdbool.h>
#include <string.h>

#include "common/dtypes.h"
#include "common/pool.h"

/* Rows (heads of some tokens) that share a task: its keys come from memory once for all of them, and from L2 for all but the
 * first. Their floats stay in L2 too. */
enum { TASK_ROWS = 32 };

struct arithmetic;

/* Tokens of a sequence that share their tasks: each sees one key more than the one before it. */
struct group {
    size_t sequence, token, tokens;
};

struct attention {
    npuq_pool *pool;
    const struct kernels *kernels;
    const struct arithmetic *arithmetic;
    const npuq_latent_cache *cache;
    const char *q_latent, *q_rope;
    size_t heads, heads_per_task, tokens_per_task, tasks_per_group;
    struct group *groups;
    size_t spans; /* the most of a query, if its spans are tasks of their own; else 0 */
    void *partial; /* their results: struct running and its `out`, each */
    const int64_t *q_ends, *kv_lens;
    const int32_t *table;
    size_t sequences, table_stride;
    const int32_t *selected; /* [tokens, selected_stride], −1 after the last; NULL: all keys that a query sees */
    size_t selected_stride;
    float scale;
    size_t latent_width, rope_width; /* channels in whole groups: those of q, and of a tile of copied keys */
    char *out;
};

/* Keys from number `first` to `end`, for some rows: some heads of a token, or all heads of each of several. The first token
 * sees `seen` keys of its sequence's, each other one more than the token before it. */
struct span {
    size_t sequence, token, tokens, head, rows, seen, first, end;
    const int32_t *selected; /* of the only token, or NULL */
};

/* What some rows have gathered from the keys so far. out: [rows, latent_width]. */
struct running {
    float largest[TASK_ROWS], total[TASK_ROWS];
    float *out;
};

/* How a span's keys are merged into what its rows have gathered. `memory`: span_bytes of it, queries first. */
struct arithmetic {
    size_t (*span_bytes)(const struct attention *attention, size_t rows);
    void (*load_queries)(const struct attention *attention, const struct span *span, void *memory);
    void (*attend_span)(const struct attention *attention, const struct span *span, struct running *in, void *memory);
};

/* The first of a span's rows, in the call's [tokens, heads]: the others follow it. */
static inline size_t first_row(const struct attention *attention, const struct span *span) {
    return span->token * attention->heads + span->head;
}

/* True if every row of a span sees all of `keys` keys from number `key` on. */
static inline bool all_see(const struct span *span, size_t key, size_t keys) { return key + keys <= span->seen; }

/* How many of `keys` keys from number `key` on the token of a span's row sees. */
static inline size_t seen_by(const struct span *span, size_t row, size_t key, size_t keys) {
    const size_t seen = span->seen + row / (span->rows / span->tokens);
    return seen <= key ? 0 : seen - key < keys ? seen - key : keys;
}

/* The end of the rows that are of the same token as `row`. */
static inline size_t end_of_token(const struct span *span, size_t row) {
    const size_t heads = span->rows / span->tokens;
    return (row / heads + 1) * heads;
}

/* Some keys of one block in NZ layout, and their place in it. */
struct place {
    const char *latent, *rope; /* the block */
    size_t block_size, first, keys;
};

/* The sequence's keys from `key` on, of `keys` in all: as many as a tile takes of one block. */
static inline struct place find_keys(const struct attention *attention, size_t sequence, size_t key, size_t keys) {
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
static inline void copy_row(const npuq_pages *pages, size_t slot, size_t at, char *tile) {
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
static inline struct place copy_keys(const struct attention *attention, size_t sequence, const int32_t *selected, size_t key,
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

/* The number of a query's keys: of those that it sees, or of those selected among them. */
static inline size_t count_keys(const struct attention *attention, size_t sequence, size_t token, const int32_t *selected) {
    if (selected != NULL) {
        size_t keys = 0;
        while (keys < attention->selected_stride && selected[keys] >= 0) keys++;
        return keys;
    }
    /* The sequence's last query sees all of its keys, the one before all but one, … */
    int64_t seen = attention->kv_lens[sequence] - (attention->q_ends[sequence] - 1 - (int64_t)token);
    return seen > 0 ? (size_t)seen : 0;
}

static inline bool copies_keys(const struct attention *attention) {
    return attention->selected != NULL || attention->cache->latent.layout == NPUQ_ND;
}

extern const struct arithmetic float_attention, bf16_attention, int8_attention;

#endif
