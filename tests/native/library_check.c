/* Runs the library's own interface, without Python: every usable level against level 0, at odd sizes and addresses, on
 * several threads. For processors that the Python tests do not run on (under qemu) and for sanitizers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "npuq.h"

static uint32_t state = 12345;

static uint32_t draw(void) { return state = state * 1664525u + 1013904223u, state >> 8; }

static float draw_float(void) { return ((float)(draw() % 20001) - 10000) / 3000; }

static void fail(const char *what, int level) {
    fprintf(stderr, "%s: level %s differs\n", what, npuq_level_name(level));
    exit(1);
}

static void *filled(size_t bytes) {
    uint8_t *memory = malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) memory[i] = (uint8_t)draw();
    return memory;
}

static float *floats(size_t n) {
    float *memory = malloc((n + 1) * sizeof *memory);
    for (size_t i = 0; i < n; i++) memory[i] = draw_float();
    return memory;
}

static npuq_pool *pools[8];

static void check_integer_products(void) {
    for (int round = 0; round < 60; round++) {
        int64_t groups = 1 + draw() % 3, rows = 2 * (1 + draw() % 20), m = 0, counts[3];
        int64_t k = 1 + draw() % (round % 8 ? 300 : 2500);
        int dtype = round % 2 ? NPUQ_I4 : NPUQ_I8;
        for (int g = 0; g < groups; g++) m += counts[g] = draw() % 24;
        uint8_t *w = filled((size_t)(groups * rows * k) + 3);
        int8_t *x = filled((size_t)(m * k));
        float *scale = floats((size_t)rows), *x_scale = floats((size_t)m);
        npuq_part part[3];
        for (int g = 0; g < groups; g++) part[g] = (npuq_part){w + 3 + g * rows * k, scale, rows};
        npuq_weights weights = {part, groups, 1, k, rows, dtype};
        size_t bytes = (size_t)(m * rows) * sizeof(float);
        float *expected = malloc(bytes + 1), *out = malloc(bytes + 1);
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            if (npuq_matmul(pools[level], &weights, x, NPUQ_I8, x_scale, counts, m, level ? out : expected, NPUQ_F32)) exit(2);
            if (level && memcmp(out, expected, bytes)) fail("integer product", level);
        }
        free(w), free(x), free(scale), free(x_scale), free(expected), free(out);
    }
}

static void check_float_products(void) {
    for (int round = 0; round < 30; round++) {
        int64_t rows = 1 + draw() % 30, k = 1 + draw() % 200, m = 1 + draw() % 15;
        float *w = floats((size_t)(rows * k)), *x = floats((size_t)(m * k));
        npuq_part part = {w, NULL, rows};
        npuq_weights weights = {&part, 1, 1, k, rows, NPUQ_F32};
        float *expected = malloc((size_t)(m * rows) * 4), *out = malloc((size_t)(m * rows) * 4);
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            npuq_matmul(pools[level], &weights, x, NPUQ_F32, NULL, NULL, m, level ? out : expected, NPUQ_F32);
            for (int64_t i = 0; level && i < m * rows; i++) {
                if (fabsf(out[i] - expected[i]) > 1e-4f * (float)k) fail("float product", level);
            }
        }
        free(w), free(x), free(expected), free(out);
    }
}

static void check_quantizers(void) {
    for (int round = 0; round < 40; round++) {
        int64_t rows = 1 + draw() % 5, cols = 1 + draw() % 150;
        float *x = floats((size_t)(rows * cols)), scale[2][8];
        int8_t *codes[2] = {malloc((size_t)(rows * cols)), malloc((size_t)(rows * cols))};
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            int which = level != 0;
            npuq_dynamic_quant(pools[level], x, NPUQ_F32, cols, rows, cols, codes[which], scale[which]);
            if (level && (memcmp(codes[0], codes[1], (size_t)(rows * cols)) || memcmp(scale[0], scale[1], (size_t)rows * 4))) {
                fail("dynamic quantization", level);
            }
        }
        free(x), free(codes[0]), free(codes[1]);
    }
}

/* Calibration's floats are the same at every level: a product of odd sizes, a panel of GPTQ, a sweep. */
static void check_calibration(void) {
    for (int round = 0; round < 12; round++) {
        int64_t m = 1 + draw() % 40, n = 1 + draw() % 70, k = draw() % 300, lanes = NPUQ_LANES, moves[2] = {0, 0};
        float *a = floats((size_t)(m * k)), *b = floats((size_t)(k * n)), *c[2], *sums[2], *gradient[2];
        float *lower = floats((size_t)(n * n)), *w = floats((size_t)(n * lanes)), *scale = floats((size_t)(lanes + n));
        float *errors = malloc((size_t)(n * lanes) * 4), *start = floats((size_t)(n * lanes));
        int8_t *codes[2], *found[2];
        for (int64_t i = 0; i < n; i++) lower[i * n + i] = 2 + (float)i / 8;
        for (int64_t i = 0; i < lanes + n; i++) scale[i] = 0.1f + (float)(i % 5) / 9;
        for (int which = 0; which < 2; which++) {
            c[which] = malloc((size_t)(m * n) * 4), sums[which] = malloc((size_t)(n * lanes) * 4);
            gradient[which] = malloc((size_t)(n * lanes) * 4);
            codes[which] = malloc((size_t)(n * lanes)), found[which] = malloc((size_t)(n * lanes));
        }
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            int which = level != 0, bits = round % 2 ? 4 : 8;
            size_t bytes = (size_t)(n * lanes) * 4;
            if (npuq_float_product(level, a, 1, m, b, n, 1, m, n, k, round % 2, 0, c[which], n)) exit(2);
            memcpy(sums[which], start, bytes), memcpy(gradient[which], start, bytes);
            memset(found[which], 1, bytes / 4);
            if (npuq_gptq_columns(level, lower, n, n, lanes, bits, scale, w, sums[which], errors, codes[which])) exit(2);
            if (npuq_descend(level, lower, scale + lanes, n, lanes, bits, scale, gradient[which], found[which],
                             &moves[which])) exit(2);
            if (memcmp(c[0], c[which], (size_t)(m * n) * 4)) fail("product of calibration", level);
            if (memcmp(codes[0], codes[which], bytes / 4) || memcmp(sums[0], sums[which], bytes)) fail("GPTQ", level);
            if (moves[0] != moves[which] || memcmp(found[0], found[which], bytes / 4) ||
                memcmp(gradient[0], gradient[which], bytes)) fail("coordinate descent", level);
        }
        for (int which = 0; which < 2; which++) {
            free(c[which]), free(sums[which]), free(gradient[which]), free(codes[which]), free(found[which]);
        }
        free(a), free(b), free(lower), free(w), free(scale), free(errors), free(start);
    }
}

