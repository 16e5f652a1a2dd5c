/* Instruction-set levels: the same kernels, compiled several times and chosen at run time.
 *
 * A level is one translation unit (level.c), compiled with that set's flags. It exports one table of functions. */
#ifndef NPUQ_COMMON_LEVELS_H
#define NPUQ_COMMON_LEVELS_H

#include "npuq.h"

enum { ATTENTION_HEADS = 8, ATTENTION_KEYS = 64 };
enum { GROUP_LANES = 16 }; /* of logit_range */

/* Up to ATTENTION_HEADS heads of one query token, and up to ATTENTION_KEYS keys of one cache block. */
struct attention_tile {
    const void *latent, *rope; /* the block: [channels / 16, block_size, 16], or int8 [channels / 32, block_size, 32] */
    int dtype, latent_dtype;
    size_t block_size, first, keys; /* the keys at [first, first + keys) of the block */
    size_t latent_dim, rope_dim, heads;
    const float *q; /* [heads, latent_dim + rope_dim], times the softmax scale */
    /* The next keys, to prefetch: the address of the first one in the first group; or NULL. */
    const void *next_latent, *next_rope;
    float *largest, *total, *out; /* a head's running maximum, sum of exponentials, and [heads, latent_dim] */
};

/* Keys or values. A group of 32 bytes of a row lies together: 16 channels of bf16, or 32 of int8. `group_stride` and
 * `row_stride` are in bytes. next: rows that come after these, in the same order, to prefetch; or NULL. paired: values of
 * two keys are interleaved, [groups][pairs of keys][16 channels][2] of bf16. */
struct key_rows {
    const void *rows;
    size_t row_stride, group_stride;
    const void *next;
    int paired;
};

enum { MOST_TILE = 12 * 32, DESCENT_BLOCK = 256 };

/* A panel of GPTQ: `lower` [columns, ldl] is the factor's block on the diagonal; the others are transposed. */
struct gptq_panel {
    const float *lower;
    size_t ldl;
    const float *weight, *scale; /* [columns, rows], [rows] */
    float *sums;                 /* [columns, rows]: of the later columns' errors; then of its own too */
    float *errors;               /* w − s·q */
    int8_t *codes;
    size_t columns, rows;
    int bits;
};

/* Rows of a sweep of coordinate descent; `count`, `place`, `change` are scratch for a row's moves in one block. */
struct descent {
    const float *hessian, *inverse_diagonal, *scale; /* [columns, columns], [columns], [rows] */
    float *gradient;                                 /* [rows, columns] */
    int8_t *codes;
    size_t columns, rows;
    int bits;
    size_t *count;
    float *change;
    uint16_t *place;
};

/* One quantized row. The caller gives `codes`; the other fields are results. */
struct converted {
    int8_t *codes;
    float scale;
    double error, norm;
};

/* Stored weights that the caller will probably use next: kernels may prefetch them. */
struct following {
    const uint8_t *weights;
    size_t bytes;
};

/* Strides in elements. `ldacc` is a multiple of 4 and at least rows rounded up to 4: kernels write whole quads. */
struct kernels {
    const char *name;

    /* Raw integer sums acc[t · ldacc + r] = Σ_k stored(w[r, k]) · x[t, k], where `stored` is the code plus an offset
     * (see the two fields below). */
    void (*dot_w8)(const int8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc, size_t ldacc,
                   struct following following);
    /* Straight from the packed nibbles [rows / 2, k]; for few tokens. */
    void (*dot_w4)(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc, size_t ldacc);
    /* For many tokens: nibbles spread to a byte each [rows, k], then sums of those. */
    void (*unpack_w4)(const uint8_t *w, size_t rows, size_t k, uint8_t *out);
    void (*dot_u4)(const uint8_t *w, size_t rows, const int8_t *x, size_t tokens, size_t k, int32_t *acc, size_t ldacc);
    size_t direct_tokens; /* up to this many, dot_w4 is the faster way */
    size_t w8_rows;       /* dot_w8 of many tokens wants at least so many rows at a time, if there are */
    int32_t offset_w8;    /* the offset of `stored`: Σ_k x must be subtracted this many times */
    int32_t offset_w4;
    int32_t (*sum_i8)(const int8_t *x, size_t k);
    /* out[r] = float(acc[r] − correction) · scale[r] · token_scale, stored as out_dtype. */
    void (*scale_row)(const int32_t *acc, int32_t correction, const float *scale, float token_scale, size_t rows,
                      void *out, int out_dtype);

