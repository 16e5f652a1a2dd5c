/* The C interface of npuq's native kernels: raw pointers, fixed-width integers, no dependency but libc and threads.
 *
 * Every function that can fail returns a status. Before a thread starts, the library checks dtypes, sizes against each
 * other, and every index (slots, blocks, experts, rows, lengths) against the sizes. It cannot check the bounds of
 * memory: the caller (native/binding.py, runtime/ops/native/) checks that every pointer has the dtype and the sizes of
 * the call. Matrices are row-major. Strides count elements. Nothing here needs alignment.
 *
 * Integer results are exact. Float results do not depend on the number of threads, and an output or a head has the same
 * bits whatever others the call computes: ranks divide them. Between instruction sets they may differ in the last bits
 * (order of additions, fused multiply-add), except in conversion, where all agree.
 */
#ifndef NPUQ_H
#define NPUQ_H

#include <stddef.h>
#include <stdint.h>

#define NPUQ_API __attribute__((visibility("default")))

/* Incremented with every incompatible change; the Python binding refuses a library of another number. */
#define NPUQ_ABI_VERSION 11

/* NPUQ_BAD_SIZE: an unsupported dtype, or sizes that disagree. NPUQ_BAD_INDEX: an index or a length out of range. After
 * both, nothing outside the arguments was touched, and results are not valid. */
enum { NPUQ_OK = 0, NPUQ_NO_MEMORY = 1, NPUQ_NOT_FINITE = 2, NPUQ_BAD_SIZE = 3, NPUQ_BAD_INDEX = 4 };

/* The widest row of npuq_quantize_rows, up to which its sums are exact, and its most columns of bias. */
enum { NPUQ_MOST_COLUMNS = 1 << 17, NPUQ_MOST_BIAS_COLUMNS = 16 };

/* I4 pairs rows in a byte (`npuq_part`). U4 pairs columns, as checkpoints store int4: byte [row, k] holds column 2k in its
 * low nibble and column 2k + 1 in its high one, 8 added to each. */
enum npuq_dtype { NPUQ_F32 = 0, NPUQ_BF16 = 1, NPUQ_F16 = 2, NPUQ_F8E4M3 = 3, NPUQ_I8 = 4, NPUQ_I4 = 5, NPUQ_U4 = 6 };

NPUQ_API int npuq_abi_version(void);

/* Instruction-set levels, worst to best, numbered from 0. One is usable when this CPU has it. */
NPUQ_API int npuq_level_count(void);
NPUQ_API const char *npuq_level_name(int level);
NPUQ_API int npuq_level_usable(int level);

/* Threads that share out the work of one call. `threads` counts the caller; level -1 is the best usable one.
 * NULL when memory or threads run out. Calls from several threads on one pool take turns. */
typedef struct npuq_pool npuq_pool;
NPUQ_API npuq_pool *npuq_pool_create(int threads, int level);
NPUQ_API void npuq_pool_destroy(npuq_pool *pool);
NPUQ_API int npuq_pool_level(const npuq_pool *pool);

/* Watch a private, writable mapping of a file. When a page becomes unreadable (the file became shorter, the disk failed),
 * it and all following pages become zeros, the range counts as lost, and the reader continues. Without this, SIGBUS would
 * end the process. NPUQ_NO_MEMORY: too many ranges, or no handler could be installed. The mapping must outlive
 * npuq_unwatch. */
NPUQ_API int npuq_watch(const void *start, int64_t bytes);
NPUQ_API void npuq_unwatch(const void *start);
NPUQ_API int npuq_is_lost(const void *start);

/* Stored rows: F32, BF16, F16, or F8E4M3 or U4 in blocks of block_rows × block_cols with one float32 scale each. block_scale
 * (NULL for the others) has scale_stride scales a row of blocks; `first_row` is the index of row 0 in the first block. */
typedef struct {
    const void *data;
    const float *block_scale;
    int64_t scale_stride, first_row, block_rows, block_cols;
    int32_t dtype;
} npuq_source;

