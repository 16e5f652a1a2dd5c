/* Several operators in one call. A step of one token spends microseconds in most operators and would spend as long again
 * on its way to each of them; here they follow each other. Results are those of the operators called one by one. */
#include "common/checks.h"
#include "common/pool.h"

enum {
    /* The most bytes of a feed-forward block's wide middle, so that the next product finds it in the last-level cache. */
    MIDDLE_BYTES = 12 << 20,
    ALIGNMENT = 64,
};

/* Buffers one after the other. A layout runs twice: with no base to count its bytes, then on memory of that size. */
struct space {
    char *base;
    size_t used;
};

static void *take(struct space *space, size_t bytes) {
    char *at = space->base == NULL ? NULL : space->base + space->used;
    space->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
}

/* Quantized rows and their scales. */
struct codes {
    int8_t *code;
    float *scale;
};

static struct codes take_codes(struct space *space, size_t rows, size_t cols) {
    struct codes codes = {take(space, rows * cols), NULL};
    codes.scale = take(space, rows * sizeof(float));
    return codes;
}

/* Rows (of one stride) times weights, through `codes` where the weights are integers; else the rows are contiguous. */
static int multiply(npuq_pool *pool, const npuq_weights *weights, const void *x, int dtype, int64_t stride,
                    int64_t rows, struct codes codes, void *out, int out_dtype) {
    if (!is_integer(weights->dtype)) return npuq_matmul(pool, weights, x, dtype, NULL, NULL, rows, out, out_dtype);
    int status = npuq_dynamic_quant(pool, x, dtype, stride, rows, weights->cols, codes.code, codes.scale);
    if (status != NPUQ_OK) return status;
    return npuq_matmul(pool, weights, codes.code, NPUQ_I8, codes.scale, NULL, rows, out, out_dtype);
}

int npuq_linear(npuq_pool *pool, const npuq_weights *weights, const void *x, int32_t dtype, int64_t stride,
                int64_t rows, void *out, int32_t out_dtype) {
    if (rows < 0) return NPUQ_BAD_SIZE;
    pool_begin(pool);
    struct space space = {0};
    take_codes(&space, (size_t)rows, (size_t)weights->cols);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = NPUQ_NO_MEMORY;
    if (space.base != NULL) {
        struct codes codes = take_codes(&space, (size_t)rows, (size_t)weights->cols);
        status = multiply(pool, weights, x, dtype, stride, rows, codes, out, out_dtype);
    }
    pool_end(pool);
    return status;
}

/* The middle of some rows: gate|up, then SwiGLU's rows as codes or (in `inner.code`'s place) as floats. */
struct middle {
    void *gate_up, *floats;
    struct codes inner;
};

static struct middle take_middle(struct space *space, size_t rows, size_t half, int dtype, bool quantized) {
    struct middle middle = {.gate_up = take(space, rows * 2 * half * size_of(dtype))};
    if (quantized) middle.inner = take_codes(space, rows, half);
    else middle.floats = take(space, rows * half * size_of(dtype));
    return middle;
}

/* SwiGLU and the product with `down`, from middle->gate_up to out. */
static int bring_down(npuq_pool *pool, const npuq_weights *down, const struct middle *middle, int dtype,
                      const int64_t *group_rows, int64_t rows, void *out) {
    if (!is_integer(down->dtype)) {
        int status = npuq_swiglu(pool, middle->gate_up, dtype, rows, down->cols, middle->floats, dtype);
        if (status != NPUQ_OK) return status;
        return npuq_matmul(pool, down, middle->floats, dtype, NULL, group_rows, rows, out, dtype);
    }
    const struct codes *inner = &middle->inner;
    int status = npuq_swiglu_quant(pool, middle->gate_up, dtype, rows, down->cols, inner->code, inner->scale);
    if (status != NPUQ_OK) return status;
    return npuq_matmul(pool, down, inner->code, NPUQ_I8, inner->scale, group_rows, rows, out, dtype);
}

/* True if `down` takes the outputs of `gate_up`, and both have as many groups. */
static bool halves_fit(const npuq_weights *gate_up, const npuq_weights *down) {
    return gate_up->outputs > 0 && gate_up->outputs == 2 * down->cols && gate_up->groups == down->groups;
}

static int64_t middle_rows(const npuq_weights *gate_up, int dtype) {
    int64_t rows = MIDDLE_BYTES / (gate_up->outputs * (int64_t)size_of(dtype));
    return rows < 64 ? 64 : rows;
}