static void near(const char *what, int level, const float *out, const float *expected, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if (fabsf(out[i] - expected[i]) > 1e-4f) fail(what, level);
    }
}

static void check_attention(void) {
    for (int round = 0; round < 20; round++) {
        int64_t heads = 1 + draw() % 3, nope = 1 + draw() % 40, rope = 2 * (1 + draw() % 8), value = 1 + draw() % 80;
        int64_t q_ends[2], kv_ends[2];
        for (int s = 0; s < 2; s++) {
            q_ends[s] = (s ? q_ends[0] : 0) + 1 + draw() % 140;
            kv_ends[s] = (s ? kv_ends[0] : 0) + 1 + draw() % 140;
        }
        int64_t tokens = q_ends[1], keys = kv_ends[1], n = tokens * heads * value;
        float *q = floats((size_t)(tokens * heads * (nope + rope))), *k = floats((size_t)(keys * heads * nope));
        float *k_rope = floats((size_t)(keys * rope)), *v = floats((size_t)(keys * heads * value));
        int64_t width = nope + rope;
        npuq_heads all = {{q, heads * width, width}, {q + nope, heads * width, width}, {k, heads * nope, nope},
                          {k_rope, rope, 0}, {v, heads * value, value}, heads, nope, rope, value, NPUQ_F32};
        float *expected = malloc((size_t)n * 4), *out = malloc((size_t)n * 4);
        float *lse[2] = {malloc((size_t)(tokens * heads) * 4), malloc((size_t)(tokens * heads) * 4)};
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            float *to = level ? out : expected;
            if (npuq_attention(pools[level], &all, q_ends, kv_ends, 2, 0.1f, round % 2, to, lse[level != 0])) exit(2);
            if (level) near("attention", level, out, expected, n);
        }
        free(q), free(k), free(k_rope), free(v), free(expected), free(out), free(lse[0]), free(lse[1]);
    }
}