/* Quantize rows as formats/schemes.py's quantize_rows, bit for bit, on the caller's thread. bits 4 or 8; mse 0 for min-max.
 * codes int8 [rows, cols], for 4 bits packed [rows / 2, cols] (rows even) with bias [rows, bias_columns]; scale
 * [rows]; error and norm: Σ (w − ŵ)² and Σ w² [rows]. cols ≤ 2^17; bias_columns ≤ 16 divides it. level −1 is the best.
 * NPUQ_NOT_FINITE: row *bad_row holds an infinity or NaN, and no later row was quantized. */
NPUQ_API int npuq_quantize_rows(int32_t level, const npuq_source *source, int64_t rows, int64_t cols, int32_t bits,
                                int32_t mse, int64_t bias_columns, int8_t *codes, float *scale, float *bias,
                                double *error, double *norm, int64_t *bad_row);

/* Decode rows to F32 or BF16, each value rounded once; out NULL: only look at them. NPUQ_NOT_FINITE: row *bad_row holds
 * an infinity or NaN, there or in out_dtype. */
NPUQ_API int npuq_decode_rows(int32_t level, const npuq_source *source, int64_t rows, int64_t cols, int32_t out_dtype,
                              void *out, int64_t *bad_row);

/* Compare quantized rows with their source's: codes int8 [rows, cols], for 4 bits packed [rows / 2, cols] (rows even);
 * scale [rows]. sums [rows, sum_columns]: of each row's codes over equal slices of it. error and norm [rows]: Σ (w − ŵ)² and
 * Σ w² in float64, with ŵ = code · scale rounded to float32; infinities and NaN pass through. source, error and norm may be
 * NULL together. */
NPUQ_API int npuq_compare_rows(int32_t level, const npuq_source *source, const int8_t *codes, const float *scale,
                               int64_t rows, int64_t cols, int32_t bits, int64_t sum_columns, int32_t *sums,
                               double *error, double *norm);

/* One SHA-256 (FIPS 180-4): the first `nbytes % 64` bytes of `waiting` have not gone into the state yet. */
typedef struct {
    uint32_t state[8];
    uint64_t nbytes;
    uint8_t waiting[64];
} npuq_sha256;

/* 1 if this CPU has SHA-256 instructions. If not, no function below may be called; libraries of platforms without such
 * instructions lack them. Other libraries are as fast there. */
NPUQ_API int npuq_sha256_usable(void);
NPUQ_API void npuq_sha256_begin(npuq_sha256 *stream);
NPUQ_API void npuq_sha256_add(npuq_sha256 *stream, const void *data, int64_t n);
/* Two updates of different streams, each with its own bytes; while both have bytes, in little more time than one. */
NPUQ_API void npuq_sha256_add_two(npuq_sha256 *const stream[2], const void *const data[2], const int64_t n[2]);
/* The digest of all bytes so far, 32 bytes; the stream does not change. */
NPUQ_API void npuq_sha256_end(const npuq_sha256 *stream, uint8_t *digest);

/* One stored weight: `rows` outputs of `cols` inputs. I4: rows is even and byte [j, k] holds row 2j (low nibble) and
 * row 2j + 1 (high nibble). scale: one float a row for I4 and I8, NULL for floats. */
typedef struct {
    const void *weight;
    const float *scale;
    int64_t rows;
} npuq_part;

/* `groups` × `parts` weights of one dtype and one `cols`; parts of a group are fused along their outputs, and every
 * group has the same sum of rows, `outputs`. A plain linear has one group. */
typedef struct {
    const npuq_part *part;
    int64_t groups;
    int64_t parts;
    int64_t cols;
    int64_t outputs;
    int32_t dtype;
} npuq_weights;