int npuq_mlp(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x, int32_t dtype,
             int64_t rows, void *out) {
    if (!computes(dtype) || rows < 0 || !halves_fit(gate_up, down)) return NPUQ_BAD_SIZE;
    size_t cols = (size_t)gate_up->cols, half = (size_t)down->cols, size = size_of(dtype);
    int64_t most = middle_rows(gate_up, dtype);
    size_t some = (size_t)(rows < most ? rows : most);
    struct space space = {0};
    pool_begin(pool);
    take_codes(&space, some, cols);
    take_middle(&space, some, half, dtype, is_integer(down->dtype));
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        struct codes codes = take_codes(&space, some, cols);
        struct middle middle = take_middle(&space, some, half, dtype, is_integer(down->dtype));
        for (int64_t first = 0; first < rows && status == NPUQ_OK; first += most) {
            int64_t count = rows - first < most ? rows - first : most;
            const char *from = (const char *)x + (size_t)first * cols * size;
            char *to = (char *)out + (size_t)(first * down->outputs) * size;
            status = multiply(pool, gate_up, from, dtype, gate_up->cols, count, codes, middle.gate_up, dtype);
            if (status == NPUQ_OK) status = bring_down(pool, down, &middle, dtype, NULL, count, to);
        }
    }
    pool_end(pool);
    return status;
}

int npuq_moe_gate(npuq_pool *pool, const npuq_weights *router, const float *bias, const void *x, int32_t dtype,
                  int64_t tokens, int64_t k, int32_t sigmoid, int64_t groups, int64_t top_groups, int32_t select_two,
                  int32_t renormalize, float scaling, float *weights, int32_t *ids) {
    if (tokens < 0) return NPUQ_BAD_SIZE;
    pool_begin(pool);
    float *logits = pool_workspace(pool, (size_t)(tokens * router->outputs) * sizeof *logits);
    int status = NPUQ_NO_MEMORY;
    if (logits != NULL) {
        status = npuq_matmul(pool, router, x, dtype, NULL, NULL, tokens, logits, NPUQ_F32);
    }
    if (status == NPUQ_OK) {
        status = npuq_gating_top_k(pool, logits, bias, tokens, router->outputs, k, sigmoid, groups, top_groups,
                                   select_two, renormalize, scaling, weights, ids);
    }
    pool_end(pool);
    return status;
}

struct experts {
    const npuq_weights *gate_up, *down;
    int dtype;
    size_t copies;
    int64_t middle_rows;
    /* In the workspace: the copies of the tokens (codes or rows), their places, and their outputs. */
    struct codes codes;
    void *rows, *out;
    int32_t *row_index;
    int64_t *group_rows;
    struct middle middle;
};

static void lay_out_copies(struct experts *experts, struct space *space) {
    const npuq_weights *gate_up = experts->gate_up, *down = experts->down;
    size_t size = size_of(experts->dtype), cols = (size_t)gate_up->cols, copies = experts->copies;
    if (is_integer(gate_up->dtype)) experts->codes = take_codes(space, copies, cols);
    else experts->rows = take(space, copies * cols * size);
    experts->middle = take_middle(space, (size_t)experts->middle_rows, (size_t)down->cols, experts->dtype, is_integer(down->dtype));
}

static void lay_out_experts(struct experts *experts, struct space *space) {
    experts->row_index = take(space, experts->copies * sizeof(int32_t));
    experts->group_rows = take(space, (size_t)experts->gate_up->groups * sizeof(int64_t));
    lay_out_copies(experts, space);
    experts->out = take(space, experts->copies * (size_t)experts->down->outputs * size_of(experts->dtype));
}

/* The experts at [group, group + groups), `counts` rows each: `rows` in all, from row `first` on. */
static int run_experts(npuq_pool *pool, const struct experts *experts, int64_t group, int64_t groups,
                       const int64_t *counts, int64_t first, int64_t rows) {
    npuq_weights gate_up = *experts->gate_up, down = *experts->down;
    gate_up.part += group * gate_up.parts;
    down.part += group * down.parts;
    gate_up.groups = down.groups = groups;
    size_t cols = (size_t)gate_up.cols, size = size_of(experts->dtype);
    char *out = (char *)experts->out + (size_t)(first * down.outputs) * size;
    bool integer = is_integer(gate_up.dtype);
    const void *x = integer ? (const void *)(experts->codes.code + (size_t)first * cols)
                            : (const char *)experts->rows + (size_t)first * cols * size;
    const float *scale = integer ? experts->codes.scale + first : NULL;
    int status = npuq_matmul(pool, &gate_up, x, integer ? NPUQ_I8 : experts->dtype, scale, counts, rows,
                             experts->middle.gate_up, experts->dtype);
    if (status != NPUQ_OK) return status;
    return bring_down(pool, &down, &experts->middle, experts->dtype, counts, rows, out);
}