/* One block of 16 keys and its neighbour, 2 or 5 heads, absorbed. */
static void check_paged_attention(void) {
    for (int round = 0; round < 20; round++) {
        int64_t heads = round % 2 ? 2 : 5, latent = 16 * (1 + draw() % 5), rope = 16, kv_len = 1 + draw() % 32, q_end = 1;
        float *pages = floats((size_t)(2 * 16 * latent)), *ropes = floats((size_t)(2 * 16 * rope));
        float *q = floats((size_t)(heads * latent)), *q_rope = floats((size_t)(heads * rope));
        int32_t table[2] = {1, 0};
        npuq_latent_cache cache = {{pages, NULL, 2, 16, latent, NPUQ_F32, NPUQ_NZ}, {ropes, NULL, 2, 16, rope, NPUQ_F32, NPUQ_NZ}};
        float *expected = malloc((size_t)(heads * latent) * 4), *out = malloc((size_t)(heads * latent) * 4);
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            float *to = level ? out : expected;
            if (npuq_attention_paged(pools[level], &cache, q, q_rope, heads, &q_end, &kv_len, 1, table, 2, 0.1f, to)) exit(2);
            if (level) near("paged attention", level, out, expected, heads * latent);
        }
        free(pages), free(ropes), free(q), free(q_rope), free(expected), free(out);
    }
}

/* Index scores, selection and attention to the selected of 40 keys in ND pages, channels that fill no group. */
static void check_sparse_attention(void) {
    for (int round = 0; round < 20; round++) {
        int64_t heads = 1 + draw() % 9, width = 1 + draw() % 40, latent = 1 + draw() % 50, rope = 1 + draw() % 9;
        int64_t q_end = 2, kv_len = 40, count = 1 + draw() % 50, n = 2 * heads * latent;
        float *index = floats((size_t)(48 * width)), *pages = floats((size_t)(48 * latent)), *ropes = floats((size_t)(48 * rope));
        float *query = floats((size_t)(2 * heads * width)), *weights = floats((size_t)(2 * heads));
        float *q = floats((size_t)n), *q_rope = floats((size_t)(2 * heads * rope));
        int32_t table[3] = {2, 0, 1}, *selected[2] = {malloc((size_t)(2 * count) * 4), malloc((size_t)(2 * count) * 4)};
        float *expected = malloc((size_t)n * 4), *out = malloc((size_t)n * 4);
        npuq_pages keys = {index, NULL, 3, 16, width, NPUQ_F32, NPUQ_ND};
        npuq_latent_cache cache = {{pages, NULL, 3, 16, latent, NPUQ_F32, NPUQ_ND}, {ropes, NULL, 3, 16, rope, NPUQ_F32, NPUQ_ND}};
        for (int level = 0; level < npuq_level_count(); level++) {
            if (pools[level] == NULL) continue;
            if (npuq_lightning_indexer(pools[level], &keys, query, weights, heads, &q_end, &kv_len, 1, table, 3, count,
                                       selected[level != 0])) exit(2);
            if (npuq_attention_selected(pools[level], &cache, q, q_rope, heads, &q_end, &kv_len, 1, table, 3,
                                        selected[0], count, 0.1f, level ? out : expected)) exit(2);
            int64_t seen = 0;
            while (seen < count && selected[level != 0][seen] >= 0) seen++;
            if (seen != (count < 39 ? count : 39)) fail("number of selected keys", level);
            if (level) near("attention to selected keys", level, out, expected, n);
        }
        free(index), free(pages), free(ropes), free(query), free(weights), free(q), free(q_rope);
        free(selected[0]), free(selected[1]), free(expected), free(out);
    }
}

static void expect(const char *what, int status, int expected) {
    if (status == expected) return;
    fprintf(stderr, "%s: status %d, not %d\n", what, status, expected);
    exit(1);
}