/* out [m, outputs] = x [m, cols] · weightᵀ. group_rows: how many rows of x each group takes, in order (NULL: one group
 * takes all m); rows past their sum are not written. out_dtype is F32 or BF16.
 * I4, I8: x int8, out = float(int32 sum) · scale[n] · x_scale[m], in this order. Floats: x F32 or BF16. */
NPUQ_API int npuq_matmul(npuq_pool *pool, const npuq_weights *weights, const void *x, int32_t x_dtype,
                         const float *x_scale, const int64_t *group_rows, int64_t m, void *out, int32_t out_dtype);

/* The two halves of a product of codes, between which sums of several parts of `cols` are added: sums int32 [m, outputs] of
 * x int8 [m, cols], which wrap; and out = float(sum) · scale[n] · x_scale[m]. One group of I8 weights. */
NPUQ_API int npuq_integer_sums(npuq_pool *pool, const npuq_weights *weights, const int8_t *x, int64_t m, int32_t *sums);
NPUQ_API int npuq_scale_sums(npuq_pool *pool, const npuq_weights *weights, const int32_t *sums, const float *x_scale,
                             int64_t m, void *out, int32_t out_dtype);

/* out [tokens, heads, b] = x [tokens, heads, a] · weight [heads, a, b], the weight a float array of any dtype whose
 * strides are (head_stride, a_stride, b_stride), one of the last two being 1. out is contiguous. */
NPUQ_API int npuq_batch_matmul(npuq_pool *pool, const void *x, int32_t dtype, int64_t x_token_stride,
                               int64_t x_head_stride, int64_t tokens, int64_t heads, int64_t a, int64_t b,
                               const void *weight, int32_t weight_dtype, int64_t head_stride, int64_t a_stride,
                               int64_t b_stride, void *out);

/* Rows: norms, activations, quantization. The dtype of x, gamma and out is F32 or BF16. */

/* Codes int8 [rows, cols] and one scale a row. A row with a NaN or an infinity gets codes 0 and the scale NaN, so that
 * products with it are NaN. */
NPUQ_API int npuq_dynamic_quant(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t rows,
                                int64_t cols, int8_t *codes, float *scale);
/* Parts of rows: largest [rows] is the greatest |x|, infinite for a row with an infinity or a NaN. With that of the whole
 * rows, npuq_quant_parts gives a part the codes and scales of npuq_dynamic_quant; with `divide`, of npuq_swiglu_quant. */
NPUQ_API int npuq_row_maximum(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t rows, int64_t cols,
                              float *largest);
NPUQ_API int npuq_quant_parts(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, int64_t rows, int64_t cols,
                              const float *largest, int32_t divide, int8_t *codes, float *scale);
/* x [rows, 2 · half]: silu(left) · right, in out_dtype. */
NPUQ_API int npuq_swiglu(npuq_pool *pool, const void *x, int32_t dtype, int64_t rows, int64_t half, void *out,
                         int32_t out_dtype);
NPUQ_API int npuq_swiglu_quant(npuq_pool *pool, const void *x, int32_t dtype, int64_t rows, int64_t half,
                               int8_t *codes, float *scale);
NPUQ_API int npuq_rms_norm(npuq_pool *pool, const void *x, int32_t dtype, int64_t stride, const void *gamma,
                           int64_t rows, int64_t cols, float eps, void *out);
NPUQ_API int npuq_add_rms_norm(npuq_pool *pool, const void *x, const void *residual, int32_t dtype, const void *gamma,
                               int64_t rows, int64_t cols, float eps, void *out, void *sum);

/* logits [tokens, experts] → weights [tokens, k], ids [tokens, k]; bias may be NULL. sigmoid: 1, or 0 for softmax.
 * select_two: a group's score is the sum of its two best biased scores, else its best. */
NPUQ_API int npuq_gating_top_k(npuq_pool *pool, const float *logits, const float *bias, int64_t tokens,
                               int64_t experts, int64_t k, int32_t sigmoid, int64_t groups, int64_t top_groups,
                               int32_t select_two, int32_t renormalize, float scaling, float *weights, int32_t *ids);