/* All experts, as many of them at a time as the middle holds the rows of: all at once for a few tokens, and one with
 * more rows than that in several turns. */
static int run_all_experts(npuq_pool *pool, const struct experts *experts) {
    int64_t first = 0, all = experts->gate_up->groups, most = experts->middle_rows, taken = 0;
    const int64_t *counts = experts->group_rows;
    for (int64_t group = 0; group < all;) {
        int64_t groups = 1, left = counts[group] - taken, rows = left < most ? left : most;
        bool whole = taken == 0 && rows == left; /* only whole experts share a turn */
        while (whole && group + groups < all && rows + counts[group + groups] <= most) {
            rows += counts[group + groups++];
        }
        if (rows > 0) {
            int status = run_experts(pool, experts, group, groups, groups == 1 ? &rows : counts + group, first, rows);
            if (status != NPUQ_OK) return status;
        }
        first += rows;
        taken = rows < left ? taken + rows : 0;
        group += taken > 0 ? 0 : groups;
    }
    return NPUQ_OK;
}

int npuq_moe_experts(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                     int32_t dtype, const float *weights, const int32_t *ids, int64_t tokens, int64_t k,
                     const void *skip, void *out) {
    if (!computes(dtype) || tokens < 0 || k < 1 || tokens > INT32_MAX / k || !halves_fit(gate_up, down)) {
        return NPUQ_BAD_SIZE;
    }
    struct experts experts = {.gate_up = gate_up, .down = down, .dtype = dtype, .copies = (size_t)(tokens * k)};
    int64_t most = middle_rows(gate_up, dtype);
    experts.middle_rows = most < tokens * k ? most : tokens * k;
    struct space space = {0};
    pool_begin(pool);
    lay_out_experts(&experts, &space);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        lay_out_experts(&experts, &space);
        status = npuq_init_routing(pool, x, dtype, gate_up->cols, ids, tokens, k, gate_up->groups, 0, gate_up->groups,
                                   experts.row_index, experts.group_rows, experts.rows, experts.codes.code, experts.codes.scale);
    }
    if (status == NPUQ_OK) status = run_all_experts(pool, &experts);
    if (status == NPUQ_OK) {
        status = npuq_finalize_routing(pool, experts.out, dtype, down->outputs, weights, experts.row_index, tokens, k,
                                       skip, out);
    }
    pool_end(pool);
    return status;
}

int npuq_expert_rows(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                     int32_t dtype, const int32_t *ids, int64_t tokens, int64_t k, int64_t experts, int64_t first,
                     int32_t *row_index, int64_t *group_rows, void *out) {
    if (!computes(dtype) || tokens < 0 || k < 1 || tokens > INT32_MAX / k || !halves_fit(gate_up, down)) {
        return NPUQ_BAD_SIZE;
    }
    int64_t own = gate_up->groups, rows = 0;
    for (int64_t copy = 0; copy < tokens * k; copy++) rows += ids[copy] >= first && ids[copy] < first + own;
    int64_t most = middle_rows(gate_up, dtype);
    struct experts mine = {.gate_up = gate_up, .down = down, .dtype = dtype, .copies = (size_t)rows,
                           .middle_rows = most < rows ? most : rows};
    struct space space = {0};
    pool_begin(pool);
    lay_out_copies(&mine, &space);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    if (status == NPUQ_OK) {
        lay_out_copies(&mine, &space);
        status = npuq_init_routing(pool, x, dtype, gate_up->cols, ids, tokens, k, experts, first, own, row_index,
                                   group_rows, mine.rows, mine.codes.code, mine.codes.scale);
    }
    if (status == NPUQ_OK) {
        mine.group_rows = group_rows + first;
        mine.out = out;
        status = run_all_experts(pool, &mine);
    }
    pool_end(pool);
    return status;
}

static bool moe_fits(const npuq_moe *moe) {
    const npuq_weights *gate_up = moe->gate_up, *shared = moe->shared_gate_up;
    if (moe->router->outputs != gate_up->groups || moe->router->cols != gate_up->cols || moe->k < 1) return false;
    if (shared == NULL || moe->shared_down == NULL) return shared == NULL && moe->shared_down == NULL;
    return shared->cols == gate_up->cols && moe->shared_down->outputs == moe->down->outputs;
}