/* What would read or write outside of its memory is refused, and the very last that fits is not. */
static void check_refusals(void) {
    npuq_pool *pool = pools[0];
    float *pages = floats(2 * 16 * 16), *ropes = floats(2 * 16 * 16), *x = floats(64), *gamma = floats(16), out[64];
    npuq_latent_cache cache = {{pages, NULL, 2, 16, 16, NPUQ_F32, NPUQ_NZ}, {ropes, NULL, 2, 16, 16, NPUQ_F32, NPUQ_NZ}};
    int64_t slots[2] = {-1, 31}, ends[2] = {1, 2}, lens[2] = {32, 17}, shrinking[2] = {2, 1}, rows[2] = {1, 1};
    int32_t table[4] = {0, 1, 1, 0}, ids[2] = {0, 1}, index[2];
#define WRITE(tokens) npuq_kv_cache_write(pool, &cache, x, 32, gamma, x, x, slots, tokens, 1e-6f, NULL, NULL)
#define ATTEND(q_ends) npuq_attention_paged(pool, &cache, x, x, 1, q_ends, lens, 2, table, 2, 0.1f, out)
    expect("the last slot", WRITE(2), NPUQ_OK);
    slots[1] = 32;
    expect("a slot after the last", WRITE(2), NPUQ_BAD_INDEX);
    expect("whole blocks", ATTEND(ends), NPUQ_OK);
    expect("lengths that shrink", ATTEND(shrinking), NPUQ_BAD_INDEX);
    lens[0] = 33;
    expect("more keys than the table has blocks for", ATTEND(ends), NPUQ_BAD_INDEX);
    lens[0] = -1;
    expect("fewer keys than none", ATTEND(ends), NPUQ_BAD_INDEX);
    lens[0] = 32, table[1] = 2;
    expect("a block after the last", ATTEND(ends), NPUQ_BAD_INDEX);
    table[1] = -1;
    expect("a block before the first", ATTEND(ends), NPUQ_BAD_INDEX);
    table[1] = 1, cache.latent.channels = 24;
    expect("half a tile", ATTEND(ends), NPUQ_BAD_SIZE);
    cache.latent.channels = 16, cache.rope.blocks = 1;
    expect("a rope pool of fewer blocks", ATTEND(ends), NPUQ_BAD_SIZE);
    cache.rope.blocks = 2, cache.rope.dtype = NPUQ_BF16;
    expect("two dtypes", ATTEND(ends), NPUQ_BAD_SIZE);
    cache.rope.dtype = cache.latent.dtype = NPUQ_F16;
    expect("a dtype that is not computed in", ATTEND(ends), NPUQ_BAD_SIZE);
    cache.rope.dtype = cache.latent.dtype = NPUQ_I8;
    expect("codes without scales", ATTEND(ends), NPUQ_BAD_SIZE);

    cache.rope.dtype = cache.latent.dtype = NPUQ_F32, cache.rope.layout = NPUQ_ND;
    expect("two layouts", ATTEND(ends), NPUQ_BAD_SIZE);
    cache.latent.layout = NPUQ_ND, table[0] = 0, table[1] = 1;
    int32_t selected[2] = {31, 16};
#define SELECT npuq_attention_selected(pool, &cache, x, x, 1, ends, lens, 2, table, 2, selected, 1, 0.1f, out)
    expect("the last key", SELECT, NPUQ_OK);
    selected[1] = 17;
    expect("a key after the last", SELECT, NPUQ_BAD_INDEX);
    int64_t seen = 8;
    expect("all columns", npuq_top_k(pool, x, 1, 8, &seen, 2, index), NPUQ_OK);
    expect("more than all", npuq_top_k(pool, x, 1, 7, &seen, 2, index), NPUQ_BAD_INDEX);

    npuq_part parts[2] = {{x, NULL, 4}, {x, NULL, 4}};
    npuq_weights experts = {parts, 2, 1, 8, 4, NPUQ_F32}, other = {parts, 2, 1, 4, 4, NPUQ_F32};
#define MATMUL npuq_matmul(pool, &experts, x, NPUQ_F32, NULL, rows, 2, out, NPUQ_F32)
    expect("rows of groups", MATMUL, NPUQ_OK);
    rows[1] = 2;
    expect("more rows than there are", MATMUL, NPUQ_BAD_INDEX);
    rows[0] = 3, rows[1] = -1;
    expect("fewer rows than none", MATMUL, NPUQ_BAD_INDEX);
    expect("halves that do not fit", npuq_mlp(pool, &experts, &other, x, NPUQ_F32, 1, out), NPUQ_BAD_SIZE);
    experts.dtype = NPUQ_I8;
    expect("floats for integers", npuq_matmul(pool, &experts, x, NPUQ_F32, NULL, rows, 2, out, NPUQ_F32), NPUQ_BAD_SIZE);
#define ROUTE(experts) npuq_init_routing(pool, x, NPUQ_F32, 8, ids, 1, 2, experts, 0, experts, index, rows, out, NULL, NULL)
    expect("the last expert", ROUTE(2), NPUQ_OK);
    expect("an expert after the last", ROUTE(1), NPUQ_BAD_INDEX);
    index[1] = 2;
    expect("a row after the last", npuq_finalize_routing(pool, x, NPUQ_F32, 8, x, index, 1, 2, NULL, out), NPUQ_BAD_INDEX);
#define GATE(k, groups) npuq_gating_top_k(pool, x, NULL, 1, 8, k, 1, groups, 1, 0, 0, 1, out, table)
    expect("as many experts as there are in a group", GATE(4, 2), NPUQ_OK);
    expect("more than there are", GATE(9, 1), NPUQ_BAD_SIZE);
    expect("groups that do not divide them", GATE(1, 3), NPUQ_BAD_SIZE);
    free(pages), free(ropes), free(x), free(gamma);
}