/* Stable sort of the tokens·k copies by expert: row_index[t·k + j] = place; group_rows [experts] counts. Only the rows of
 * the `own` experts from `first` on are written, the first of them as row 0.
 * codes NULL: out gets the rows as they are; else codes and scale get them quantized (scale = max / 127, ties away). */
NPUQ_API int npuq_init_routing(npuq_pool *pool, const void *x, int32_t dtype, int64_t cols, const int32_t *ids,
                               int64_t tokens, int64_t k, int64_t experts, int64_t first, int64_t own,
                               int32_t *row_index, int64_t *group_rows, void *out, int8_t *codes, float *scale);
/* out[t] = skip[t] + Σ_j weights[t, j] · rows[row_index[t·k + j]]; skip may be NULL. */
NPUQ_API int npuq_finalize_routing(npuq_pool *pool, const void *rows, int32_t dtype, int64_t cols,
                                   const float *weights, const int32_t *row_index, int64_t tokens, int64_t k,
                                   const void *skip, void *out);

/* What a draw depends on beside the logits. temperature > 0; top_k 0, top_p 1 and min_p 0 filter nothing. Noise is that of
 * numpy's Philox with the key (seed, choice): token id takes number id of the counter (0, 0, 0, position). */
typedef struct {
    double temperature, top_p, min_p;
    int64_t top_k;
    uint64_t seed, choice, position;
} npuq_draw;
/* The token with the highest (logit − highest) / temperature + Gumbel noise, of logits [n] those that top_k, then top_p,
 * then min_p leave; equal logits rank by id. n ≤ 2^22. NPUQ_NOT_FINITE: a NaN, or the highest logit is infinite. */
NPUQ_API int npuq_draw_token(npuq_pool *pool, const float *logits, int64_t n, const npuq_draw *draw, int64_t *token);
/* Σ exp((logit − highest) / temperature), each rounded to 2^-40. The same limits and errors. */
NPUQ_API int npuq_likelihood_sum(npuq_pool *pool, const float *logits, int64_t n, double temperature, double *sum);

/* x [tokens, heads, dim] (strided) → out, contiguous; cos and sin [tokens, dim]. */
NPUQ_API int npuq_interleave_rope(npuq_pool *pool, const void *x, int32_t dtype, int64_t token_stride,
                                  int64_t head_stride, int64_t tokens, int64_t heads, int64_t dim, const void *cos,
                                  const void *sin, void *out);
/* One pool of a layer's paged cache: rows of `dtype`, NZ [blocks, channels / 16, block_size, 16] or ND [blocks,
 * block_size, channels]. With scale (one float a channel, else NULL) they are int8 codes round-half-even(value / scale),
 * NZ [blocks, channels / 32, block_size, 32]. */
enum npuq_layout { NPUQ_NZ = 0, NPUQ_ND = 1 };
typedef struct {
    void *rows;
    const float *scale;
    int64_t blocks, block_size, channels;
    int32_t dtype, layout;
} npuq_pages;
/* The cache of multi-head latent attention: latent_dim and rope_dim channels, the rope in the compute dtype. Over a
 * latent of codes queries are quantized per token and head, as by npuq_dynamic_quant. */
typedef struct {
    npuq_pages latent, rope;
} npuq_latent_cache;
/* kv [tokens, latent_dim + rope_dim]; a negative slot is not written. latent_out and rope_out may be NULL. */
NPUQ_API int npuq_kv_cache_write(npuq_pool *pool, const npuq_latent_cache *cache, const void *kv, int64_t stride,
                                 const void *gamma, const void *cos, const void *sin, const int64_t *slots,
                                 int64_t tokens, float eps, void *rope_out, void *latent_out);
/* Absorbed attention of q_latent [tokens, heads, latent_dim], q_rope [tokens, heads, rope_dim] on the cache.
 * q_ends: cumulative query lengths of the sequences; kv_lens: keys of each; table int32 [sequences, table_stride].
 * Query i of a sequence with n queries sees its first kv_len − n + i + 1 keys. */