int npuq_moe_layer(npuq_pool *pool, const npuq_moe *moe, const void *x, int32_t dtype, int64_t tokens, void *out) {
    if (!computes(dtype) || tokens < 0 || !moe_fits(moe)) return NPUQ_BAD_SIZE;
    size_t copies = (size_t)(tokens * moe->k), shared_bytes = (size_t)(tokens * moe->down->outputs) * size_of(dtype);
    struct space space = {0};
    pool_begin(pool);
    space.used = 2 * (copies * sizeof(float) + ALIGNMENT) + shared_bytes;
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    float *weights = NULL;
    int32_t *ids = NULL;
    void *shared = NULL;
    if (status == NPUQ_OK) {
        weights = take(&space, copies * sizeof *weights);
        ids = take(&space, copies * sizeof *ids);
        if (moe->shared_down != NULL) {
            shared = take(&space, shared_bytes);
            status = npuq_mlp(pool, moe->shared_gate_up, moe->shared_down, x, dtype, tokens, shared);
        }
    }
    if (status == NPUQ_OK) {
        status = npuq_moe_gate(pool, moe->router, moe->bias, x, dtype, tokens, moe->k, moe->sigmoid, moe->groups,
                               moe->top_groups, moe->select_two, moe->renormalize, moe->scaling, weights, ids);
    }
    if (status == NPUQ_OK) {
        status = npuq_moe_experts(pool, moe->gate_up, moe->down, x, dtype, weights, ids, tokens, moe->k, shared, out);
    }
    pool_end(pool);
    return status;
}

struct prolog {
    struct codes hidden, queries;
    void *qkv, *normed, *q;
};

static struct prolog take_prolog(struct space *space, const npuq_mla *mla, size_t tokens, int dtype) {
    size_t size = size_of(dtype);
    struct prolog prolog = {.hidden = take_codes(space, tokens, (size_t)mla->qkv_a->cols)};
    prolog.qkv = take(space, tokens * (size_t)mla->qkv_a->outputs * size);
    if (mla->q_b != NULL) {
        prolog.normed = take(space, tokens * (size_t)mla->q_b->cols * size);
        prolog.queries = take_codes(space, tokens, (size_t)mla->q_b->cols);
        prolog.q = take(space, tokens * (size_t)mla->q_b->outputs * size);
    }
    return prolog;
}

/* From the hidden rows to queries [tokens, heads, nope + rope]: their place and stride; kv ends up in prolog->qkv. */
static int project(npuq_pool *pool, const npuq_mla *mla, const struct prolog *prolog, const void *x, int dtype,
                   int64_t tokens, const void **q, int64_t *q_stride) {
    int64_t width = mla->qkv_a->outputs;
    int status = multiply(pool, mla->qkv_a, x, dtype, mla->qkv_a->cols, tokens, prolog->hidden, prolog->qkv, dtype);
    *q = prolog->qkv;
    *q_stride = width;
    if (status != NPUQ_OK || mla->q_b == NULL) return status;
    int64_t lora = mla->q_b->cols;
    status = npuq_rms_norm(pool, prolog->qkv, dtype, width, mla->q_a_norm, tokens, lora, mla->eps, prolog->normed);
    if (status != NPUQ_OK) return status;
    *q = prolog->q;
    *q_stride = mla->q_b->outputs;
    return multiply(pool, mla->q_b, prolog->normed, dtype, lora, tokens, prolog->queries, prolog->q, dtype);
}

/* True if the widths of a layer and of its cache agree. */
static bool mla_fits(const npuq_mla *mla, const npuq_latent_cache *cache, int dtype) {
    int64_t q_width = mla->heads * (mla->nope_dim + cache->rope.channels);
    int64_t kv_width = cache->latent.channels + cache->rope.channels;
    int64_t q_a_width = mla->q_b != NULL ? mla->q_b->cols : q_width;
    return latent_cache_fits(cache) && cache->rope.dtype == dtype && mla->heads > 0 && mla->nope_dim > 0 &&
           mla->value_dim > 0 && mla->qkv_a->outputs == q_a_width + kv_width && (mla->q_b == NULL || mla->q_b->outputs == q_width) &&
           (mla->o == NULL || mla->o->cols == mla->heads * mla->value_dim);
}