static void convert_at_every_level(const npuq_source *source, int64_t cols, int bits, int mse) {
    int8_t *codes[2] = {malloc((size_t)(2 * cols)), malloc((size_t)(2 * cols))};
    float scale[2][2], bias[2][2] = {{0}};
    double error[2][2], norm[2][2];
    int64_t bad;
    size_t stored = (size_t)(2 * cols) / (bits == 4 ? 2 : 1);
    for (int level = 0; level < npuq_level_count(); level++) {
        if (!npuq_level_usable(level)) continue;
        int w = level != 0;
        if (npuq_quantize_rows(level, source, 2, cols, bits, mse, 1, codes[w], scale[w], bias[w], error[w], norm[w], &bad)) exit(2);
        if (level && (memcmp(codes[0], codes[1], stored) || memcmp(scale[0], scale[1], sizeof scale[0]) ||
                      memcmp(bias[0], bias[1], sizeof bias[0]) || memcmp(error[0], error[1], sizeof error[0]) ||
                      memcmp(norm[0], norm[1], sizeof norm[0]))) {
            fail("conversion", level);
        }
    }
    free(codes[0]), free(codes[1]);
}

static void check_fp8_conversion(void) {
    for (int round = 0; round < 40; round++) {
        int64_t cols = 1 + draw() % 700;
        int bits = round % 2 ? 4 : 8, mse = round % 4 < 2;
        uint8_t *fp8 = filled((size_t)(2 * cols));
        for (int64_t i = 0; i < 2 * cols; i++) fp8[i] = (fp8[i] & 0x7F) == 0x7F ? 0 : fp8[i];
        float *blocks = floats((size_t)(cols / 16 + 1));
        int64_t block = round % 3 ? 16 : 128;
        for (int64_t i = 0; block == 128 && i < cols / 16 + 1; i++) blocks[i] = 1 + fabsf(blocks[i]);
        npuq_source source = {fp8, blocks, cols / block + 1, 0, 2, block, NPUQ_F8E4M3};
        convert_at_every_level(&source, cols, bits, mse);
        free(fp8), free(blocks);
    }
}