NPUQ_API int npuq_attention_paged(npuq_pool *pool, const npuq_latent_cache *cache, const void *q_latent,
                                  const void *q_rope, int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                                  const int32_t *table, int64_t table_stride, float softmax_scale, void *out);

/* The same attention of each query to the keys at positions selected [tokens, count] of its sequence, in the row's order
 * up to the first negative one. Not over codes. */
NPUQ_API int npuq_attention_selected(npuq_pool *pool, const npuq_latent_cache *cache, const void *q_latent,
                                     const void *q_rope, int64_t heads, const int64_t *q_ends, const int64_t *kv_lens,
                                     int64_t sequences, const int32_t *table, int64_t table_stride,
                                     const int32_t *selected, int64_t count, float softmax_scale, void *out);
/* For each query the positions of the `count` largest scores among the keys that it sees, ascending, then −1: selected
 * [tokens, count]. score = Σ_h weights[h] · max(0, query[h] · key) in float32, of query [tokens, heads, channels] and
 * weights [tokens, heads] in the dtype of the keys, which are ND. Of equal scores the first key wins; a NaN is the
 * largest. */
NPUQ_API int npuq_lightning_indexer(npuq_pool *pool, const npuq_pages *keys, const void *query, const void *weights,
                                    int64_t heads, const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences,
                                    const int32_t *table, int64_t table_stride, int64_t count, int32_t *selected);
/* The selection alone: of scores [rows, cols] the first seen[row] ones. */
NPUQ_API int npuq_top_k(npuq_pool *pool, const float *scores, int64_t rows, int64_t cols, const int64_t *seen,
                        int64_t count, int32_t *selected);

/* [tokens, heads, channels]; head_stride 0 where heads share their channels. */
typedef struct {
    const void *data;
    int64_t token_stride, head_stride;
} npuq_strided;
/* Queries, keys and values of `count` heads; the nope and rope channels of queries and keys are separate arrays. */
typedef struct {
    npuq_strided q_nope, q_rope, k_nope, k_rope, value;
    int64_t count, nope_dim, rope_dim, value_dim;
    int32_t dtype;
} npuq_heads;
/* q_ends, kv_ends: cumulative lengths of the sequences. causal: query i of n sees keys j ≤ i + (keys − n), else all.
 * out [tokens, count, value_dim] in the heads' dtype, lse [tokens, count]; a query that sees no key gives 0 and −inf. */
NPUQ_API int npuq_attention(npuq_pool *pool, const npuq_heads *heads, const int64_t *q_ends, const int64_t *kv_ends,
                            int64_t sequences, float softmax_scale, int32_t causal, void *out, float *lse);

/* The cache of grouped-query attention: keys and values of kv_heads · head_dim channels a token, each in the compute dtype
 * or codes. */
typedef struct {
    npuq_pages key, value;
} npuq_kv_cache;
/* Attention of q [tokens, heads, head_dim] on the cache: head h reads the keys and values of head h / (heads / kv_heads).
 * q_ends, kv_lens, table: as in npuq_attention_paged. out [tokens, heads, head_dim]. */
NPUQ_API int npuq_grouped_attention_paged(npuq_pool *pool, const npuq_kv_cache *cache, const void *q, int32_t dtype,
                                          int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                                          const int64_t *kv_lens, int64_t sequences, const int32_t *table,
                                          int64_t table_stride, float softmax_scale, void *out);
/* The same over key and value [keys, kv_heads, head_dim], of which each sequence has the next kv_len. causal: query i of
 * n sees keys j ≤ i + (kv_len − n), else all. */
NPUQ_API int npuq_grouped_attention(npuq_pool *pool, const void *q, const void *key, const void *value, int32_t dtype,
                                    int64_t heads, int64_t kv_heads, int64_t head_dim, const int64_t *q_ends,
                                    const int64_t *kv_lens, int64_t sequences, int64_t keys, float softmax_scale,
                                    int32_t causal, void *out);

