/* Products with one float matrix a head: latent attention's ways into the latent space and out of it. */
#include <stdbool.h>

#include "common/checks.h"
#include "common/pool.h"

/* Tokens whose sums are held at a time. */
enum { TOKEN_CHUNK = 48 };

struct batch {
    npuq_pool *pool;
    const struct kernels *kernels;
    const char *x, *weight;
    char *out;
    int dtype, weight_dtype;
    size_t x_token_stride, x_head_stride, tokens, heads, a, b;
    size_t head_stride, row_stride;
    bool transposed; /* weight rows run along b's inputs: out[b] is a dot product with row b */
};

/* One head, all tokens: its matrix is read once. */
static void batch_task(const void *context, size_t head, int thread) {
    const struct batch *batch = context;
    const struct kernels *kernels = batch->kernels;
    size_t a = batch->a, b = batch->b, ldb = (b + 3) / 4 * 4, size = size_of(batch->dtype);
    float *x = pool_thread_scratch(batch->pool, thread), *out = x + a * TOKEN_CHUNK;
    const size_t stored = size_of(batch->weight_dtype), head_bytes = batch->head_stride * stored;
    const size_t next = head + (size_t)pool_threads(batch->pool);
    const char *w = batch->weight + head * head_bytes;
    struct following following = {NULL, 0};
    if (next < batch->heads) {
        following.weights = (const uint8_t *)batch->weight + next * head_bytes;
        following.bytes = b * batch->row_stride * stored;
    }
    for (size_t first = 0; first < batch->tokens; first += TOKEN_CHUNK) {
        size_t tokens = batch->tokens - first < TOKEN_CHUNK ? batch->tokens - first : TOKEN_CHUNK;
        for (size_t t = 0; t < tokens; t++) {
            size_t at = (first + t) * batch->x_token_stride + head * batch->x_head_stride;
            kernels->to_float(batch->x + at * size, batch->dtype, a, x + t * a);
        }
        if (batch->transposed) {
            kernels->dot_float(w, batch->weight_dtype, batch->row_stride, b, x, a, tokens, a, out, ldb, following);
        } else {
            kernels->axpy_float(w, batch->weight_dtype, batch->row_stride, a, b, x, a, tokens, out, ldb);
        }
        for (size_t t = 0; t < tokens; t++) {
            char *to = batch->out + ((first + t) * batch->heads + head) * b * size;
            kernels->from_float(out + t * ldb, b, to, batch->dtype);
        }
    }
}

int npuq_batch_matmul(npuq_pool *pool, const void *x, int32_t dtype, int64_t x_token_stride, int64_t x_head_stride,
                      int64_t tokens, int64_t heads, int64_t a, int64_t b, const void *weight, int32_t weight_dtype,
                      int64_t head_stride, int64_t a_stride, int64_t b_stride, void *out) {
    if (!computes(dtype) || !is_float(weight_dtype) || tokens < 0 || heads < 0 || a < 0 || b < 0) return NPUQ_BAD_SIZE;
    if (a_stride != 1 && b_stride != 1) return NPUQ_BAD_SIZE;
    struct batch batch = {
        .pool = pool, .kernels = pool_kernels(pool), .x = x, .weight = weight, .out = out, .dtype = dtype,
        .weight_dtype = weight_dtype, .x_token_stride = (size_t)x_token_stride,
        .x_head_stride = (size_t)x_head_stride, .tokens = (size_t)tokens, .heads = (size_t)heads, .a = (size_t)a,
        .b = (size_t)b, .head_stride = (size_t)head_stride, .transposed = b_stride != 1,
        .row_stride = (size_t)(b_stride != 1 ? b_stride : a_stride),
    };
    pool_begin(pool);
    int status = pool_scratch(pool, (batch.a + batch.b + 3) * TOKEN_CHUNK * sizeof(float), 0);
    const size_t head_bytes = batch.head_stride * size_of(weight_dtype);
    pool_note(pool, weight, (struct weights_read){weight, head_bytes, batch.heads * head_bytes});
    if (status == NPUQ_OK) pool_run(pool, batch_task, &batch, batch.heads);
    pool_end(pool);
    return status;
}