    /* acc[t · ldacc + r] = Σ_k w[r · ldw + k] · x[t · ldx + k]. */
    void (*dot_float)(const void *w, int w_dtype, size_t ldw, size_t rows, const float *x, size_t ldx, size_t tokens,
                      size_t k, float *acc, size_t ldacc, struct following following);
    /* The same of bf16 rows [tokens, k] and weights [rows, k]; NULL at levels without such products. See bf16_gemm.h. */
    void (*dot_bf16)(const uint16_t *w, size_t rows, const uint16_t *x, size_t tokens, size_t k, float *acc, size_t ldacc,
                     struct following following);
    /* out[t · ldout + c] = Σ_a x[t · ldx + a] · w[a · ldw + c]. */
    void (*axpy_float)(const void *w, int w_dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                       size_t tokens, float *out, size_t ldout);
    /* The same, added to out. */
    void (*axpy_add)(const void *w, int w_dtype, size_t ldw, size_t a, size_t cols, const float *x, size_t ldx,
                     size_t tokens, float *out, size_t ldout);
    void (*to_float)(const void *x, int dtype, size_t n, float *out);
    void (*from_float)(const float *x, size_t n, void *out, int dtype);

    /* One row each. `work` is float scratch of the row's length. */
    void (*code_row)(const float *x, const float *scale, size_t n, int8_t *codes); /* x / scale, saturated */
    void (*quant_row)(const float *x, size_t n, int8_t *codes, float *scale);          /* times 127/max, ties to even */
    void (*quant_row_divide)(const float *x, size_t n, int away, int8_t *codes, float *scale); /* over max/127 */
    /* A part of a row whose largest_row is known: as quant_row, or as quant_row_divide with ties to even. */
    float (*largest_row)(const float *x, size_t n); /* max |x|; an infinity where one is there, or a NaN */
    void (*quant_part)(const float *x, size_t n, float largest, int divide, int8_t *codes, float *scale);
    void (*swiglu_row)(const float *left, const float *right, size_t n, float *out);
    void (*norm_row)(const float *x, const float *gamma, size_t n, float eps, int round_normed, float *out);
    void (*add_row)(const float *x, const float *y, size_t n, float *out);
    void (*scale_add_row)(float weight, const float *x, size_t n, float *out); /* out += weight · x */
    void (*rope_row)(const float *x, const float *cos, const float *sin, size_t dim, float *out);
    void (*rope_halves_row)(const float *x, const float *cos, const float *sin, size_t dim, float *out);

    /* Attention of one tile, merged into its running values; see paged_attention.h. */
    void (*attend)(const struct attention_tile *tile);
    /* Scores of one query and `seen` of `keys` keys become their exponentials (0 where not seen), merged into the
     * query's running maximum and sum; returns the factor for its output so far. */
    float (*online_softmax)(float *score, size_t seen, size_t keys, float *largest, float *total);
    void (*multiply_row)(float factor, size_t n, float *x);
    /* out[c] = Σ_h weight[h] · max(0, x[h · ldx + c]); a NaN stays one. */
    void (*weigh_relu)(const float *x, size_t ldx, const float *weight, size_t heads, size_t n, float *out);