/* Several operators in one call; results as of separate calls. */

/* npuq_dynamic_quant (for I4 and I8 weights) and npuq_matmul. `stride` is that of x's rows: cols for float weights. */
NPUQ_API int npuq_linear(npuq_pool *pool, const npuq_weights *weights, const void *x, int32_t dtype, int64_t stride,
                         int64_t rows, void *out, int32_t out_dtype);
/* out [rows, down's outputs] = down · swiglu(gate_up · x). */
NPUQ_API int npuq_mlp(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                      int32_t dtype, int64_t rows, void *out);
/* The router's product and npuq_gating_top_k. */
NPUQ_API int npuq_moe_gate(npuq_pool *pool, const npuq_weights *router, const float *bias, const void *x,
                           int32_t dtype, int64_t tokens, int64_t k, int32_t sigmoid, int64_t groups,
                           int64_t top_groups, int32_t select_two, int32_t renormalize, float scaling, float *weights,
                           int32_t *ids);
/* npuq_init_routing, the experts' two products, npuq_finalize_routing. A group of the weights is an expert. */
NPUQ_API int npuq_moe_experts(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                              int32_t dtype, const float *weights, const int32_t *ids, int64_t tokens, int64_t k,
                              const void *skip, void *out);
/* The rows of npuq_moe_experts before npuq_finalize_routing, of the weights' experts, which are those from `first` on of
 * `experts`. row_index and group_rows are those of npuq_init_routing; out has room for tokens·k rows. */
NPUQ_API int npuq_expert_rows(npuq_pool *pool, const npuq_weights *gate_up, const npuq_weights *down, const void *x,
                              int32_t dtype, const int32_t *ids, int64_t tokens, int64_t k, int64_t experts,
                              int64_t first, int32_t *row_index, int64_t *group_rows, void *out);

/* A mixture of experts: the router's gating is that of npuq_gating_top_k. Shared experts may be NULL. */
typedef struct {
    const npuq_weights *router, *gate_up, *down, *shared_gate_up, *shared_down;
    const float *bias;
    int64_t k, groups, top_groups;
    int32_t sigmoid, select_two, renormalize;
    float scaling;
} npuq_moe;
/* npuq_mlp of the shared experts, npuq_moe_gate, npuq_moe_experts: x [tokens, hidden] → out. */
NPUQ_API int npuq_moe_layer(npuq_pool *pool, const npuq_moe *moe, const void *x, int32_t dtype, int64_t tokens,
                            void *out);

/* One layer's attention weights. qkv_a: (q_a, or q where q_b is NULL) | kv_a; o may be NULL; norms in the compute dtype; w_uk
 * [heads, nope_dim, latent_dim] and w_uv [heads, latent_dim, value_dim] of one dtype, as in npuq_batch_matmul. */
typedef struct {
    const npuq_weights *qkv_a, *q_b, *o;
    const void *q_a_norm, *kv_a_norm, *w_uk, *w_uv;
    int64_t w_uk_strides[3], w_uv_strides[3];
    int64_t heads, nope_dim, value_dim;
    int32_t kv_b_dtype;
    float eps;
} npuq_mla;
/* x [tokens, hidden] → q_latent [tokens, heads, latent_dim] and q_rope [tokens, heads, rope_dim]; writes the cache. */
NPUQ_API int npuq_mla_prolog(npuq_pool *pool, const npuq_mla *mla, const npuq_latent_cache *cache, const void *x,
                             int32_t dtype, int64_t tokens, const void *cos, const void *sin, const int64_t *slots,
                             void *q_latent, void *q_rope);
/* npuq_mla_prolog, npuq_attention_paged, w_uv, o: x [tokens, hidden] → out [tokens, o's outputs]; where o is NULL, its
 * inputs [tokens, heads, value_dim]. */