int npuq_mla_prolog(npuq_pool *pool, const npuq_mla *mla, const npuq_latent_cache *cache, const void *x, int32_t dtype,
                    int64_t tokens, const void *cos, const void *sin, const int64_t *slots, void *q_latent,
                    void *q_rope) {
    if (!mla_fits(mla, cache, dtype) || tokens < 0) return NPUQ_BAD_SIZE;
    int64_t width = mla->qkv_a->outputs, kv_width = cache->latent.channels + cache->rope.channels, q_stride = 0;
    int64_t head = mla->nope_dim + cache->rope.channels;
    const void *q = NULL;
    struct space space = {0};
    pool_begin(pool);
    take_prolog(&space, mla, (size_t)tokens, dtype);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    struct prolog prolog = {0};
    if (status == NPUQ_OK) {
        prolog = take_prolog(&space, mla, (size_t)tokens, dtype);
        status = project(pool, mla, &prolog, x, dtype, tokens, &q, &q_stride);
    }
    if (status == NPUQ_OK) {
        const char *kv = (const char *)prolog.qkv + (size_t)(width - kv_width) * size_of(dtype);
        status = npuq_kv_cache_write(pool, cache, kv, width, mla->kv_a_norm, cos, sin, slots, tokens, mla->eps, NULL,
                                     NULL);
    }
    if (status == NPUQ_OK) {
        status = npuq_batch_matmul(pool, q, dtype, q_stride, head, tokens, mla->heads, mla->nope_dim,
                                   cache->latent.channels, mla->w_uk, mla->kv_b_dtype, mla->w_uk_strides[0],
                                   mla->w_uk_strides[1], mla->w_uk_strides[2], q_latent);
    }
    if (status == NPUQ_OK) {
        const char *rope = (const char *)q + (size_t)mla->nope_dim * size_of(dtype);
        status = npuq_interleave_rope(pool, rope, dtype, q_stride, head, tokens, mla->heads, cache->rope.channels, cos,
                                      sin, q_rope);
    }
    pool_end(pool);
    return status;
}

/* Queries in latent space, their attention outputs, and those decompressed. */
struct attended {
    void *q_latent, *q_rope, *latent, *value;
};

static struct attended take_attended(struct space *space, const npuq_mla *mla, const npuq_latent_cache *cache,
                                     size_t tokens) {
    size_t size = size_of(cache->rope.dtype) * tokens * (size_t)mla->heads;
    struct attended attended = {.q_latent = take(space, size * (size_t)cache->latent.channels)};
    attended.q_rope = take(space, size * (size_t)cache->rope.channels);
    attended.latent = take(space, size * (size_t)cache->latent.channels);
    if (mla->o != NULL) attended.value = take(space, size * (size_t)mla->value_dim);
    return attended;
}

int npuq_mla_decode(npuq_pool *pool, const npuq_mla *mla, const npuq_latent_cache *cache, const void *x, int32_t dtype,
                    int64_t tokens, const void *cos, const void *sin, const int64_t *slots, const int64_t *q_ends,
                    const int64_t *kv_lens, int64_t sequences, const int32_t *table, int64_t table_stride,
                    float softmax_scale, void *out) {
    if (!mla_fits(mla, cache, dtype) || tokens < 0) return NPUQ_BAD_SIZE;
    if (sequences < 1 || q_ends[sequences - 1] != tokens) return NPUQ_BAD_INDEX;
    int64_t heads = mla->heads, latent = cache->latent.channels;
    struct space space = {0};
    pool_begin(pool);
    take_attended(&space, mla, cache, (size_t)tokens);
    space = (struct space){pool_workspace(pool, space.used), 0};
    int status = space.base == NULL ? NPUQ_NO_MEMORY : NPUQ_OK;
    struct attended in = {0};
    if (status == NPUQ_OK) {
        in = take_attended(&space, mla, cache, (size_t)tokens);
        status = npuq_mla_prolog(pool, mla, cache, x, dtype, tokens, cos, sin, slots, in.q_latent, in.q_rope);
    }
    if (status == NPUQ_OK) {
        status = npuq_attention_paged(pool, cache, in.q_latent, in.q_rope, heads, q_ends, kv_lens, sequences, table,
                                      table_stride, softmax_scale, in.latent);
    }
    if (status == NPUQ_OK) {
        status = npuq_batch_matmul(pool, in.latent, dtype, heads * latent, latent, tokens, heads, latent,
                                   mla->value_dim, mla->w_uv, mla->kv_b_dtype, mla->w_uv_strides[0],
                                   mla->w_uv_strides[1], mla->w_uv_strides[2], mla->o == NULL ? out : in.value);
    }
    if (status == NPUQ_OK && mla->o != NULL) {
        status = npuq_linear(pool, mla->o, in.value, dtype, heads * mla->value_dim, tokens, out, dtype);
    }
    pool_end(pool);
    return status;
}