/* Random bits of which one of the exponent's is cleared, so that all are finite; at addresses of elements, not vectors. */
static void check_float_conversion(void) {
    static const int dtypes[3] = {NPUQ_BF16, NPUQ_F16, NPUQ_F32};
    for (int round = 0; round < 60; round++) {
        int64_t cols = 1 + draw() % (round % 5 ? 300 : 3000), size = round % 3 == 2 ? 4 : 2;
        uint8_t *memory = filled((size_t)((2 * cols + 1) * size)), *x = memory + size;
        for (int64_t i = size - 1; i < 2 * cols * size; i += size) x[i] &= 0xBF;
        npuq_source source = {x, NULL, 0, 0, 1, cols, dtypes[round % 3]};
        convert_at_every_level(&source, cols, round % 4 < 3 ? 4 : 8, round % 4 == 2);
        free(memory);
    }
}

static void check_digest(const npuq_sha256 *stream, const char *expected) {
    uint8_t digest[32];
    char text[65];
    npuq_sha256_end(stream, digest);
    for (int i = 0; i < 32; i++) snprintf(text + 2 * i, 3, "%02x", digest[i]);
    if (strcmp(text, expected) == 0) return;
    fprintf(stderr, "sha256 is %s, not %s\n", text, expected);
    exit(1);
}

/* Published examples (FIPS 180-4; a million times "a"), in pieces of any length, alone and beside each other. */
static void check_sha256(void) {
    static const char *const digests[2] = {"248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
                                           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"};
    static const char *const message = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    enum { MILLION = 1000000 };
    char *many = malloc(MILLION);
    memset(many, 'a', MILLION);
    for (int round = 0; round < 20; round++) {
        npuq_sha256 streams[2];
        int64_t left[2] = {(int64_t)strlen(message), MILLION};
        const char *data[2] = {message, many};
        npuq_sha256_begin(&streams[0]), npuq_sha256_begin(&streams[1]);
        while (left[0] || left[1]) {
            int64_t n[2];
            for (int i = 0; i < 2; i++) n[i] = (int64_t)draw() % (left[i] < 50000 ? left[i] + 1 : 50000);
            if (round % 2) {
                npuq_sha256_add(&streams[0], data[0], n[0]), npuq_sha256_add(&streams[1], data[1], n[1]);
            } else {
                npuq_sha256_add_two((npuq_sha256 *const[2]){&streams[1], &streams[0]},
                                    (const void *const[2]){data[1], data[0]}, (const int64_t[2]){n[1], n[0]});
            }
            for (int i = 0; i < 2; i++) data[i] += n[i], left[i] -= n[i];
        }
        for (int i = 0; i < 2; i++) check_digest(&streams[i], digests[i]);
    }
    free(many);
}

#if defined(__x86_64__)
/* Wide registers in use slow SHA instructions down: hashing must leave none. */
static void check_wide_registers(void) {
    uint8_t half[16];
    npuq_sha256 stream;
    npuq_sha256_begin(&stream);
    npuq_sha256_add(&stream, half, 0); /* the loader finds a function at its first call, and restores registers then */
    __asm__ volatile("vpcmpeqd %%ymm15, %%ymm15, %%ymm15" ::: "xmm15");
    npuq_sha256_add(&stream, half, 0);
    __asm__ volatile("vextracti128 $1, %%ymm15, %0" : "=m"(half)::);
    for (int i = 0; i < 16; i++) {
        if (half[i]) fprintf(stderr, "sha256: wide registers are still in use\n"), exit(1);
    }
}
#endif

int main(void) {
    int checked = 0;
    for (int level = 0; level < npuq_level_count(); level++) {
        if (!npuq_level_usable(level)) continue;
        pools[level] = npuq_pool_create(3, level);
        if (pools[level] == NULL) return 2;
        checked += level > 0;
    }
    check_integer_products();
    check_float_products();
    check_quantizers();
    check_calibration();
    check_attention();
    check_paged_attention();
    check_sparse_attention();
    check_refusals();
    check_fp8_conversion();
    check_float_conversion();
    for (int level = 0; level < npuq_level_count(); level++) npuq_pool_destroy(pools[level]);
    printf("%d levels beside portable agree\n", checked);
    if (npuq_sha256_usable()) {
        check_sha256();
#if defined(__x86_64__)
        if (npuq_level_usable(1)) check_wide_registers();
#endif
        printf("sha256 as published\n");
    }
    return 0;
}