    /* Attention of vectors of sixteen rows in products of bf16; NULL at levels without such instructions. See
     * bf16_attention.h. `count` is at most ATTENTION_KEYS, `channels` a multiple of 16.
     *
     * score[row vector][ATTENTION_KEYS][16], added to or set, of q[row vector][channels / 2][16]: pairs of channels. */
    void (*bf16_scores)(const uint32_t *q, size_t row_vectors, const struct key_rows *keys, size_t channels, size_t count,
                        int add, float *score);
    /* One vector of rows: scores times `scale`, of which a row sees the first `seen` (NULL: all), become pairs of weights
     * [(count + 1) / 2][16], merged into its running maximum and sum; keep: the factor for its output so far. */
    void (*bf16_softmax)(const float *score, size_t count, float scale, const int32_t *seen, float *largest, float *total,
                         float *keep, uint32_t *weight);
    /* out[row] = out[row] · keep[row] + Σ_j weight[j][row] · value[j] for up to sixteen rows. */
    void (*bf16_weigh)(const uint32_t *weight, const struct key_rows *values, size_t channels, size_t count, size_t rows,
                       const float *keep, float *out, size_t ldout);
    /* pairs[channels / 16][(count + 1) / 2][16]: the rows of paired values. */
    void (*bf16_pair_values)(const struct key_rows *values, size_t channels, size_t count, uint32_t *pairs);
    /* The same over codes, in products of int8; see int8_attention.h. `channels` is a multiple of 32.
     *
     * score = (Σ (code + 128) · q − offset[row]) · factor[row], of q[row vector][channels / 4][16]: four channels' codes. */
    void (*int8_scores)(const uint32_t *q, size_t row_vectors, const struct key_rows *keys, size_t channels, size_t count,
                        const float *factor, const int32_t *offset, float *score);
    /* Weights [(count + 3) / 4][16] of four keys, each a byte in units of factor[row]. */
    void (*int8_softmax)(const float *score, size_t count, float scale, float *largest, float *total, float *keep,
                         float *factor, uint32_t *weight);
    /* Rows of values follow each other at once (row_stride 32). */
    void (*int8_weigh)(const uint32_t *weight, const struct key_rows *values, size_t channels, size_t count, size_t rows,
                       const float *keep, const float *factor, float *out, size_t ldout);

    /* Sampling; see likelihoods.h. */
    void (*logit_range)(const float *x, size_t n, float *least, float *largest);
    void (*falling_order)(const float *x, size_t n, uint32_t *order);
    void (*likelihoods)(const float *x, size_t n, float highest, double inverse, int64_t *likelihood);

    /* Conversion; see quantize_row.h. `memory` is convert_scratch(n) bytes, zeroed before its first row. */
    size_t (*convert_scratch)(size_t n);
    void (*convert_release)(void *memory);
    /* The largest magnitude; NaN when there is an infinity or a NaN. */
    float (*decode_row)(const void *x, int dtype, size_t n, const float *block_scale, size_t block, float *out);
    /* w is zero-padded to a multiple of 64. int4 by min-max is convert_stored's alone. */
    int (*convert_row)(const float *w, size_t n, float largest, int bits, int mse, void *memory, struct converted *out);
    /* From a stored row; < 0 if it must be decoded and go through convert_row. */
    int (*convert_stored)(const void *x, int dtype, size_t n, const float *block_scale, size_t block, int bits, int mse,
                          void *memory, struct converted *out);
    /* Calibration; see calibrate/float_product.h. A tile has at most MOST_TILE numbers. */
    size_t tile_rows, tile_columns;
    void (*product_tile)(size_t k, const float *a, const float *b, int accumulate, float *c, size_t ldc);
    void (*gptq_columns)(const struct gptq_panel *panel);
    size_t (*descend)(const struct descent *task); /* the number of moves */

    /* Verification; see convert/compare_row.h. `dequantized` is float scratch of the row's length. */
    void (*unpack_rows)(const int8_t *packed, size_t n, int8_t *even, int8_t *odd);
    void (*compare_row)(const float *w, const int8_t *codes, float scale, size_t n, float *dequantized, double *error,
                        double *norm);

    /* Packs two rows of int4 codes, and adds up each of `columns` equal slices of them: sums[2][columns]. */
    void (*pack_rows)(const int8_t *even, const int8_t *odd, size_t n, size_t columns, int8_t *out, int32_t *sums);
};

int level_best(void);
#if defined(__x86_64__)
int level_has_avx(void); /* registers of 256 bits may be in use */
#endif
const struct kernels *level_kernels(int level);

#endif
