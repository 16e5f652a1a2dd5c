/* The block of multi-head latent attention in one call: projections, the cache, attention, and the way out. */
#include "inference/workspace.h"

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
    int status = multiply_rows(pool, mla->qkv_a, x, dtype, mla->qkv_a->cols, tokens, prolog->hidden, prolog->qkv, dtype);
    *q = prolog->qkv;
    *q_stride = width;
    if (status != NPUQ_OK || mla->q_b == NULL) return status;
    int64_t lora = mla->q_b->cols;
    status = npuq_rms_norm(pool, prolog->qkv, dtype, width, mla->q_a_norm, tokens, lora, mla->eps, prolog->normed);
    if (status != NPUQ_OK) return status;
    *q = prolog->q;
    *q_stride = mla->q_b->outputs;
    return multiply_rows(pool, mla->q_b, prolog->normed, dtype, lora, tokens, prolog->queries, prolog->q, dtype);
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