NPUQ_API int npuq_mla_decode(npuq_pool *pool, const npuq_mla *mla, const npuq_latent_cache *cache, const void *x,
                             int32_t dtype, int64_t tokens, const void *cos, const void *sin, const int64_t *slots,
                             const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences, const int32_t *table,
                             int64_t table_stride, float softmax_scale, void *out);

/* Calibration, on the calling thread, in float32; level −1 is the best usable one. Results do not depend on the level. */

/* c [m, n] = a · b, or c + a · b where `accumulate`; −a in place of a where `negate`. Strides of a [m, k] and b [k, n] may
 * be any; a row of c is ldc ≥ n numbers. Each number is a chain of fused multiply-adds over k, beginning with c. */
NPUQ_API int npuq_float_product(int32_t level, const float *a, int64_t a_row, int64_t a_column, const float *b,
                                int64_t b_row, int64_t b_column, int64_t m, int64_t n, int64_t k, int32_t negate,
                                int32_t accumulate, float *c, int64_t ldc);

/* Rows of a panel of GPTQ, or of a sweep, are a multiple of this. */
enum { NPUQ_LANES = 16 };

/* A panel of GPTQ's columns, from the last to the first. lower: the lower factor's block on the diagonal. Transposed:
 * weight, sums, errors, codes [columns, rows]. sums has L[j, i]ᵀ · e of the columns j behind the panel, and gets that of the
 * panel's own. The error e = w − scale · code of a column moves the targets w + sums / L[i, i] of the columns before it. */
NPUQ_API int npuq_gptq_columns(int32_t level, const float *lower, int64_t ldl, int64_t columns, int64_t rows, int32_t bits,
                               const float *scale, const float *weight, float *sums, float *errors, int8_t *codes);

/* One sweep of coordinate descent over codes [rows, columns], from the last column to the first, by their gradient
 * [rows, columns] = hessian · (w − scale · code), which stays that of the codes. moves: how many codes changed. */
NPUQ_API int npuq_descend(int32_t level, const float *hessian, const float *inverse_diagonal, int64_t columns,
                          int64_t rows, int32_t bits, const float *scale, float *gradient, int8_t *codes, int64_t *moves);
/* One layer of grouped-query attention. qkv: (q | k | v), [heads + 2 · kv_heads, head_dim] outputs; o may be NULL. In the
 * compute dtype: bias of the outputs of qkv or NULL, and the gains of queries and keys [head_dim], both or neither.
 * rope_dim: the first channels of a head, which rotate in pairs (i, i + rope_dim / 2). */
typedef struct {
    const npuq_weights *qkv, *o;
    const void *bias, *q_norm, *k_norm;
    int64_t heads, kv_heads, head_dim, rope_dim;
    float eps;
} npuq_gqa;
/* From the product with qkv [tokens, stride] to queries q, keys k and values v, contiguous, with bias, norm and rotation;
 * writes keys and values into the cache at slots, negative ones excepted. cache, k and v may be NULL. */
NPUQ_API int npuq_gqa_rows(npuq_pool *pool, const npuq_gqa *gqa, const npuq_kv_cache *cache, const void *qkv,
                           int32_t dtype, int64_t stride, int64_t tokens, const void *cos, const void *sin,
                           const int64_t *slots, void *q, void *k, void *v);
/* qkv, npuq_gqa_rows, npuq_grouped_attention_paged, o: x [tokens, hidden] → out [tokens, o's outputs]; where o is NULL,
 * its inputs [tokens, heads, head_dim]. */
NPUQ_API int npuq_gqa_decode(npuq_pool *pool, const npuq_gqa *gqa, const npuq_kv_cache *cache, const void *x,
                             int32_t dtype, int64_t tokens, const void *cos, const void *sin, const int64_t *slots,
                             const int64_t *q_ends, const int64_t *kv_lens, int64_t sequences, const int32_t *table,
                             int64_t table_stride, float softmax_scale, void *out);

#endif
